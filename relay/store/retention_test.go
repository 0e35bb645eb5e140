package store_test

import (
	"bytes"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestPurgeDoesNotReadWhatIsNotOurs has 20,000 deliveries of an older dispatcher, with ids like ours, before ten old ones of the relay's and many new ones.
func TestPurgeDoesNotReadWhatIsNotOurs(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec("UPDATE outbox_relay.tenants SET since = now() - interval '150 days'")
	const insert = `INSERT INTO a.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method, relayed, completed_at)
		SELECT (lpad(to_hex((extract(epoch FROM made) * 1000)::int8), 12, '0') || '7' || substr(md5(i::text), 1, 19))::uuid, gen_random_uuid(), $1, 'success', 'u', 'POST', $4, made
		FROM generate_series(1, $2::int) i, LATERAL (SELECT now() - $3::interval + i * interval '1 s' AS made) m`
	b.exec(insert, e, 20_000, "200 days", false)
	b.exec(insert, e, 10, "149 days", true)
	b.exec(insert, e, 40_000, "30 days", true)
	b.exec("ANALYZE a.webhook_deliveries")
	db, err := store.New(t.Context(), store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	var from outbox.UUID
	for _, want := range []int{6, 4, 0} {
		n, err := db.Purge(t.Context(), "a", store.KeptDeliveries, 90*24*time.Hour, 6, &from)
		require.NoError(t, err)
		assert.Equal(t, want, n)
	}
	db.Close() // its statistics are complete when its connection has ended
	read := func() int {
		return get[int](b, `SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0)::int FROM pg_stat_all_tables WHERE schemaname = 'a' AND relname = 'webhook_deliveries'`)
	}
	require.Eventually(t, func() bool { return read() > 0 }, time.Minute, 10*time.Millisecond)
	assert.Less(t, read(), 1000)
	assert.Equal(t, 20_000, b.count("a.webhook_deliveries WHERE NOT relayed"), "what is not ours stays")
}

// TestPurgeReadsOnceWhatStays: dead letters of years may stand in front of what goes.
func TestPurgeReadsOnceWhatStays(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec("UPDATE outbox_relay.tenants SET since = now() - interval '200 days'")
	for status, ago := range map[string]string{"failed": "150 days", "success": "100 days"} {
		b.exec(`INSERT INTO a.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method, relayed, completed_at)
			SELECT (lpad(to_hex((extract(epoch FROM made) * 1000)::int8), 12, '0') || '7' || substr(md5(i::text), 1, 19))::uuid, gen_random_uuid(), $1, $2, 'u', 'POST', true, made
			FROM generate_series(1, 10000) i, LATERAL (SELECT now() - $3::interval + i * interval '1 s' AS made) m`, e, status, ago)
	}
	b.exec("ANALYZE a.webhook_deliveries")
	db := b.open()
	var from outbox.UUID
	for range 10 {
		n, err := db.Purge(t.Context(), "a", store.KeptDeliveries, 90*24*time.Hour, 1000, &from)
		require.NoError(t, err)
		require.Equal(t, 1000, n)
	}
	db.Close() // its statistics are complete when its connections have ended
	read := func() int {
		return get[int](b, `SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0)::int FROM pg_stat_all_tables WHERE schemaname = 'a' AND relname = 'webhook_deliveries'`)
	}
	require.Eventually(t, func() bool { return read() > 0 }, time.Minute, 10*time.Millisecond)
	assert.Less(t, read(), 80_000)
}

// TestPurgeLeavesWhatIsQueued: somebody has ended a delivery by hand that still waits in the queue, and a dead letter is what is being sent again.
func TestPurgeLeavesWhatIsQueued(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	d := deliver("a", b.endpoint("a"))
	d.ID = outbox.UUID{0x01, 0x90} // as if it had been made in 2024
	b.exec("UPDATE outbox_relay.tenants SET since = '2024-01-01'")
	b.record(failed(d, store.Retrying))
	b.exec("UPDATE a.webhook_deliveries SET delivery_status = 'cancelled', completed_at = now() - interval '100 days'")
	b.exec(`INSERT INTO a.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, attempts, replayed_at)
		VALUES ($1, $2, $3, 'u', 'POST', '{}', 1, now() - interval '100 days')`, d.ID, d.EventID, d.EndpointID)
	for _, want := range []int{0, 1} {
		for _, kind := range []store.Kept{store.KeptDeliveries, store.KeptDeadLetters} {
			n, err := b.store.Purge(t.Context(), "a", kind, 90*24*time.Hour, 10, new(outbox.UUID))
			require.NoError(t, err)
			assert.Equal(t, want, n, kind)
		}
		b.exec("DELETE FROM outbox_relay.retry_queue")
	}
}

// TestPurgeStatsByDaysOfUTC: they are the days of the statistics, whatever zone the server has.
func TestPurgeStatsByDaysOfUTC(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	for _, zone := range []string{"Etc/GMT-14", "Etc/GMT+12"} { // one of them has another date now
		b.exec("DO $$ BEGIN EXECUTE format('ALTER ROLE relay_%1$s IN DATABASE %1$I SET TimeZone = ''" + zone + "''', current_database()); END $$")
		b.exec(`INSERT INTO a.webhook_delivery_stats (webhook_endpoint_id, date_recorded) SELECT $1, (now() AT TIME ZONE 'UTC')::date - n FROM unnest('{2,3}'::int[]) n`, e)
		n, err := b.open().Purge(t.Context(), "a", store.KeptStats, 48*time.Hour, 10, new(outbox.UUID))
		require.NoError(t, err)
		assert.Equal(t, 1, n, zone)
		b.exec("DELETE FROM a.webhook_delivery_stats")
	}
}

// TestPurgeOfOwnTables: recoveries that have ended, and the health of endpoints that are gone, of the tenant alone (of a copied one the ids are the same), or of tenants that are gone.
func TestPurgeOfOwnTables(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	e := b.endpoint("a")
	for _, tenant := range []string{"a", "b", "gone"} {
		b.exec(`INSERT INTO outbox_relay.recoveries (tenant, endpoint_id, since, requested_at, done_at) SELECT $1, $2, now(), now() - interval '200 days', now() - ago
			FROM unnest('{100 days,95 days,80 days,NULL}'::interval[]) ago`, tenant, e)
		b.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, updated_at) SELECT $1, md5(ago::text)::uuid, now(), now() - ago FROM unnest('{2 h,3 h,30 min}'::interval[]) ago`, tenant)
	}
	b.exec("INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, updated_at) VALUES ('a', $1, now(), now() - interval '4 days')", e)
	left := func(table, tenant string) int { return b.count("outbox_relay."+table+" WHERE tenant = $1", tenant) }
	for _, tenant := range []string{"a", ""} {
		for kind, age := range map[store.Kept]time.Duration{store.KeptRecoveries: 90 * 24 * time.Hour, store.KeptHealth: time.Hour} {
			for _, want := range []int{1, 1, 0} {
				n, err := b.store.Purge(t.Context(), tenant, kind, age, 1, new(outbox.UUID))
				require.NoError(t, err)
				assert.Equal(t, want, n, "%s of %q", kind, tenant)
			}
		}
	}
	for tenant, want := range map[string][2]int{"a": {2, 2}, "b": {4, 3}, "gone": {2, 1}} {
		assert.Equal(t, want, [2]int{left("recoveries", tenant), left("endpoint_health", tenant)}, tenant)
	}
	assert.Equal(t, 1, b.count("outbox_relay.endpoint_health WHERE endpoint_id = $1", e), "the endpoint is there")
	b.exec("DROP SCHEMA b CASCADE")
	_, err := b.store.Purge(t.Context(), "b", store.KeptHealth, time.Hour, 1, new(outbox.UUID))
	require.ErrorAs(t, err, new(*store.TenantError))
}

func TestFirstID(t *testing.T) {
	t.Parallel()
	before := time.Now()
	id := outbox.NewUUID()
	after := time.Now().Add(time.Second)
	less := func(a, b outbox.UUID) bool { return bytes.Compare(a[:], b[:]) < 0 }
	assert.True(t, less(store.FirstID(before.Add(-time.Millisecond)), id))
	assert.False(t, less(id, store.FirstID(before)))
	assert.True(t, less(id, store.FirstID(after)))
	for want, at := range map[string]time.Time{
		"0190a5b2-7c1d-7000-8000-000000000000": time.UnixMilli(0x0190a5b27c1d).Add(time.Microsecond),
		"00000000-0000-7000-8000-000000000000": time.Date(1969, 1, 1, 0, 0, 0, 0, time.UTC),
		"ffffffff-ffff-7000-8000-000000000000": time.Date(11000, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		assert.Equal(t, want, store.FirstID(at).String())
	}
}
