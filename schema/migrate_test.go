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
	assert.Equal(t, 1, tenants[0].Version)
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

// TestMigrateBehindAReader: pg_dump holds the relay's tables for as long as it takes. A migration that has to wait for it holds nobody else up meanwhile.
func TestMigrateBehindAReader(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec("DELETE FROM outbox_relay.schema_migrations WHERE version_id >= 5")
	dump, err := connect(t, b.dsn).Begin(b.ctx)
	require.NoError(t, err)
	defer func() { _ = dump.Rollback(b.ctx) }()
	_, err = dump.Exec(b.ctx, "LOCK TABLE outbox_relay.tenants IN ACCESS SHARE MODE")
	require.NoError(t, err)
	steps, done := make(chan string, 100), make(chan error, 1)
	go func() {
		done <- schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot, Progress: func(step string) { steps <- step }})
	}()
	const again = "migrate schema outbox_relay: an open transaction holds the lock, trying again"
	for tries := 0; tries < 2; {
		select {
		case step := <-steps:
			if step == again {
				tries++
			}
		case err := <-done:
			require.Fail(t, "it has ended", "%v", err)
		}
	}
	b.exec("SET lock_timeout = '5s'")
	b.exec("UPDATE outbox_relay.tenants SET reason = NULL")
	require.NoError(t, dump.Rollback(b.ctx))
	require.NoError(t, <-done)
}

// TestMigrateWithOtherSettings has a database whose owner likes other settings.
func TestMigrateWithOtherSettings(t *testing.T) {
	t.Parallel()
	b := empty(t)
	for _, setting := range []string{"standard_conforming_strings = off", "default_transaction_isolation = ''serializable''", "default_transaction_read_only = on"} {
		b.exec("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET " + setting + "', current_database()); END $$")
	}
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot}))
	b.exec("CREATE SCHEMA acme")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{Unprocessed: true}))
	var lane string
	require.NoError(t, connect(t, b.dsn).QueryRow(b.ctx, `SELECT outbox_relay.lane('a', '9f3c1f7e-2a41-4f0e-9d3c-111111111111')::text`).Scan(&lane))
	assert.True(t, get[bool](b, `SELECT outbox_relay.lane('a', '9f3c1f7e-2a41-4f0e-9d3c-111111111111')::text = $1`, lane), "whatever the session of an application has set")
}

// TestMigrateMakesNothing: where everything is there, it needs no right to make it.
func TestMigrateMakesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	role, dsn := b.login("REPLICATION")
	b.exec("REVOKE CREATE ON DATABASE " + b.conn.Config().Database + " FROM PUBLIC")
	b.exec("ALTER SCHEMA outbox_relay OWNER TO " + role)
	b.exec(`DO $$ DECLARE what text; BEGIN FOR what IN
		SELECT 'TABLE ' || c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'outbox_relay'::regnamespace AND c.relkind = 'r'
		UNION ALL SELECT 'ROUTINE ' || p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'outbox_relay'::regnamespace LOOP
		EXECUTE 'ALTER ' || what || ' OWNER TO ` + role + `'; END LOOP; END $$`)
	require.NoError(t, schema.Migrate(b.ctx, dsn, schema.Options{Slot: b.slot}))
}

// TestTimesHaveAZone: the log says of a time without one not when it was.
func TestTimesHaveAZone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec("CREATE SCHEMA acme")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}))
	b.exec("ALTER TABLE acme.webhook_events ALTER occurred_at TYPE timestamp")
	err := schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{})
	assert.ErrorContains(t, err, "webhook_events.occurred_at is timestamp without time zone, not timestamp with time zone")
}
