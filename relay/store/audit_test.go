package store_test

import (
	"strings"
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

// TestSchemaOfAnotherCluster: a schema that pg_dump has brought is told from one that has always been here by the transaction ids of its rows. All that it brought is
// queued, also what has an id that was given here between the request and the page.
func TestSchemaOfAnotherCluster(t *testing.T) {
	t.Parallel()
	b := setup(t, "moved", "here")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	const foreign = ", (pg_current_xact_id()::text::int8 + $2)::text::xid8, now() - interval '2 hours'"
	var want []outbox.UUID
	for _, ahead := range []string{"20", "1000000"} { // one that will have been given here, and one to come
		want = append(want, b.event("moved", ", xid, created_at", strings.Replace(foreign, "$2", ahead, 1)))
	}
	e := b.endpoint("moved")
	for _, tenant := range []string{"moved", "here"} {
		b.event("here", "", "")
		b.exec("SELECT outbox_relay.remove_tenant($1)", tenant)
		b.exec("SELECT outbox_relay.add_tenant($1, since => '-infinity')", tenant)
	}
	for range 50 {
		b.exec("SELECT pg_current_xact_id()")
	}
	b.event("here", "", "") // comes by the log
	b.event("moved", "", "")
	b.exec("INSERT INTO outbox_relay.recoveries (tenant, endpoint_id, since, upto) VALUES ('moved', $1, '-infinity', (SELECT backfill_upto FROM outbox_relay.tenants WHERE schema = 'moved'))", e)
	assert.Equal(t, want, b.pages(p.Epoch, "moved", 10))
	assert.Len(t, b.pages(p.Epoch, "here", 10), 2)
	assert.Equal(t, "moved", b.row("string_agg(schema, ',')", "outbox_relay.tenants WHERE restored_at IS NOT NULL"))

	page, err := b.store.RecoveryPage(t.Context(), store.Recovery{Number: get[int64](b, "SELECT id FROM outbox_relay.recoveries"), Endpoint: store.Endpoint{Tenant: "moved", ID: e}}, 10)
	require.NoError(t, err)
	var recovered []outbox.UUID
	for i := range page.Events {
		recovered = append(recovered, page.Events[i].ID)
	}
	assert.Equal(t, want, recovered)
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
