package schema_test

import (
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
)

// TestRunnerMayDoItsWorkAndNoMore logs in as the running relay does.
func TestRunnerMayDoItsWorkAndNoMore(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.neo("acme", 10)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}))
	_, dsn := b.login("REPLICATION IN ROLE " + schema.RunnerRole)
	relay := connect(t, dsn)

	for _, sql := range []string{
		"SELECT * FROM acme.webhook_events", "SELECT * FROM acme.webhook_endpoints", "SELECT * FROM acme.webhook_event_types",
		"SELECT * FROM acme.webhook_subscriptions", "SELECT * FROM acme.webhook_event_subscriptions",
		"UPDATE acme.webhook_endpoints SET is_active = false, disabled_reason = 'gone', disabled_at = now(), last_used_at = now(), is_verified = true, verified_at = now()",
		"UPDATE acme.webhook_subscriptions SET last_triggered_at = now()",
		`INSERT INTO acme.webhook_deliveries (id, webhook_endpoint_id, webhook_event_id, request_url, request_method, relayed)
			SELECT gen_random_uuid(), e.id, v.id, '', 'POST', true FROM acme.webhook_endpoints e, acme.webhook_events v
			ON CONFLICT (webhook_event_id, webhook_endpoint_id) WHERE relayed DO UPDATE SET delivery_status = 'success'`,
		"UPDATE acme.webhook_deliveries SET delivery_status = 'failed'", "DELETE FROM acme.webhook_deliveries",
		`INSERT INTO acme.webhook_delivery_attempts (delivery_id, webhook_endpoint_id, attempt_number, error_class, attempted_at)
			VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'timeout', now())`, "DELETE FROM acme.webhook_delivery_attempts",
		`INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, attempts)
			VALUES (gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), '', 'POST', '{}', 3)`, "UPDATE acme.webhook_dead_letters SET replayed_at = now()",
		"UPDATE acme.webhook_delivery_stats SET total_attempts = 1",
		"UPDATE outbox_relay.progress SET epoch = 1", "SELECT outbox_relay.advance('" + b.slot + "', 1, '0/1', '0/2')",
		"INSERT INTO outbox_relay.retry_queue VALUES (gen_random_uuid(), 'acme', gen_random_uuid(), now())", "DELETE FROM outbox_relay.retry_queue",
		"INSERT INTO outbox_relay.endpoint_verification (tenant, endpoint_id) VALUES ('acme', gen_random_uuid())",
		"UPDATE outbox_relay.endpoint_verification SET tries = 1", "DELETE FROM outbox_relay.endpoint_verification",
		"UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'r', pause = '', backfill_from = pg_current_snapshot()",
		"SELECT outbox_relay.unsuspend_tenant('acme')", "SELECT outbox_relay.resume_tenant('acme')", "SELECT outbox_relay.shape_version()",
	} {
		_, err := relay.Exec(b.ctx, sql)
		require.NoError(t, err, sql)
	}

	for _, sql := range []string{
		"UPDATE acme.webhook_events SET processed_at = now()", "DELETE FROM acme.webhook_events", "SELECT * FROM acme.webhook_events FOR UPDATE",
		"UPDATE acme.webhook_endpoints SET endpoint_url = ''", "DELETE FROM acme.webhook_endpoints", "UPDATE acme.webhook_subscriptions SET is_active = false",
		"TRUNCATE acme.webhook_deliveries", "SELECT * FROM acme.event_archives",
		"INSERT INTO outbox_relay.tenants (schema, version) VALUES ('x', 1)", "DELETE FROM outbox_relay.tenants", "DELETE FROM outbox_relay.progress",
		"SELECT outbox_relay.add_tenant('acme')", "SELECT outbox_relay.remove_tenant('acme')", "SELECT outbox_relay.shape_table('acme', 'webhook_events')",
		"CREATE TABLE outbox_relay.x ()", "CREATE TABLE acme.x ()", "ALTER PUBLICATION outbox_relay_events DROP TABLE acme.webhook_events",
	} {
		_, err := relay.Exec(b.ctx, sql)
		var pg *pgconn.PgError
		require.ErrorAs(t, err, &pg, sql)
		assert.Equal(t, "42501", pg.Code, sql)
	}
}

func TestAdvance(t *testing.T) {
	t.Parallel()
	b := setup(t)
	positions := "SELECT lsn || ' ' || high_lsn FROM outbox_relay.progress"
	b.exec("UPDATE outbox_relay.progress SET epoch = 2, lsn = '0/0', high_lsn = '0/0'")
	b.exec("SELECT outbox_relay.advance($1, 2, '0/20', '0/30')", b.slot)
	b.exec("SELECT outbox_relay.advance($1, 2, '0/10', '0/40')", b.slot)
	assert.Equal(t, []string{"0/20 0/40"}, list(b, positions), "positions never go back")
	_, err := b.conn.Exec(b.ctx, "SELECT outbox_relay.advance($1, 1, '0/50', '0/50')", b.slot)
	var pg *pgconn.PgError
	require.ErrorAs(t, err, &pg)
	assert.Equal(t, "OR001", pg.Code)
	assert.Equal(t, []string{"0/20 0/40"}, list(b, positions))
}
