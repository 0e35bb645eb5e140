package desk_test

import (
	"encoding/json"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

func defaults() delivery.Defaults {
	return delivery.Defaults{Timeout: 30 * time.Second, MaxRetries: 5, Backoff: delivery.Backoff{First: 30 * time.Second, Max: time.Hour, Multiplier: 2}}
}

func TestEndpointsAreListedWithTheirTrouble(t *testing.T) {
	t.Parallel()
	b := setup(t)
	good, held, off, disabled, bad := b.endpoint("a good", "none"), b.endpoint("b held", "aggregate"), b.endpoint("c off", "none"), b.endpoint("d disabled", "none"), b.endpoint("e bad", "none")
	b.exec(`UPDATE acme.webhook_endpoints SET last_used_at = now() WHERE id = $1::uuid`, good)
	paused, err := b.desk.Pause(b.ctx, held, "they move house")
	require.NoError(t, err)
	assert.True(t, paused)
	paused, err = b.desk.Pause(b.ctx, held, "")
	require.NoError(t, err)
	assert.False(t, paused)
	b.exec(`UPDATE acme.webhook_endpoints SET is_active = false WHERE id = $1::uuid`, off)
	b.exec(`UPDATE acme.webhook_endpoints SET is_active = false, disabled_at = now(), disabled_reason = 'answered 410' WHERE id = $1::uuid`, disabled)
	b.exec(`UPDATE acme.webhook_endpoints SET endpoint_url = 'ftp://x' WHERE id = $1::uuid`, bad)
	b.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, open_until, last_error) VALUES ('acme', $1::uuid, now() - interval '2 hours', now() + interval '1 minute', 'timeout'),
		('other', $2::uuid, now(), now(), 'of another tenant')`, good, held)
	for i, due := range []string{"now()", "now() + interval '1 day'", "'infinity'"} {
		b.queue(b.deliver(b.event("order.created", "{}"), good, "pending", ""), good, due, "")
		b.bury(b.deliver(b.event("order.created", "{}"), good, "failed", ""), "now()")
		if i == 0 {
			b.exec(`UPDATE acme.webhook_dead_letters SET replayed_at = now()`)
		}
	}
	rows := b.registry()
	table := rows.Routing(defaults())
	list, err := b.desk.Endpoints(b.ctx, table, nil, 10)
	require.NoError(t, err)
	require.Len(t, list, 5)
	states := make([]string, 0, len(list))
	for i := range list {
		states = append(states, list[i].State.State)
	}
	assert.Equal(t, []string{"active", "paused", "inactive", "disabled", "active"}, states)
	e := list[0]
	assert.Equal(t, []int{2, 1, 2}, []int{e.Waiting, e.Parked, e.Dead})
	assert.Equal(t, "https://receiver.example/hooks", e.URL)
	assert.False(t, e.LastUsedAt.IsZero())
	assert.WithinDuration(t, time.Now().Add(-2*time.Hour), e.State.FailingSince.Time, time.Minute)
	assert.False(t, e.State.OpenUntil.IsZero())
	assert.Equal(t, "they move house", list[1].State.Reason)
	assert.True(t, list[1].State.FailingSince.IsZero())
	assert.Equal(t, "answered 410", list[3].State.Reason)
	assert.False(t, list[3].State.Since.IsZero())
	assert.Equal(t, `endpoint_url "ftp://x": the scheme must be http or https`, list[4].Fault)

	for state, want := range map[string]int{"active": 2, "paused": 1, "inactive": 1, "disabled": 1, "failing": 1} {
		list, err = b.desk.Endpoints(b.ctx, table, []string{state}, 10)
		require.NoError(t, err)
		assert.Len(t, list, want, state)
	}
	list, err = b.desk.Endpoints(b.ctx, table, []string{"paused", "failing"}, 1)
	require.NoError(t, err)
	assert.Len(t, list, 1)
}

func TestEndpointShowsItsSettingsAndNoSecret(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.endpoint("Shop", "strict")
	b.exec(`UPDATE acme.webhook_endpoints SET custom_headers = '{"X-Key": "s3cret-header", "A": "b"}', secondary_secret_token = 's3cret-second', max_concurrency = 3,
		rate_limit_per_second = 2.5 WHERE id = $1::uuid`, id)
	s := b.subscribe(id, "order.*", `{"total": {"$gte": 5}}`)
	unusable := b.subscribe(id, "order.paid", `{"total": {"$above": 5}}`)
	b.subscribe(b.endpoint("Another", "none"), "order.*", `{}`)
	b.exec(`INSERT INTO acme.webhook_delivery_stats (webhook_endpoint_id, date_recorded, total_attempts, successful_deliveries, failed_deliveries, timeout_deliveries)
		VALUES ($1::uuid, current_date, 9, 3, 2, 4), ($1::uuid, current_date - 6, 10, 10, 0, 0), ($1::uuid, current_date - 7, 100, 0, 50, 50)`, id)
	rows := b.registry()
	x, err := b.desk.Endpoint(b.ctx, rows, rows.Routing(defaults()), id)
	require.NoError(t, err)
	assert.Equal(t, desk.Week{Attempts: 19, Delivered: 13, Failed: 6}, x.Week)
	assert.Equal(t, time.Now().UTC().Format(time.DateOnly), x.LastSuccess)
	assert.Equal(t, []string{"A", "X-Key"}, x.Settings.CustomHeaders)
	assert.True(t, x.Settings.SecondSecret)
	assert.Equal(t, 3, x.Settings.Concurrency)
	assert.InEpsilon(t, 2.5, x.Settings.Rate, 1e-9)
	b.exec(`ALTER TABLE acme.webhook_endpoints DROP CONSTRAINT webhook_endpoints_max_retry_attempts_check, ALTER max_retry_attempts TYPE int8`)
	b.exec(`UPDATE acme.webhook_endpoints SET max_retry_attempts = 4294967301 WHERE id = $1::uuid`, id)
	for text, rate := range map[string]float64{"1e400": math.MaxFloat64, "1e-400": math.SmallestNonzeroFloat64, "NaN": math.MaxFloat64} {
		b.exec(`UPDATE acme.webhook_endpoints SET rate_limit_per_second = $2::text::numeric WHERE id = $1::uuid`, id, text)
		y, err := b.desk.Endpoint(b.ctx, rows, rows.Routing(defaults()), id)
		require.NoError(t, err, text)
		assert.Equal(t, rate, y.Settings.Rate, text) //nolint:testifylint // it is exact
	}
	for i, sub := range x.Subscriptions {
		if sub.ID == unusable {
			assert.Contains(t, sub.Fault, "$above")
			x.Subscriptions = slices.Delete(x.Subscriptions, i, i+1)
			break
		}
	}
	assert.Equal(t, []desk.Subscription{{ID: s, Table: "webhook_subscriptions", EventType: "order.*", Active: true, Filter: `{"total": {"$gte": 5}}`}}, x.Subscriptions)
	text, err := json.Marshal(x)
	require.NoError(t, err)
	assert.NotContains(t, string(text), "s3cret")
	assert.NotContains(t, string(text), "user:pw")

	_, err = b.desk.Endpoint(b.ctx, rows, rows.Routing(defaults()), outbox.UUID{1})
	require.ErrorContains(t, err, "tenant acme has no endpoint")
}

func TestResumeWakesWhatWaits(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.endpoint("Shop", "none")
	b.queue(b.deliver(b.event("order.created", "{}"), id, "pending", ""), id, "'infinity'", "")
	b.exec(`UPDATE acme.webhook_endpoints SET is_active = false, disabled_at = now(), disabled_reason = 'x', paused_at = now()`)
	b.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since) VALUES ('acme', $1::uuid, now())`, id)
	resumed, err := b.desk.Resume(b.ctx, id)
	require.NoError(t, err)
	assert.True(t, resumed)
	resumed, err = b.desk.Resume(b.ctx, id)
	require.NoError(t, err)
	assert.False(t, resumed)
	list, err := b.desk.Endpoints(b.ctx, b.registry().Routing(defaults()), nil, 10)
	require.NoError(t, err)
	assert.Equal(t, desk.State{State: "active"}, desk.State{State: list[0].State.State, Reason: list[0].State.Reason, Since: list[0].State.Since, FailingSince: list[0].State.FailingSince})
	assert.Equal(t, []int{1, 0}, []int{list[0].Waiting, list[0].Parked})
}

func TestRecover(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.endpoint("Shop", "none")
	event := b.event("order.created", "{}")
	number, err := b.desk.Recover(b.ctx, id, time.Time{}, event, 12.5)
	require.NoError(t, err)
	r, err := b.desk.Recovery(b.ctx, number)
	require.NoError(t, err)
	assert.InEpsilon(t, 12.5, r.Rate, 1e-9)
	assert.Equal(t, id, r.EndpointID)
	assert.False(t, r.Begun)
	assert.True(t, r.DoneAt.IsZero())
	assert.True(t, get[bool](b, `SELECT r.since = v.occurred_at FROM outbox_relay.recoveries r, acme.webhook_events v`))

	since := time.Now().Add(-time.Hour).Truncate(time.Microsecond)
	number, err = b.desk.Recover(b.ctx, id, since, outbox.UUID{}, 0)
	require.NoError(t, err)
	b.exec(`UPDATE outbox_relay.recoveries SET upto_lsn = '0/1', scanned = 5, queued = 3, done_at = now() WHERE id = $1::bigint`, number)
	r, err = b.desk.Recovery(b.ctx, number)
	require.NoError(t, err)
	assert.True(t, since.Equal(r.Since.Time))
	assert.Zero(t, r.Rate)
	assert.True(t, r.Begun)
	assert.Equal(t, []int64{5, 3}, []int64{r.Scanned, r.Queued})
	assert.False(t, r.DoneAt.IsZero())
	rows := b.registry()
	x, err := b.desk.Endpoint(b.ctx, rows, rows.Routing(defaults()), id)
	require.NoError(t, err)
	require.Len(t, x.Recoveries, 2)
	assert.Equal(t, number, x.Recoveries[0].ID)

	_, err = b.desk.Recover(b.ctx, id, time.Time{}, outbox.UUID{1}, 0)
	require.ErrorContains(t, err, "does not exist")
	assert.Equal(t, "Name a time instead.", hint(err))
	b.exec(`DELETE FROM outbox_relay.recoveries`)
	_, err = b.desk.Recovery(b.ctx, number)
	require.ErrorContains(t, err, "the recovery is gone")
}
