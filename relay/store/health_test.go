package store_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func ago(d time.Duration) time.Time { return time.Now().Add(-d) }

func (b *bundle) saveHealth(list ...store.Health) []store.Endpoint {
	b.t.Helper()
	recovered, err := b.store.SaveHealth(b.t.Context(), list)
	require.NoError(b.t, err)
	return recovered
}

func (b *bundle) troubled() []store.Trouble {
	b.t.Helper()
	list, err := b.store.Troubled(b.t.Context())
	require.NoError(b.t, err)
	return list
}

func TestHealthKeepsTheFirstFailureUntilASuccess(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	b.saveHealth(store.Health{Endpoint: e, Failing: ago(time.Hour), OpenUntil: time.Now().Add(time.Minute), LastError: "refused"})
	b.saveHealth(store.Health{Endpoint: e, Failing: ago(time.Second), LastError: "answered 500"})
	list := b.troubled()
	require.Len(t, list, 1)
	assert.InDelta(t, time.Hour, list[0].Failing, float64(time.Minute), "from the first failure to the last one known")
	assert.InDelta(t, time.Minute, list[0].OpenFor, float64(30*time.Second))
	assert.Equal(t, "answered 500", list[0].LastError)

	first, err := b.store.Warned(t.Context(), e)
	require.NoError(t, err)
	assert.True(t, first)
	first, err = b.store.Warned(t.Context(), e)
	require.NoError(t, err)
	assert.False(t, first, "one warning is enough")

	assert.Empty(t, b.saveHealth(store.Health{Endpoint: e, Succeeded: ago(2 * time.Hour)}), "a success from before the failure says nothing")
	require.Len(t, b.troubled(), 1)
	assert.Equal(t, []store.Endpoint{e}, b.saveHealth(store.Health{Endpoint: e, Succeeded: ago(0)}))
	assert.Empty(t, b.troubled())
	assert.Empty(t, b.saveHealth(store.Health{Endpoint: e, Succeeded: ago(0)}), "it recovers once")

	b.saveHealth(store.Health{Endpoint: e, Failing: ago(time.Minute)})
	assert.Empty(t, b.saveHealth(store.Health{Endpoint: e, Succeeded: ago(time.Second)}), "no warning, no news")
	assert.Empty(t, b.troubled())
}

func TestHealthOfAFailureAfterASuccessBeginsAnew(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	b.saveHealth(store.Health{Endpoint: e, Failing: ago(time.Hour)})
	b.saveHealth(store.Health{Endpoint: e, Succeeded: ago(20 * time.Second), Failing: ago(10 * time.Second)})
	list := b.troubled()
	require.Len(t, list, 1)
	assert.InDelta(t, 10*time.Second, list[0].Failing, float64(5*time.Second))
}

// TestHealthOfAnOpenBreaker: that it is open is no failure, and takes back nothing of what is known. An endpoint recovers alone.
func TestHealthOfAnOpenBreaker(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	fails, opened := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}, store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	b.saveHealth(store.Health{Endpoint: fails, Failing: ago(time.Hour), LastError: "refused"})
	b.exec("UPDATE outbox_relay.endpoint_health SET failed_at = failed_at - interval '30 min'")
	b.saveHealth(store.Health{Endpoint: fails, OpenUntil: time.Now().Add(time.Hour)}, store.Health{Endpoint: opened, OpenUntil: time.Now().Add(time.Hour)})
	list := b.troubled()
	require.Len(t, list, 2)
	for i, want := range []store.Trouble{{Endpoint: fails, Failing: 30 * time.Minute, LastError: "refused"}, {Endpoint: opened}} {
		assert.InDelta(t, want.Failing, list[i].Failing, float64(time.Minute))
		assert.InDelta(t, time.Hour, list[i].OpenFor, float64(time.Minute))
		want.Failing, want.OpenFor = list[i].Failing, list[i].OpenFor
		assert.Equal(t, want, list[i])
	}
	warned, err := b.store.Warned(t.Context(), opened)
	require.NoError(t, err)
	assert.False(t, warned, "there is nothing to warn of")
	b.saveHealth(store.Health{Endpoint: opened, Succeeded: time.Now()})
	list = b.troubled()
	require.Len(t, list, 1)
	assert.Equal(t, fails, list[0].Endpoint)
}

// TestHealthWantsFailuresToComeSteadily: that nothing was sent for days does not make an endpoint fail for days.
func TestHealthWantsFailuresToComeSteadily(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	const hour, day = time.Hour, 24 * time.Hour
	repeat := func(pause time.Duration, n int) (list []time.Duration) {
		for range n {
			list = append(list, pause)
		}
		return list
	}
	weekdays := append(append(repeat(day, 4), 64*hour), repeat(day, 4)...)
	for _, test := range []struct {
		name   string
		pauses []time.Duration // before each failure but the first
		want   time.Duration
	}{
		{"one", nil, 0},
		{"two, five days apart", []time.Duration{5 * day}, 0},
		{"two, a day apart", []time.Duration{day}, 0},
		{"two deliveries that were given up, two days apart", append(append(repeat(time.Minute, 5), 2*day), repeat(time.Minute, 5)...), 0},
		{"one a day", repeat(day, 5), 5 * day},
		{"every minute", repeat(time.Minute, 60), time.Hour},
		{"every hour, after a month of silence", append([]time.Duration{30 * day}, repeat(hour, 120)...), 5 * day},
		{"on the days of one week", repeat(day, 4), 4 * day},
		{"on those of two weeks", weekdays, 8*day + 64*hour},
		{"after a weekend", weekdays[:5], 0},
	} {
		e := store.Endpoint{Tenant: "a", ID: outbox.NewUUID()}
		b.saveHealth(store.Health{Endpoint: e, Failing: ago(time.Millisecond), LastError: "refused"})
		for _, pause := range test.pauses {
			b.exec(`UPDATE outbox_relay.endpoint_health SET failing_since = failing_since - $2::interval, failed_at = failed_at - $2::interval WHERE endpoint_id = $1`, e.ID, pause)
			b.saveHealth(store.Health{Endpoint: e, Failing: ago(time.Millisecond), LastError: "refused"})
		}
		for _, trouble := range b.troubled() {
			if trouble.Endpoint == e {
				assert.InDelta(t, test.want, trouble.Failing, float64(time.Minute), test.name)
			}
		}
	}
}

func TestDisable(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	b.saveHealth(store.Health{Endpoint: e, Failing: ago(time.Hour)})
	disabled, err := b.store.Disable(t.Context(), e, "it fails")
	require.NoError(t, err)
	assert.True(t, disabled)
	assert.Equal(t, "false|it fails|true", b.row("is_active, disabled_reason, disabled_at IS NOT NULL", "a.webhook_endpoints WHERE id = $1", e.ID))
	assert.Empty(t, b.troubled())
	disabled, err = b.store.Disable(t.Context(), e, "again")
	require.NoError(t, err)
	assert.False(t, disabled)
	b.exec("DROP SCHEMA a CASCADE")
	disabled, err = b.store.Disable(t.Context(), e, "again")
	require.NoError(t, err)
	assert.False(t, disabled)
}

func TestUsageAddsUp(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	gone := store.Endpoint{Tenant: "a", ID: outbox.NewUUID()}
	day := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	save := func(list ...*store.Usage) {
		require.NoError(t, b.store.SaveUsage(t.Context(), "a", list, nil))
	}
	save(&store.Usage{
		Endpoint: e, Day: day, Successes: 8, Failures: 1, Timeouts: 1, Total: 10 * 200 * time.Millisecond, Min: 50 * time.Millisecond, Max: time.Second,
		Errors: map[string]int64{"timeout": 1, "http_5xx": 1}, LastUsed: ago(time.Hour),
	}, &store.Usage{Endpoint: gone, Day: day, Successes: 1, LastUsed: ago(0)})
	const columns = `total_attempts, successful_deliveries, failed_deliveries, timeout_deliveries, avg_response_time_ms, min_response_time_ms,
max_response_time_ms, most_common_error_code, error_rate`
	const from = "a.webhook_delivery_stats WHERE webhook_endpoint_id = $1 AND date_recorded = '2026-03-01'"
	assert.Equal(t, "10|8|1|1|200|50|1000|http_5xx|20.00", b.row(columns, from, e.ID))
	save(&store.Usage{Endpoint: e, Day: day, Successes: 10, Total: time.Second, Min: 20 * time.Millisecond, Max: 500 * time.Millisecond, LastUsed: ago(0)})
	assert.Equal(t, "20|18|1|1|150|20|1000|http_5xx|10.00", b.row(columns, from, e.ID))
	assert.Equal(t, 1, b.count("a.webhook_delivery_stats"), "an endpoint that is gone has no statistics")

	b.exec("DROP TABLE a.webhook_delivery_stats")
	var broken *store.TenantError
	require.ErrorAs(t, b.store.SaveUsage(t.Context(), "a", []*store.Usage{{Endpoint: e, Day: day, Successes: 1, LastUsed: ago(0)}}, nil), &broken)
}

func TestLastUsedMovesOnceAMinute(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	eventType := get[outbox.UUID](b, `INSERT INTO a.webhook_event_types (event_type, category, display_name) VALUES ('x.y', 'x', 'X') RETURNING id`)
	sub := get[outbox.UUID](b, `INSERT INTO a.webhook_subscriptions (endpoint_id, event_type_id, event_type) VALUES ($1, $2, 'x.y') RETURNING id`, e.ID, eventType)
	use := func(at time.Time) (used, triggered string) {
		u := &store.Usage{Endpoint: e, Day: time.Now().UTC(), Successes: 1, LastUsed: at}
		require.NoError(t, b.store.SaveUsage(t.Context(), "a", []*store.Usage{u}, []store.Trigger{{Subscription: sub, Last: at}}))
		return b.row("last_used_at", "a.webhook_endpoints WHERE id = $1", e.ID), b.row("last_triggered_at", "a.webhook_subscriptions WHERE id = $1", sub)
	}
	used, triggered := use(ago(2 * time.Minute))
	require.NotEqual(t, "-", used)
	require.NotEqual(t, "-", triggered)
	u, tr := use(ago(10 * time.Second))
	assert.NotEqual(t, used, u)
	assert.NotEqual(t, triggered, tr)
	u2, tr2 := use(ago(0))
	assert.Equal(t, u, u2)
	assert.Equal(t, tr, tr2)
}

func TestAnnounceOnlyWhatSomebodyWants(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	eventType := get[outbox.UUID](b, `INSERT INTO a.webhook_event_types (event_type, category, display_name) VALUES ('x.y', 'x', 'X') RETURNING id`)
	announce := func(kind string, about outbox.UUID) bool {
		told, err := b.store.Announce(t.Context(), &store.News{Tenant: "a", About: about, Event: outbox.Event{
			ID: outbox.NewUUID(), Type: kind, AggregateID: e, AggregateType: "webhook_endpoint", Data: []byte(`{"n":1}`),
		}})
		require.NoError(t, err)
		return told
	}
	assert.False(t, announce("outbox_relay.endpoint.disabled", outbox.UUID{}), "nobody subscribes")
	b.exec(`INSERT INTO a.webhook_subscriptions (endpoint_id, event_type_id, event_type) VALUES ($1, $2, 'outbox_relay.endpoint.disabled')`, e, eventType)
	assert.True(t, announce("outbox_relay.endpoint.disabled", outbox.UUID{}))
	assert.False(t, announce("outbox_relay.delivery.dead", outbox.UUID{}))
	b.exec(`INSERT INTO a.webhook_subscriptions (endpoint_id, event_type_id, event_type) VALUES ($1, $2, '**')`, e, eventType)
	assert.False(t, announce("outbox_relay.delivery.dead", outbox.UUID{}), "everything means the application's events")
	b.exec(`INSERT INTO a.webhook_subscriptions (endpoint_id, event_type_id, event_type) VALUES ($1, $2, 'outbox_relay.**')`, e, eventType)
	assert.True(t, announce("outbox_relay.delivery.dead", outbox.UUID{}))
	news := get[outbox.UUID](b, "SELECT id FROM a.webhook_events WHERE event_type = 'outbox_relay.delivery.dead'")
	assert.False(t, announce("outbox_relay.delivery.dead", news), "there is no news of news")
	assert.Equal(t, 2, b.count("a.webhook_events"))
}

func TestPurgeTakesOnlyWhatIsOver(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec("UPDATE outbox_relay.tenants SET since = '2024-01-01'")
	old := func(d *store.Delivery) *store.Delivery { // as if it had been made 100 days ago
		d.ID = outbox.UUID{0x01, 0x90, 0, 0, 0, byte(b.count("a.webhook_deliveries"))}
		return d
	}
	b.record(succeeded(old(deliver("a", e))))
	b.record(failed(old(deliver("a", e)), store.Failed))
	b.record(failed(old(deliver("a", e)), store.Retrying))
	replayed := failed(old(deliver("a", e)), store.Failed)
	b.record(replayed)
	discarded := failed(old(deliver("a", e)), store.Failed)
	b.record(discarded)
	others := succeeded(old(deliver("a", e)))
	b.record(others)
	b.exec("UPDATE a.webhook_deliveries SET relayed = false WHERE id = $1", others.Delivery.ID)
	b.exec("UPDATE a.webhook_deliveries SET completed_at = now() - interval '100 days' WHERE completed_at IS NOT NULL")
	b.exec("UPDATE a.webhook_delivery_attempts SET attempted_at = now() - interval '100 days'")
	b.exec("UPDATE a.webhook_dead_letters SET dead_at = now() - interval '100 days'")
	b.exec("UPDATE a.webhook_dead_letters SET replayed_at = now() - interval '95 days' WHERE delivery_id = $1", replayed.Delivery.ID)
	b.exec("UPDATE a.webhook_dead_letters SET discarded_at = now() - interval '95 days' WHERE delivery_id = $1", discarded.Delivery.ID)
	b.exec("INSERT INTO a.webhook_delivery_stats (webhook_endpoint_id, date_recorded) VALUES ($1, now() - interval '100 days'), ($1, now())", e)
	b.record(succeeded(deliver("a", e)))
	purge := func(kind store.Kept, age time.Duration) int {
		n, err := b.store.Purge(t.Context(), "a", kind, age, 1000, new(outbox.UUID))
		require.NoError(t, err)
		return n
	}
	const day = 24 * time.Hour
	for _, kind := range []store.Kept{store.KeptDeliveries, store.KeptAttempts, store.KeptDeadLetters, store.KeptStats} {
		assert.Zero(t, purge(kind, 101*day), kind)
	}
	assert.Equal(t, 1, purge(store.KeptDeliveries, 90*day), "the success")
	assert.Equal(t, 6, b.count("a.webhook_deliveries"), "another dispatcher's stay")
	assert.Equal(t, 4, purge(store.KeptAttempts, 90*day))
	assert.Equal(t, 2, purge(store.KeptDeadLetters, 90*day), "those that were replayed or discarded")
	assert.Equal(t, 1, b.count("a.webhook_dead_letters"))
	assert.Equal(t, 1, purge(store.KeptStats, 90*day))
	assert.Zero(t, purge(store.KeptDeliveries, 90*day))
	b.exec("DELETE FROM a.webhook_endpoints")
	assert.Equal(t, 3, purge(store.KeptDeliveries, 90*day), "those that have failed, of an endpoint that is gone")
}

// TestDisableBesideALock: an endpoint that cannot be disabled now keeps its health, and is disabled later.
func TestDisableBesideALock(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	b.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, failed_at) VALUES ('a', $1, now() - interval '6 days', now())`, e.ID)
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "SELECT FROM a.webhook_endpoints WHERE id = $1 FOR UPDATE", e.ID)
	require.NoError(t, err)
	_, denied := b.store.Disable(t.Context(), e, "why")
	require.NoError(t, tx.Rollback(t.Context()))
	require.Error(t, denied)
	require.Equal(t, 1, b.count("outbox_relay.endpoint_health"))
	disabled, err := b.store.Disable(t.Context(), e, "why")
	require.NoError(t, err)
	require.True(t, disabled)
	require.Zero(t, b.count("outbox_relay.endpoint_health"))
}

// TestHealthOfTwoReplicas: what one has seen to recover the other may have seen to fail, and each writes both.
func TestHealthOfTwoReplicas(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	x, y := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}, store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	stores := []*store.Store{b.store, b.open()}
	for range 200 {
		began := time.Now()
		b.saveHealth(store.Health{Endpoint: x, Failing: began.Add(-time.Minute)}, store.Health{Endpoint: y, Failing: began.Add(-time.Minute)})
		var group errgroup.Group
		for i, e := range []store.Endpoint{x, y} {
			other := []store.Endpoint{y, x}[i]
			group.Go(func() error {
				_, err := stores[i].SaveHealth(t.Context(), []store.Health{{Endpoint: e, Succeeded: began}, {Endpoint: other, Failing: began}})
				return err
			})
		}
		require.NoError(t, group.Wait())
	}
}
