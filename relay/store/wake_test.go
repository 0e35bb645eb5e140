package store_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestWakesInParts: many deliveries of an endpoint are made due part by part, so that those who record others of it get a turn.
func TestWakesInParts(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	park := func(e outbox.UUID, n int, key string) {
		b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
			SELECT gen_random_uuid(), 'a', $1, 'infinity', `+key+`, '0/1', i FROM generate_series(1, $2) i`, e, n)
	}
	park(e, 12_000, "NULL")
	park(e, 12_000, "gen_random_uuid()")
	parked := func() int { return b.count("outbox_relay.retry_queue WHERE due_at = 'infinity'") }
	wake := func() (bool, error) { return b.store.Wake(t.Context(), "a", e, time.Second) }
	more := func() bool {
		t.Helper()
		more, err := wake()
		require.NoError(t, err)
		return more
	}
	require.True(t, more())
	require.Equal(t, 4000, parked())
	require.False(t, more())
	require.Zero(t, parked())

	b.exec("UPDATE outbox_relay.retry_queue SET due_at = 'infinity'")
	park(b.endpoint("a"), 15_000, "NULL")
	park(b.endpoint("a"), 15_000, "gen_random_uuid()")
	var place outbox.UUID
	wake = func() (more bool, err error) {
		place, _, err = b.store.WakeParkedHeads(t.Context(), place)
		return !place.IsZero(), err
	}
	require.True(t, more())
	require.GreaterOrEqual(t, parked(), 19_000, "several endpoints take turns as well")
	for more() {
	}
	require.Zero(t, parked())
}

// TestLooksForParkedRowsAreBounded: an endpoint that fails, and one that is paused, have thousands parked for good reason. A look reads a part of the queue, whatever
// the server has counted, and a round finds what is parked for none.
func TestLooksForParkedRowsAreBounded(t *testing.T) {
	t.Parallel()
	for counted, before := range map[string]int{"as it is": 0, "a few of each": 1000} {
		b := setup(t, "a", "b")
		fails, paused, other := b.endpoint("a"), b.endpoint("a"), b.endpoint("b")
		b.exec("UPDATE a.webhook_endpoints SET paused_at = now() WHERE id = $1", paused)
		b.exec("ALTER TABLE outbox_relay.retry_queue SET (autovacuum_enabled = false)")
		const insert = `INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
			SELECT gen_random_uuid(), $1, $2, CASE WHEN $3 AND i <= $4::int THEN now() + interval '1 hour' ELSE 'infinity' END, md5((i % $4::int)::text)::uuid, '0/1', i FROM generate_series(1, 3 * $4::int) i`
		if before > 0 {
			b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT gen_random_uuid(), 'a', gen_random_uuid(), now() + interval '1 hour' FROM generate_series(1, $1) i`, before)
			b.exec("ANALYZE outbox_relay.retry_queue")
		}
		b.exec(insert, "a", fails, true, 8000)
		b.exec(insert, "a", paused, false, 8000)
		if before == 0 {
			b.exec("VACUUM ANALYZE outbox_relay.retry_queue")
		}
		// The first of a key, one without an order, one at the end of the table, and one of another tenant.
		b.exec(`UPDATE outbox_relay.retry_queue SET due_at = 'infinity' WHERE endpoint_id = $1 AND order_n = 1`, fails)
		b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) VALUES (gen_random_uuid(), 'a', $1, 'infinity'),
			('ffffffff-ffff-ffff-ffff-ffffffffffff', 'a', $1, 'infinity'), (gen_random_uuid(), 'b', $2, 'infinity')`, fails, other)
		var place outbox.UUID
		parts, woken := 0, 0
		for parts == 0 || !place.IsZero() {
			look := func(db *store.Store) {
				next, n, err := db.WakeParkedHeads(t.Context(), place)
				require.NoError(t, err)
				place, woken, parts = next, woken+int(n), parts+1
			}
			if parts > 0 {
				look(b.store)
				continue
			}
			require.Less(t, b.readBy(look), 25_000, "counted %s", counted)
		}
		require.Equal(t, 4, woken, "counted %s", counted)
		require.Equal(t, (48_000+before+3)/5000+1, parts)
		require.Zero(t, b.count("outbox_relay.retry_queue WHERE due_at = 'infinity' AND (order_key IS NULL OR endpoint_id = $1 AND order_n = 1)", fails))
		require.Equal(t, 40_000, b.count("outbox_relay.retry_queue WHERE due_at = 'infinity'"))
	}
}

// TestFewParkedAreFoundAtOnce: where few are parked, a look goes past all others in the queue, and past none that it has no locks for.
func TestFewParkedAreFoundAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	const insert = `INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT gen_random_uuid(), 'a', `
	b.exec(insert+"$1, now() + interval '1 hour' FROM generate_series(1, 60000) i", e)
	b.exec(insert + "gen_random_uuid(), 'infinity' FROM generate_series(1, 520) i")
	var place outbox.UUID
	look := func(db *store.Store) {
		next, _, err := db.WakeParkedHeads(t.Context(), place)
		require.NoError(t, err)
		place = next
	}
	require.Less(t, b.readBy(look), 5000)
	parked := func() int { return b.count("outbox_relay.retry_queue WHERE due_at = 'infinity'") }
	require.Equal(t, 20, parked(), "it takes the locks of 500 endpoints at most")
	require.False(t, place.IsZero())
	look(b.store)
	require.Zero(t, parked())
	require.True(t, place.IsZero())

	// What somebody is writing to is left for the next time.
	b.exec("UPDATE outbox_relay.retry_queue SET due_at = 'infinity' WHERE endpoint_id <> $1", e)
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	_, err = tx.Exec(t.Context(), "UPDATE outbox_relay.retry_queue SET leased_by = leased_by WHERE delivery_id = (SELECT delivery_id FROM outbox_relay.retry_queue WHERE due_at = 'infinity' LIMIT 1)")
	require.NoError(t, err)
	look(b.store)
	look(b.store)
	require.Equal(t, 1, parked())
	require.NoError(t, tx.Rollback(t.Context()))
	look(b.store)
	require.Zero(t, parked())
}
