package relay

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/wal"
)

// TestBackfillWaitsForTheRoutingTable: who asks for older events has subscribed a moment before, which the stream has yet to bring.
func TestBackfillWaitsForTheRoutingTable(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	s.exec(`INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type) SELECT gen_random_uuid(), 'order.created', gen_random_uuid(), 'order'
		FROM generate_series(1, 3)`)
	s.exec(`INSERT INTO acme.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id) VALUES ('e', 'http://127.0.0.1:9', 'a secret of the test', gen_random_uuid())`)
	s.exec(`INSERT INTO acme.webhook_event_types (event_type, category, display_name) VALUES ('order.created', 'order', 'x')`)
	s.exec(`INSERT INTO acme.webhook_subscriptions (endpoint_id, event_type_id, event_type) SELECT e.id, t.id, t.event_type FROM acme.webhook_endpoints e, acme.webhook_event_types t`)
	s.exec(`SELECT outbox_relay.add_tenant('acme', 'unprocessed')`)
	for range 2 {
		require.NoError(t, s.fill(ctx, make(aside)))
		require.Equal(t, 1, s.count(`outbox_relay.tenants WHERE backfill IS NOT NULL AND backfill_done_at IS NULL`))
	}

	require.NoError(t, s.loadTenants(ctx)) // as the stream would have it
	var now wal.LSN
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT pg_current_wal_insert_lsn()`).Scan(&now))
	s.confirmed.Store(uint64(now))
	require.NoError(t, s.fill(ctx, make(aside)))
	require.Equal(t, 3, s.count(`acme.webhook_deliveries JOIN outbox_relay.retry_queue ON delivery_id = id`))
	require.Zero(t, s.count(`outbox_relay.tenants WHERE backfill_done_at IS NULL`))
}
