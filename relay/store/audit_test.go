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

func TestSenderOfNobody(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, err := b.store.Sender(t.Context())
	require.NoError(t, err)
	assert.Positive(t, s.Flushed)
	assert.False(t, s.Waiting)
	assert.False(t, s.Standby)
}
