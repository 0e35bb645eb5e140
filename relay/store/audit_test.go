package store_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// The audit asks at each checkpoint which tenants have new events at all. One whose table cannot be read must not keep the others from being asked.
func TestEventful(t *testing.T) {
	t.Parallel()
	b := setup(t, "quiet", "busy", "old", "undone")
	insert := func(tenant string) {
		_, err := outbox.Insert(t.Context(), b.admin, tenant, outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order", Data: []byte("{}")})
		require.NoError(t, err)
	}
	insert("old")
	from, _, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	insert("busy")
	insert("busy")
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = outbox.Insert(t.Context(), tx, "undone", outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order", Data: []byte("{}")})
	require.NoError(t, err)
	require.NoError(t, tx.Rollback(t.Context()))
	to, _, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)

	all := []string{"quiet", "busy", "old", "undone"}
	found, err := b.store.Eventful(t.Context(), all, from, to)
	require.NoError(t, err)
	assert.Equal(t, []string{"busy"}, found)

	b.exec("DROP TABLE undone.webhook_events")
	found, err = b.store.Eventful(t.Context(), all, from, to)
	require.NoError(t, err)
	assert.Equal(t, all, found, "nobody can tell: each is looked at on its own")

	b.exec("UPDATE outbox_relay.tenants SET state = 'suspended' WHERE schema = 'busy'")
	b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed' WHERE schema = 'undone'")
	found, err = b.store.Eventful(t.Context(), all, store.Snapshot{}, to)
	require.NoError(t, err)
	assert.Equal(t, []string{"quiet", "old"}, found)
}

// TestRestoredRowsStayOld: rows that came with a restore have the transaction ids of another cluster, which this one gives again sooner or later. They were over
// before, for an audit as for a heal, whatever they have for deliveries.
func TestRestoredRowsStayOld(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	b.event("a", ", xid, created_at", ", (pg_current_xact_id()::text::int8 + 50)::text::xid8, now() - interval '2 days'")
	before, lsn, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	heal := func(restored bool, at store.Snapshot) []outbox.UUID {
		require.NoError(t, b.store.Heal(t.Context(), store.HealOptions{Epoch: p.Epoch, Snapshot: at, LSN: lsn, SystemID: "2", Restored: restored}))
		return b.pages(p.Epoch, "a", 10)
	}
	heal(true, before)
	own := b.event("a", ", occurred_at", ", now() - interval '5 days'") // as an application may date it
	for range 100 {
		b.exec("SELECT pg_current_xact_id()")
	}
	own2 := b.event("a", "", "")
	after, lsn, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)

	events, done, err := b.store.UnaccountedPage(t.Context(), store.Range{Tenant: "a", From: before, To: after}, []string{"order.created"}, false, outbox.UUID{}, 10)
	require.NoError(t, err)
	require.True(t, done)
	var found []outbox.UUID
	for i := range events {
		found = append(found, events[i].ID)
	}
	assert.ElementsMatch(t, []outbox.UUID{own, own2}, found)
	assert.ElementsMatch(t, []outbox.UUID{own, own2}, heal(false, after), "of a slot that is lost later")
}

// TestSchemaOfAnotherCluster: a schema that pg_dump has brought is told from one that has always been here by the transaction ids of its rows.
func TestSchemaOfAnotherCluster(t *testing.T) {
	t.Parallel()
	b := setup(t, "moved", "here")
	b.event("moved", ", xid", ", (pg_current_xact_id()::text::int8 + 1000000)::text::xid8")
	b.event("here", "", "")
	for _, isolation := range []string{"READ COMMITTED", "REPEATABLE READ"} {
		b.exec("SELECT outbox_relay.remove_tenant('moved'), outbox_relay.remove_tenant('here')")
		tx, err := b.admin.Begin(t.Context())
		require.NoError(t, err)
		_, err = tx.Exec(t.Context(), "SET TRANSACTION ISOLATION LEVEL "+isolation)
		require.NoError(t, err)
		_, err = tx.Exec(t.Context(), "INSERT INTO here.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('x.y', gen_random_uuid(), 'x')")
		require.NoError(t, err)
		_, err = tx.Exec(t.Context(), "SELECT outbox_relay.add_tenant('moved'), outbox_relay.add_tenant('here')")
		require.NoError(t, err)
		require.NoError(t, tx.Commit(t.Context()))
		assert.Equal(t, "moved", b.row("string_agg(schema, ',')", "outbox_relay.tenants WHERE restored_at IS NOT NULL"), isolation)
	}
}

func TestSenderOfNobody(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, err := b.store.Sender(t.Context())
	require.NoError(t, err)
	assert.Positive(t, s.Flushed)
	assert.False(t, s.Waiting)
	assert.False(t, s.Standby)
}
