package relay

import (
	"context"
	"log/slog"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestSeriesGoWithTheirOwner: the database is asked who is gone.
func TestSeriesGoWithTheirOwner(t *testing.T) {
	t.Parallel()
	ctx, dsn := t.Context(), pgtest.Database(t)
	const slot = "series_go"
	require.NoError(t, schema.Migrate(ctx, dsn, schema.Options{Slot: slot}))
	conn, err := pgx.Connect(ctx, dsn)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	t.Cleanup(func() { _, _ = conn.Exec(context.Background(), `SELECT pg_drop_replication_slot($1)`, slot) })
	here := outbox.NewUUID()
	for _, sql := range []string{
		`CREATE SCHEMA acme`, `SELECT outbox_relay.add_tenant('acme')`,
		`INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id) VALUES ('` + here.String() + `', 'here', 'https://host', 'secret', gen_random_uuid())`,
	} {
		_, err := conn.Exec(ctx, sql)
		require.NoError(t, err, sql)
	}
	db, err := store.New(ctx, store.Config{URL: dsn, Slot: slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(db.Close)

	m, reg := measured(5, 5)
	for _, of := range []laneKey{{"acme", here}, {"acme", outbox.NewUUID()}, {"moved_out", outbox.NewUUID()}} {
		m.outcome(&store.Outcome{Delivery: &store.Delivery{Tenant: of.tenant, EndpointID: of.endpoint}, Status: store.Success})
	}
	require.NoError(t, m.prune(ctx, db))
	all := gathered(t, reg)
	assert.Equal(t, []laneKey{{tenant: "acme"}}, m.shares[0].owners())
	assert.Equal(t, []laneKey{{"acme", here}}, m.shares[1].owners())
	assert.Contains(t, all, "outbox_relay_tenant_deliveries_total success acme")
	assert.Contains(t, all, "outbox_relay_endpoint_deliveries_total "+here.String()+" success acme")
	for name := range all {
		assert.NotContains(t, name, "moved_out")
	}
}
