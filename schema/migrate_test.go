package schema_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/schema"
)

func TestFreshTenant(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`CREATE SCHEMA acme`)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}))
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}), "again")

	assert.Equal(t, int64(12), get[int64](b, `SELECT count(*) FROM pg_tables WHERE schemaname = 'acme'`))
	assert.Equal(t, "standard", get[string](b, `INSERT INTO acme.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id)
		VALUES ('e', 'https://example.com', 's', gen_random_uuid()) RETURNING payload_format`))
	assert.True(t, get[bool](b, `INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type)
		VALUES ('order.created', gen_random_uuid(), 'order') RETURNING xid = pg_current_xact_id()`))
	assert.Equal(t, []string{
		"outbox_relay_events acme.webhook_events",
		"outbox_relay_registry acme.webhook_endpoints", "outbox_relay_registry acme.webhook_event_subscriptions",
		"outbox_relay_registry acme.webhook_event_types", "outbox_relay_registry acme.webhook_subscriptions",
		"outbox_relay_registry outbox_relay.tenants",
	}, list(b, `SELECT pubname || ' ' || schemaname || '.' || tablename FROM pg_publication_tables ORDER BY 1`))
	tenants, err := schema.Tenants(b.ctx, b.conn)
	require.NoError(t, err)
	require.Len(t, tenants, 1)
	assert.Equal(t, "active", tenants[0].State)
	assert.Equal(t, 3, tenants[0].Version)
}

func TestMigrateFromTwoReplicasAtOnce(t *testing.T) {
	t.Parallel()
	b := empty(t)
	var g errgroup.Group
	for range 3 {
		g.Go(func() error { return schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot}) })
	}
	require.NoError(t, g.Wait())
	assert.Equal(t, []string{b.slot}, list(b, "SELECT slot FROM outbox_relay.progress"))
	assert.Equal(t, int64(1), get[int64](b, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1 AND plugin = 'pgoutput'", b.slot))
}
