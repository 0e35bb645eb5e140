package store_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

func (b *bundle) stats() store.Stats {
	b.t.Helper()
	s, err := b.store.QueueStats(b.t.Context())
	require.NoError(b.t, err)
	return s
}

// statsAndRead also says how many rows or entries of indexes were read for it. The views of the server do not count what an index alone answers, as it does where
// VACUUM has seen that everybody sees a page.
func (b *bundle) statsAndRead() (store.Stats, int) {
	b.t.Helper()
	tx, err := b.admin.Begin(b.t.Context())
	require.NoError(b.t, err)
	read := func() (n int) {
		require.NoError(b.t, tx.QueryRow(b.t.Context(), `SELECT sum(pg_stat_get_xact_tuples_returned(r))::int FROM (
			SELECT 'outbox_relay.retry_queue'::regclass UNION ALL
			SELECT indexrelid FROM pg_index WHERE indrelid = 'outbox_relay.retry_queue'::regclass) rs (r)`).Scan(&n))
		return n
	}
	before := read()
	s, err := store.ReadQueue(b.t.Context(), tx)
	require.NoError(b.t, err)
	n := read() - before
	require.NoError(b.t, tx.Rollback(b.t.Context()))
	return s, n
}

// TestStatsCountSoFarOnly: the figures are asked for every few seconds, and must not cost more the longer the queue is.
func TestStatsCountSoFarOnly(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	const insert = `INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT gen_random_uuid(), 'a', $1, %s FROM generate_series(1, $2::int) i`
	e := b.endpoint("a")
	b.exec(replaceDue(insert, "'infinity'"), e, 3)
	assert.Equal(t, []int64{3, 0, 0}, queueOf(b.stats()))
	b.exec(replaceDue(insert, "now() - interval '1 minute'"), e, 2)
	s := b.stats()
	assert.Equal(t, []int64{5, 2}, queueOf(s)[:2])
	assert.InDelta(t, time.Minute, s.OldestDue, float64(20*time.Second))

	b.exec(replaceDue(insert, "'infinity'"), e, store.QueueCountLimit+30_000)
	b.exec("ANALYZE outbox_relay.retry_queue")
	s, read := b.statsAndRead()
	assert.Equal(t, []int64{store.QueueCountLimit + 30_005, 2}, queueOf(s)[:2], "an estimate that is right after ANALYZE")
	assert.Greater(t, read, store.QueueCountLimit/2, "they are counted")
	assert.LessOrEqual(t, read, store.QueueCountLimit+100)
}

// TestStatsBesideOpenBreakers: what waits for an endpoint that only probes go to is not what the queue is late with, however much that is.
func TestStatsBesideOpenBreakers(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	const insert = `INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT gen_random_uuid(), 'a', $1, %s FROM generate_series(1, $2::int) i`
	const health = `INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, open_until) VALUES ('a', $1, now() - $2::interval, now() + $3::interval)`
	probed, open, failing, well := b.endpoint("a"), b.endpoint("a"), b.endpoint("a"), b.endpoint("a")
	b.exec(health, failing, "1 hour", nil)
	b.exec(replaceDue(insert, "now() - interval '1 minute'"), well, 3)
	b.exec(replaceDue(insert, "now() - interval '2 minutes'"), failing, 2)
	b.exec(replaceDue(insert, "now() + interval '1 hour'"), well, 4)
	same := func(total int64) {
		t.Helper()
		s := b.stats()
		assert.Equal(t, []int64{total, 5}, queueOf(s)[:2])
		assert.InDelta(t, 2*time.Minute, s.OldestDue, float64(20*time.Second))
	}
	same(9)
	b.exec(health, open, nil, "1 minute")
	same(9)
	b.exec(replaceDue(insert, "now() - interval '3 hours'"), open, 1)
	same(10)
	b.exec(health, probed, "1 hour", "-1 second")
	b.exec(replaceDue(insert, "now() - interval '4 hours'"), probed, store.QueueCountLimit+30_000)
	b.exec("VACUUM ANALYZE outbox_relay.retry_queue")
	s, read := b.statsAndRead()
	assert.Equal(t, int64(5), s.Due)
	assert.Greater(t, read, store.QueueCountLimit/2, "they are counted")
	assert.LessOrEqual(t, read, store.QueueCountLimit+100)
	same(store.QueueCountLimit + 30_010)

	b.exec("UPDATE outbox_relay.endpoint_health SET tenant = 'b'") // another tenant's endpoints with the same ids
	assert.Equal(t, int64(store.QueueCountLimit), b.stats().Due)
	assert.InDelta(t, 4*time.Hour, b.stats().OldestDue, float64(time.Minute))
}

func queueOf(s store.Stats) []int64 { return []int64{s.Queued, s.Due, int64(s.OldestDue)} }

func replaceDue(insert, due string) string { return strings.Replace(insert, "%s", due, 1) }
