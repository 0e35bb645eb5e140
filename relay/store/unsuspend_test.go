package store_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestUnsuspendTriesToRecord: a tenant whose outcomes cannot be recorded stays suspended. Resumed, it would have all that it missed sent, and lose the outcomes again.
func TestUnsuspendTriesToRecord(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	e := b.endpoint("a")
	d := deliver("a", e)
	d.EventID = b.event("a", "", "")
	rows := func() []int {
		return []int{
			b.count("a.webhook_deliveries"), b.count("a.webhook_delivery_attempts"), b.count("a.webhook_dead_letters"), b.count("outbox_relay.retry_queue"),
		}
	}
	for _, trouble := range []struct{ do, undo, code string }{
		{"ALTER TABLE a.webhook_deliveries ADD CONSTRAINT none CHECK (delivery_status <> 'success') NOT VALID", "ALTER TABLE a.webhook_deliveries DROP CONSTRAINT none", "23514"},
		{"ALTER TABLE a.webhook_delivery_attempts ADD CONSTRAINT none CHECK (response_status_code < 500)", "ALTER TABLE a.webhook_delivery_attempts DROP CONSTRAINT none", "23514"},
		{"ALTER TABLE a.webhook_dead_letters ADD CONSTRAINT none CHECK (false)", "ALTER TABLE a.webhook_dead_letters DROP CONSTRAINT none", "23514"},
	} {
		b.exec(trouble.do)
		require.NoError(t, b.store.Suspend(t.Context(), p.Epoch, "a", "lost"))
		_, err := b.store.Unsuspend(t.Context(), "a")
		requireCode(t, trouble.code, err)
		assert.Equal(t, "suspended|missed|-", b.row("state, backfill, backfill_upto", "outbox_relay.tenants"))
		b.exec(trouble.undo)
		state, err := b.store.Unsuspend(t.Context(), "a")
		require.NoError(t, err)
		assert.Equal(t, store.StateActive, state)
		assert.Equal(t, []int{0, 0, 0, 0}, rows())
	}

	// What unsuspend_tenant mends itself, it mends first.
	b.exec("ALTER TABLE a.webhook_deliveries DROP COLUMN replay")
	require.NoError(t, b.store.Suspend(t.Context(), p.Epoch, "a", "lost"))
	_, err = b.store.Unsuspend(t.Context(), "a")
	require.NoError(t, err)

	// Nothing is left to try it with.
	b.record(succeeded(d))
	require.NoError(t, b.store.Suspend(t.Context(), p.Epoch, "a", "lost"))
	b.exec("ALTER TABLE a.webhook_deliveries ADD CONSTRAINT none CHECK (false) NOT VALID")
	_, err = b.store.Unsuspend(t.Context(), "a")
	require.NoError(t, err)
	state, err := b.store.Unsuspend(t.Context(), "a")
	require.NoError(t, err)
	assert.Empty(t, state, "it is not suspended any more")
}
