package schema_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
)

// sharded is a database with two shards.
func sharded(t *testing.T, tenants ...string) *bundle {
	t.Helper()
	b := empty(t)
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot, Shards: 2}))
	for _, name := range tenants {
		b.exec("CREATE SCHEMA " + name + "; SELECT outbox_relay.add_tenant('" + name + "')")
	}
	return b
}

func TestMigrateMakesTheSlotsOfAllShards(t *testing.T) {
	t.Parallel()
	b := setup(t)
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot, Shards: 3}))
	assert.Equal(t, []string{b.slot + " 0", b.slot + "_1 1", b.slot + "_2 2"},
		list(b, "SELECT slot || ' ' || shard FROM outbox_relay.progress JOIN pg_replication_slots s ON s.slot_name = slot WHERE lsn > '0/0' ORDER BY shard"))
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot, Shards: 2}))
	assert.Equal(t, []string{b.slot, b.slot + "_1"}, list(b, "SELECT slot FROM outbox_relay.progress ORDER BY 1"))
	assert.Equal(t, int64(2), get[int64](b, "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"))

	b.exec("CREATE SCHEMA one; SELECT outbox_relay.add_tenant('one'); SELECT outbox_relay.move_tenant('one', 1)")
	err := schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot})
	require.ErrorIs(t, err, schema.ErrShardInUse)
	require.ErrorContains(t, err, "tenants move")
	b.exec("UPDATE outbox_relay.tenants SET backfill_done_at = now(); SELECT outbox_relay.move_tenant('one', 0)")
	err = schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot})
	require.ErrorIs(t, err, schema.ErrShardInUse, "what the slot still has to bring would be lost")
	b.exec("UPDATE outbox_relay.tenants SET backfill_done_at = now()")
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot}))
}

func TestOtherSlots(t *testing.T) {
	t.Parallel()
	b := sharded(t)
	others := func(slot string, shards int) (names []string) {
		list, err := schema.OtherSlots(b.ctx, b.conn, schema.Options{Slot: slot, Shards: shards})
		require.NoError(t, err)
		for _, u := range list {
			assert.Positive(t, u.Kept)
			assert.False(t, u.Read)
			names = append(names, u.Slot)
		}
		return names
	}
	assert.Empty(t, others(b.slot, 2))
	assert.Empty(t, others(b.slot, 1), "migrate drops it")
	assert.Equal(t, []string{b.slot, b.slot + "_1"}, others("another", 2))
	b.exec("SELECT pg_drop_replication_slot('" + b.slot + "')")
	assert.Equal(t, []string{b.slot + "_1"}, others("another", 1))
	b.exec("DELETE FROM outbox_relay.progress")
	assert.Empty(t, others("another", 1), "it may be of something else")
}

func TestNewTenantsGoToTheShardWithTheFewest(t *testing.T) {
	t.Parallel()
	b := sharded(t, "t1", "t2", "t3", "t4", "t5")
	shards := func() []string { return list(b, "SELECT schema || ' ' || shard FROM outbox_relay.tenants ORDER BY 1") }
	assert.Equal(t, []string{"t1 0", "t2 1", "t3 0", "t4 1", "t5 0"}, shards())
	b.exec("SELECT outbox_relay.remove_tenant('t1'), outbox_relay.remove_tenant('t3'), outbox_relay.add_tenant('t4')")
	b.exec("SELECT outbox_relay.add_tenant('t1')")
	assert.Equal(t, []string{"t1 0", "t2 1", "t4 1", "t5 0"}, shards(), "one that is there stays")
	// A schema that was made anew does not count as itself.
	b.exec("DROP SCHEMA t4 CASCADE; CREATE SCHEMA t4; SELECT outbox_relay.add_tenant('t4')")
	assert.Equal(t, []string{"t1 0", "t2 1", "t4 1", "t5 0"}, shards())
}

func TestMoveTenantMarksWhatTheOldSlotMayNotBring(t *testing.T) {
	t.Parallel()
	b := sharded(t, "one")
	b.exec("UPDATE outbox_relay.progress SET snapshot = pg_current_snapshot() WHERE shard = 0")
	b.exec("INSERT INTO one.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('a.b', gen_random_uuid(), 'a')")
	before := get[string](b, "SELECT pg_current_wal_insert_lsn()::text")
	require.NoError(t, schema.MoveTenant(b.ctx, b.dsn, "one", 1, nil))
	assert.Equal(t, []string{"1 " + b.slot + " missed t t t"}, list(b, `SELECT concat_ws(' ', t.shard, t.moved_from, t.backfill, t.moved_lsn >= '`+before+`',
		t.backfill_from::text = (SELECT p.snapshot::text FROM outbox_relay.progress p WHERE shard = 0),
		(SELECT pg_visible_in_snapshot(e.xid, t.backfill_upto) AND NOT pg_visible_in_snapshot(e.xid, t.backfill_from) FROM one.webhook_events e))
		FROM outbox_relay.tenants t`))
	assert.Empty(t, list(b, "SELECT schema FROM outbox_relay.tenants WHERE num_nonnulls(backfill_cursor, backfill_border) + num_nonnulls(backfill_done_at) > 0"))

	moved := get[string](b, "SELECT moved_lsn::text FROM outbox_relay.tenants")
	require.NoError(t, schema.MoveTenant(b.ctx, b.dsn, "one", 1, nil), "it is there")
	assert.Equal(t, moved, get[string](b, "SELECT moved_lsn::text FROM outbox_relay.tenants"))
}

func TestMoveTenantRefuses(t *testing.T) {
	t.Parallel()
	b := sharded(t, "one")
	require.ErrorIs(t, schema.MoveTenant(b.ctx, b.dsn, "nobody", 1, nil), schema.ErrNotTenant)
	for name, tt := range map[string]struct {
		before, want string
		shard        int
	}{
		"no such shard":  {"SELECT", "there is no shard 2", 2},
		"no shard below": {"SELECT", "there is no shard -1", -1},
		"suspended":      {"UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'a lock'", "is suspended: a lock", 1},
		"backfill":       {"UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_upto = pg_current_snapshot()", "still being queued", 1},
		"two slots":      {"INSERT INTO outbox_relay.progress (slot, shard) VALUES ('older', 1)", "more than one slot", 1},
		"two old slots":  {"INSERT INTO outbox_relay.progress (slot, shard) VALUES ('older', 0)", "no slot for shard 0", 1},
		"no table":       {"ALTER TABLE one.webhook_events RENAME TO away", "has no table of events", 1},
		"old snapshot":   {"SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "READ COMMITTED", 1},
	} {
		tx, err := b.conn.Begin(b.ctx)
		require.NoError(t, err)
		_, err = tx.Exec(b.ctx, tt.before)
		require.NoError(t, err, name)
		_, err = tx.Exec(b.ctx, "SELECT outbox_relay.move_tenant('one', $1)", tt.shard)
		require.ErrorContains(t, err, tt.want, name)
		require.NoError(t, tx.Rollback(b.ctx))
	}
	assert.Equal(t, "0", get[string](b, "SELECT shard::text FROM outbox_relay.tenants WHERE moved_lsn IS NULL"))
}

// An event that is written and not committed yet belongs to neither side: the move waits for it, and until then nothing has changed.
func TestMoveTenantWaitsForOpenTransactions(t *testing.T) {
	t.Parallel()
	b := sharded(t, "one")
	writer, err := connect(t, b.dsn).BeginTx(b.ctx, pgx.TxOptions{})
	require.NoError(t, err)
	_, err = writer.Exec(b.ctx, "INSERT INTO one.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('a.b', gen_random_uuid(), 'a')")
	require.NoError(t, err)
	_, err = b.conn.Exec(b.ctx, "SELECT outbox_relay.move_tenant('one', 1)")
	require.ErrorContains(t, err, "55P03")
	done := make(chan error, 1)
	go func() { done <- schema.MoveTenant(b.ctx, b.dsn, "one", 1, nil) }()
	select {
	case err := <-done:
		require.Fail(t, "it did not wait", "%v", err)
	case <-time.After(time.Second):
	}
	require.NoError(t, writer.Commit(b.ctx))
	require.NoError(t, <-done)
	assert.True(t, get[bool](b, "SELECT pg_visible_in_snapshot(e.xid, t.backfill_upto) FROM one.webhook_events e, outbox_relay.tenants t"))
}

// What comes by the slot after a move has to wait for what the slot before may still bring, whoever wakes.
func TestNothingIsWokenBeforeAMoveIsOver(t *testing.T) {
	t.Parallel()
	b := sharded(t, "one")
	const endpoint = "01890000-0000-7000-8000-000000000001"
	b.exec("SELECT outbox_relay.move_tenant('one', 1)")
	row := func(id int, lsn string) {
		b.exec("INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n) SELECT '01890000-0000-7000-8000-00000000000" +
			strconv.Itoa(id) + "', 'one', '" + endpoint + "', 'infinity', '" + endpoint + "', " + lsn + ", 1 FROM outbox_relay.tenants")
	}
	parked := func() int64 {
		return get[int64](b, "SELECT count(*) FROM outbox_relay.retry_queue WHERE due_at = 'infinity'")
	}
	row(2, "moved_lsn + 100")
	b.exec("SELECT outbox_relay.wake_next('one', ARRAY['" + endpoint + "']::uuid[], ARRAY['" + endpoint + "']::uuid[])")
	b.exec("SELECT outbox_relay.wake('one', '" + endpoint + "')")
	assert.Equal(t, int64(1), parked())
	row(1, "moved_lsn - 100") // of the slot before
	b.exec("SELECT outbox_relay.wake_next('one', ARRAY['" + endpoint + "']::uuid[], ARRAY['" + endpoint + "']::uuid[])")
	assert.Equal(t, int64(1), parked(), "the first of the key")
	b.exec("DELETE FROM outbox_relay.retry_queue WHERE due_at < 'infinity'; UPDATE outbox_relay.tenants SET backfill_done_at = now()")
	b.exec("SELECT outbox_relay.wake('one', '" + endpoint + "')")
	assert.Zero(t, parked())
}
