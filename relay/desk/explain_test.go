package desk_test

import (
	"encoding/json"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func (b *bundle) explain(event, endpoint outbox.UUID) *desk.Explanation {
	b.t.Helper()
	x, err := b.again().Explain(b.ctx, b.registry(), defaults(), event, endpoint)
	require.NoError(b.t, err)
	return x
}

// read notes, as the relay does, that everything so far has been read.
func (b *bundle) read() {
	b.t.Helper()
	b.exec(`UPDATE outbox_relay.progress SET snapshot = pg_current_snapshot()`)
}

func TestExplainEveryFate(t *testing.T) {
	t.Parallel()
	b := setup(t)
	delivered, waiting, dead, filtered, cancelled := b.endpoint("a delivered", "none"), b.endpoint("b waiting", "none"), b.endpoint("c dead", "none"), b.endpoint("d filtered", "none"), b.endpoint("e cancelled", "none")
	inactive, none, other := b.endpoint("f inactive", "none"), b.endpoint("g none", "none"), b.endpoint("h other", "none")
	for _, e := range []outbox.UUID{delivered, waiting, dead, inactive} {
		b.subscribe(e, "order.*", "{}")
	}
	refused := b.subscribe(filtered, "order.created", `{"total": {"$gte": 100}}`)
	b.subscribe(other, "invoice.sent", "{}")
	b.exec(`UPDATE acme.webhook_endpoints SET is_active = false WHERE id = $1::uuid`, inactive)
	event := b.event("order.created", `{"total": "s3cret"}`)
	b.deliver(event, delivered, "success", "attempt_number = 2, completed_at = now()")
	b.queue(b.deliver(event, waiting, "retrying", "error_code = 'timeout', response_time_ms = 1"), waiting, "now() + interval '1 hour'", "")
	b.bury(b.deliver(event, dead, "failed", ""), "now()")
	b.deliver(event, cancelled, "cancelled", "error_code = 'cancelled', error_message = 'the endpoint is gone'")

	x := b.explain(event, outbox.UUID{})
	assert.Equal(t, desk.Read, x.Event.Progress, "there are deliveries")
	assert.Equal(t, 2, x.Others)
	type row struct {
		id   outbox.UUID
		fate desk.Fate
		why  string
	}
	var got []row
	for _, a := range x.Endpoints {
		got = append(got, row{a.EndpointID, a.Fate, a.Why})
	}
	assert.Equal(t, []row{
		{delivered, desk.Delivered, ""},
		{waiting, desk.Waiting, "the last attempt failed (timeout)"},
		{dead, desk.Dead, "http_5xx: answered 500"},
		{filtered, desk.Unmatched, ""},
		{cancelled, desk.Cancelled, "the endpoint is gone"},
		{inactive, desk.Unmatched, ""},
	}, got)
	assert.Equal(t, []desk.Judgement{{
		ID: refused, Table: "webhook_subscriptions", EventType: "order.created",
		Why: []string{"the filter wants total $gte 100, the event has a string there"},
	}}, x.Endpoints[3].Subscriptions)
	assert.Equal(t, []string{"its endpoint is not active"}, x.Endpoints[5].Subscriptions[0].Why)

	x = b.explain(event, other)
	require.Len(t, x.Endpoints, 1)
	assert.Equal(t, desk.Unmatched, x.Endpoints[0].Fate)
	assert.Equal(t, []string{"it is for invoice.sent"}, x.Endpoints[0].Subscriptions[0].Why)
	x = b.explain(event, none)
	assert.Equal(t, []string{"it has no subscription"}, x.Endpoints[0].Subscriptions[0].Why)
	_, err := b.desk.Explain(b.ctx, b.registry(), defaults(), event, outbox.UUID{1})
	require.ErrorContains(t, err, "tenant acme has no endpoint")

	// What died with its endpoint, of an event that is archived.
	b.exec(`DELETE FROM acme.webhook_endpoints WHERE id = $1::uuid`, dead)
	b.exec(`DELETE FROM acme.webhook_events WHERE id = $1::uuid`, event)
	x = b.explain(event, outbox.UUID{})
	assert.True(t, x.Event.Gone)
	require.Len(t, x.Endpoints, 4)
	x = b.explain(event, dead)
	assert.Equal(t, desk.Dead, x.Endpoints[0].Fate)
	_, err = b.desk.Explain(b.ctx, b.registry(), defaults(), outbox.UUID{1}, outbox.UUID{})
	require.ErrorContains(t, err, "tenant acme has no event")
	assert.Contains(t, hint(err), "rolled back")
}

func TestExplainHowFarTheRelayIs(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "none")
	b.subscribe(endpoint, "order.created", "{}")
	event := b.event("order.created", "{}")

	x := b.explain(event, endpoint)
	assert.Equal(t, desk.Unread, x.Event.Progress)
	assert.Contains(t, x.Event.ProgressText, "no relay reads the log now")
	assert.Equal(t, desk.NotRead, x.Endpoints[0].Fate)
	assert.True(t, x.Endpoints[0].Subscriptions[0].Matches)

	b.read()
	x = b.explain(event, endpoint)
	assert.Equal(t, desk.Read, x.Event.Progress)
	assert.Equal(t, desk.Missing, x.Endpoints[0].Fate)
	assert.Contains(t, x.Endpoints[0].Why, "retention has removed the delivery")
	young := b.event("order.created", "{}")
	assert.Equal(t, desk.Unread, b.explain(young, endpoint).Event.Progress)

	late := b.endpoint("Late", "none")
	b.subscribe(late, "order.created", "{}")
	b.read()
	assert.Equal(t, "the endpoint was made after the event", b.explain(event, late).Endpoints[0].Why)
	event = b.event("order.paid", "{}")
	b.subscribe(late, "order.paid", "{}")
	b.read()
	assert.Equal(t, "what matches now was subscribed after the event", b.explain(event, late).Endpoints[0].Why)

	b.exec(`SELECT pg_drop_replication_slot($1::text)`, b.slot)
	assert.Contains(t, b.explain(b.event("order.paid", "{}"), late).Event.ProgressText, fmt.Sprintf("the replication slot %q does not exist", b.slot))
	b.exec(`UPDATE outbox_relay.tenants SET shard = 1`)
	assert.Contains(t, b.explain(b.event("order.paid", "{}"), late).Event.ProgressText, fmt.Sprintf("the replication slot %q does not exist", b.slot+"_1"))
}

func TestExplainEventsOutsideTheLog(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "none")
	b.subscribe(endpoint, "order.created", "{}")
	event := b.event("order.created", "{}")
	b.exec(`UPDATE acme.webhook_events SET xid = NULL`)
	x := b.explain(event, endpoint)
	assert.Equal(t, desk.Before, x.Event.Progress)
	assert.Contains(t, x.Event.ProgressText, "before acme became a tenant")
	assert.Equal(t, desk.Missing, x.Endpoints[0].Fate)

	b.exec(`UPDATE outbox_relay.tenants SET backfill = 'since', backfill_since = now() - interval '1 hour', backfill_upto = pg_current_snapshot()`)
	x = b.explain(event, endpoint)
	assert.Equal(t, desk.Backfill, x.Event.Progress)
	assert.Equal(t, desk.NotRead, x.Endpoints[0].Fate)
	b.exec(`UPDATE outbox_relay.tenants SET backfill_done_at = now()`)
	assert.Equal(t, desk.Read, b.explain(event, endpoint).Event.Progress)
	b.exec(`UPDATE outbox_relay.tenants SET backfill_since = now() + interval '1 hour'`)
	assert.Equal(t, desk.Before, b.explain(event, endpoint).Event.Progress)

	b.exec(`UPDATE outbox_relay.tenants SET restored_at = '2026-01-02 03:04:05Z', added_snapshot = pg_current_snapshot()`)
	for _, xid := range []string{"NULL", "'3'", "'9000000000'"} { // the other cluster's: this one's may be there, or not yet
		b.exec(`UPDATE acme.webhook_events SET xid = ` + xid)
		x = b.explain(event, endpoint)
		assert.Equal(t, desk.Before, x.Event.Progress, xid)
		assert.Equal(t, "not known: its tenant came from another cluster at 2026-01-02T03:04:05Z; events from before are left out; endpoints recover --since queues such events",
			x.Event.ProgressText)
	}
	assert.Equal(t, desk.Unread, b.explain(b.event("order.created", "{}"), endpoint).Event.Progress, "it came afterwards")

	b.read()
	b.exec(`UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'a column is gone', backfill = 'missed', backfill_upto = NULL, backfill_done_at = NULL,
		backfill_from = (SELECT snapshot FROM outbox_relay.progress)`)
	missed := b.event("order.created", "{}")
	x = b.explain(missed, endpoint)
	assert.Equal(t, desk.Suspended, x.Event.Progress)
	assert.Contains(t, x.Event.ProgressText, "a column is gone")
	assert.Equal(t, desk.NotRead, x.Endpoints[0].Fate)
}

func TestEventShowsItsPayloadOnRequest(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "none")
	event := b.event("order.created", `{"total": 5}`)
	b.bury(b.deliver(event, endpoint, "failed", ""), "now()")
	x, err := b.desk.Event(b.ctx, event, false)
	require.NoError(t, err)
	assert.Empty(t, x.Data)
	assert.Equal(t, "order.created", x.Type)
	assert.Len(t, x.Deliveries, 1)
	assert.Len(t, x.DeadLetters, 1)
	x, err = b.desk.Event(b.ctx, event, true)
	require.NoError(t, err)
	assert.JSONEq(t, `{"total": 5}`, string(x.Data))
}

// TestEventOfAnAdoptedTable has values that ours would not take: an event is shown as it is sent, whatever its row is like.
func TestEventOfAnAdoptedTable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "none")
	event := b.event("order.created", "{}")
	b.exec(`ALTER TABLE acme.webhook_events ALTER aggregate_version TYPE bigint, ALTER event_type DROP NOT NULL`)
	for at, want := range map[string]time.Time{
		"'infinity'": time.Date(9999, 12, 31, 23, 59, 59, 999999000, time.UTC), "'-infinity'": time.Date(1, 1, 1, 0, 0, 0, 1000, time.UTC),
		"'20000-01-01'": time.Date(9999, 12, 31, 23, 59, 59, 999999000, time.UTC),
	} {
		b.exec(`UPDATE acme.webhook_events SET aggregate_version = 3000000000, event_type = NULL, occurred_at = ` + at)
		x, err := b.desk.Event(b.ctx, event, true)
		require.NoError(t, err, at)
		assert.Empty(t, x.Type)
		assert.Equal(t, int32(math.MaxInt32), x.Version)
		assert.Equal(t, want, x.OccurredAt.Time, at)
		_, err = json.Marshal(x)
		require.NoError(t, err, at)
		assert.Equal(t, desk.Unmatched, b.explain(event, endpoint).Endpoints[0].Fate)
	}
}

// TestExplainEveryDeferral: each reason that a relay notes is told in words.
func TestExplainEveryDeferral(t *testing.T) {
	t.Parallel()
	b := setup(t)
	event := b.event("order.created", "{}")
	reasons := make(map[outbox.UUID]string)
	for _, reason := range store.Deferrals() {
		e := b.endpoint(reason, "none")
		reasons[e] = reason
		b.queue(b.deliver(event, e, "pending", "error_code = 'deferred', error_message = '"+reason+"'"), e, "now() + interval '1 hour'", "")
	}
	x := b.explain(event, outbox.UUID{})
	require.Len(t, x.Endpoints, len(reasons))
	for _, a := range x.Endpoints {
		assert.Contains(t, a.Why, " ", reasons[a.EndpointID])
	}
}
