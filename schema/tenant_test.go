package schema_test

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
)

func TestAddTenantInTheCreatingTransaction(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, dsn := b.login("")
	role := connect(t, dsn).Config().User
	b.exec("GRANT CREATE ON DATABASE " + b.conn.Config().Database + " TO " + role)
	b.exec("GRANT USAGE ON SCHEMA outbox_relay TO " + role)
	app := connect(t, dsn)
	create := "CREATE SCHEMA acme; SELECT outbox_relay.add_tenant('acme'); INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('a.b', gen_random_uuid(), 'a')"

	_, err := app.Exec(b.ctx, "BEGIN; "+create+"; COMMIT")
	require.ErrorContains(t, err, "permission denied for function add_tenant")
	_, err = app.Exec(b.ctx, "ROLLBACK; ")
	require.NoError(t, err)

	b.exec("GRANT EXECUTE ON FUNCTION outbox_relay.add_tenant(text, text, timestamptz), outbox_relay.remove_tenant(text) TO " + role)
	before := list(b, catalog)
	_, err = app.Exec(b.ctx, "BEGIN; "+create+"; ROLLBACK")
	require.NoError(t, err)
	assert.Equal(t, before, list(b, catalog))
	assert.False(t, get[bool](b, "SELECT to_regnamespace('acme') IS NOT NULL OR EXISTS (SELECT FROM outbox_relay.tenants)"))

	_, err = app.Exec(b.ctx, "SET lock_timeout = '7s'; BEGIN; "+create+"; COMMIT")
	require.NoError(t, err)
	assert.Equal(t, []string{role}, list(b, "SELECT DISTINCT tableowner::text FROM pg_tables WHERE schemaname = 'acme'"), "the tables are the application's")
	assert.Equal(t, []string{"acme"}, list(b, "SELECT schema FROM outbox_relay.tenants"))
	// The events of the same transaction are in the log.
	// Test servers commit asynchronously, and decoding ends where the log is flushed.
	b.exec("SET synchronous_commit = on; SELECT pg_logical_emit_message(true, 'flush', '')")
	assert.Equal(t, int64(1), get[int64](b, `SELECT count(*) FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1',
		'publication_names', 'outbox_relay_events') WHERE get_byte(data, 0) = ascii('I')`, b.slot))

	var timeout string
	require.NoError(t, app.QueryRow(b.ctx, "SHOW lock_timeout").Scan(&timeout))
	assert.Equal(t, "7s", timeout)
	_, err = app.Exec(b.ctx, "BEGIN; DROP SCHEMA acme CASCADE; SELECT outbox_relay.remove_tenant('acme'); COMMIT")
	require.NoError(t, err)
	assert.Equal(t, before, list(b, catalog))
}

func TestAddTenantRefuses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	tests := []struct {
		name, tenant, setup string
		want                []string
	}{
		{"unknown schema", "nosuch", "", []string{`schema "nosuch" does not exist`, "Create it first"}},
		{"reserved", "outbox_relay", "", []string{"reserved"}},
		{"system", "pg_catalog", "", []string{"reserved"}},
		{"faults all at once", "faulty", `ALTER TABLE faulty.webhook_events DROP CONSTRAINT webhook_events_pkey CASCADE, DROP COLUMN aggregate_type, DROP COLUMN event_data;
			ALTER TABLE faulty.webhook_endpoints REPLICA IDENTITY NOTHING; ALTER TABLE faulty.webhook_deliveries ADD COLUMN shard int;
			UPDATE faulty.webhook_deliveries SET shard = 1; ALTER TABLE faulty.webhook_deliveries ALTER COLUMN shard SET NOT NULL;
			ALTER TABLE faulty.webhook_subscriptions ENABLE ROW LEVEL SECURITY; ALTER TABLE faulty.webhook_event_types ALTER COLUMN is_enabled DROP DEFAULT,
			ALTER COLUMN is_enabled TYPE text`, []string{
			"webhook_events has no primary key", "webhook_events lacks column aggregate_type", "webhook_events lacks column event_data",
			"webhook_endpoints has REPLICA IDENTITY NOTHING", "webhook_deliveries.shard is not null without a default",
			"webhook_subscriptions has row-level security", "webhook_event_types.is_enabled is text, not boolean",
		}},
		{"replica identities", "nameless", `CREATE UNIQUE INDEX by_url ON nameless.webhook_endpoints (endpoint_url, name) INCLUDE (id); ALTER TABLE nameless.webhook_endpoints
			ALTER endpoint_url SET NOT NULL, ALTER name SET NOT NULL, REPLICA IDENTITY USING INDEX by_url; ALTER TABLE nameless.webhook_event_types DROP CONSTRAINT webhook_event_types_pkey CASCADE,
			ADD PRIMARY KEY (event_type)`, []string{"webhook_endpoints has a replica identity without id", "webhook_event_types has a replica identity without id"}},
		{"a view", "viewed", "DROP TABLE viewed.webhook_events CASCADE; CREATE VIEW viewed.webhook_events AS SELECT 1 AS id", []string{"webhook_events is not an ordinary table"}},
		{"unlogged", "unlogged", "ALTER TABLE unlogged.webhook_deliveries SET UNLOGGED", []string{"webhook_deliveries is not an ordinary table"}},
	}
	for _, tt := range tests {
		if tt.setup != "" {
			b.neo(tt.tenant, 10)
			b.exec(tt.setup)
		}
		err := schema.AddTenant(b.ctx, b.dsn, tt.tenant, schema.AddOptions{})
		require.ErrorIs(t, err, schema.ErrUnfit, tt.name)
		var hint *schema.Error
		require.ErrorAs(t, err, &hint, tt.name)
		assert.NotEmpty(t, hint.Hint, tt.name)
		for _, want := range tt.want {
			require.ErrorContains(t, err, want, tt.name)
		}
	}
	assert.Empty(t, list(b, "SELECT schema FROM outbox_relay.tenants"))
	assert.Empty(t, list(b, "SELECT schemaname::text FROM pg_publication_tables WHERE schemaname <> 'outbox_relay'"))

	b.neo("large", 80_000)
	_, err := b.conn.Exec(b.ctx, "SELECT outbox_relay.add_tenant('large')")
	var pg *pgconn.PgError
	require.ErrorAs(t, err, &pg)
	assert.Contains(t, pg.Message, "too large")
	assert.Equal(t, "Run: outbox-relay tenants add 'large', which builds it concurrently.", pg.Hint)

	b.exec("SELECT pg_drop_replication_slot($1)", b.slot)
	require.ErrorIs(t, schema.AddTenant(b.ctx, b.dsn, "large", schema.AddOptions{}), schema.ErrSlotMissing)
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot}))
	require.Zero(t, get[int](b, "SELECT count(*)::int FROM pg_replication_slots WHERE slot_name = $1", b.slot), "a slot that was in use is the relay's to heal")

	require.ErrorIs(t, schema.AddTenant(b.ctx, empty(t).dsn, "x", schema.AddOptions{}), schema.ErrNotInstalled)
}

// TestRowLevelSecurity: a policy for the application's users shows the relay nothing, and nobody would miss what it does not see.
func TestRowLevelSecurity(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.neo("Acme", 10)
	b.exec(`SET search_path = "Acme"`)
	faults := func() string {
		return strings.Join(list(b, `SELECT f.fault FROM outbox_relay.tenant_faults('"Acme"'::regnamespace) f ORDER BY 1`), "\n")
	}
	b.exec(`ALTER TABLE webhook_events ENABLE ROW LEVEL SECURITY`)
	const context = ` USING (context_id = nullif(current_setting('app.context', true), '')::uuid)`
	for policy, accepted := range map[string]bool{
		context: false, " USING (true)": false, " FOR SELECT TO outbox_relay_runner USING (true)": false, " TO outbox_relay_runner USING (true)": true,
		" AS RESTRICTIVE TO outbox_relay_runner USING (true)": false,
	} {
		b.exec("CREATE POLICY one ON webhook_events" + policy)
		assert.Equal(t, accepted, faults() == "", "%s: %s", policy, faults())
		b.exec("DROP POLICY one ON webhook_events")
	}
	b.exec(`ALTER TABLE webhook_event_types ENABLE ROW LEVEL SECURITY; CREATE POLICY reads ON webhook_event_types FOR SELECT TO outbox_relay_runner USING (true)`)
	b.exec(`ALTER TABLE webhook_endpoints ENABLE ROW LEVEL SECURITY; CREATE POLICY ctx ON webhook_endpoints` + context + `; CREATE POLICY most ON webhook_endpoints AS RESTRICTIVE` + context)
	b.exec(`CREATE POLICY ctx ON webhook_events` + context + `; CREATE POLICY of_another ON webhook_events AS RESTRICTIVE TO postgres USING (false)`)
	err := schema.AddTenant(b.ctx, b.dsn, "Acme", schema.AddOptions{})
	require.ErrorIs(t, err, schema.ErrUnfit)
	remedies := regexp.MustCompile(`(?m)^webhook_\w+ has (?:row-level security and no policy for the relay: (CREATE POLICY .* USING \(true\))|the restrictive policy most, which holds for the relay: (ALTER POLICY .*) TO the roles)`).
		FindAllStringSubmatch(err.Error(), -1)
	require.Len(t, remedies, 3, "%v", err)
	for _, r := range remedies {
		if r[2] != "" {
			r[2] += " TO postgres"
		}
		b.exec(r[1] + r[2])
	}
	require.Empty(t, faults())
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "Acme", schema.AddOptions{}))
	_, dsn := b.login("IN ROLE " + schema.RunnerRole)
	relay := connect(t, dsn)
	for _, sql := range []string{
		`SELECT FROM "Acme".webhook_events`, `UPDATE "Acme".webhook_endpoints SET last_used_at = now()`, `SELECT FROM "Acme".webhook_event_types`,
		`INSERT INTO "Acme".webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('outbox_relay.news', gen_random_uuid(), 'x')`,
	} {
		tag, err := relay.Exec(b.ctx, sql)
		require.NoError(t, err, sql)
		require.Positive(t, tag.RowsAffected(), sql)
	}
}

func TestAddTenantOfOthers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.neo("theirs", 10)
	role, dsn := b.login("")
	b.exec("GRANT USAGE ON SCHEMA outbox_relay TO " + role)
	b.exec("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA outbox_relay TO " + role)
	b.exec("ALTER FUNCTION outbox_relay.add_tenant(text, text, timestamptz) OWNER TO " + role)
	err := schema.AddTenant(b.ctx, dsn, "theirs", schema.AddOptions{})
	require.ErrorIs(t, err, schema.ErrUnfit)
	require.ErrorContains(t, err, "GRANT postgres TO "+role)
}

func TestPauseAndResume(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.neo("acme", 10)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{Since: at}))
	assert.Error(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{Since: at, Unprocessed: true}))
	state := "SELECT concat_ws(' ', state, reason, backfill, backfill_from, backfill_upto IS NOT NULL, backfill_done_at IS NOT NULL) FROM outbox_relay.tenants"
	assert.Equal(t, []string{"active since t f"}, list(b, state))

	suspended, err := schema.PauseTenant(b.ctx, b.dsn, "acme", "maintenance", nil)
	require.NoError(t, err)
	assert.False(t, suspended)
	assert.Equal(t, []string{"paused maintenance since t f"}, list(b, state))
	require.NoError(t, schema.ResumeTenant(b.ctx, b.dsn, "acme", nil))
	assert.Equal(t, []string{"active since t f"}, list(b, state))

	b.exec("UPDATE outbox_relay.tenants SET state = 'suspended', backfill_from = '100:100:'")
	suspended, err = schema.PauseTenant(b.ctx, b.dsn, "acme", "", nil)
	require.NoError(t, err)
	assert.True(t, suspended)
	require.NoError(t, schema.ResumeTenant(b.ctx, b.dsn, "acme", nil))
	assert.Equal(t, []string{"active since t f"}, list(b, state), "an unfinished backfill goes on, from the start and up to now")

	b.exec("UPDATE outbox_relay.tenants SET state = 'suspended', backfill_from = '100:100:', backfill_done_at = now()")
	require.NoError(t, schema.ResumeTenant(b.ctx, b.dsn, "acme", nil))
	assert.Equal(t, []string{"active missed 100:100: t f"}, list(b, state))

	_, err = schema.PauseTenant(b.ctx, b.dsn, "nosuch", "", nil)
	require.ErrorIs(t, err, schema.ErrNotTenant)
	require.ErrorIs(t, schema.ResumeTenant(b.ctx, b.dsn, "nosuch", nil), schema.ErrNotTenant)

	b.exec("INSERT INTO outbox_relay.retry_queue VALUES (gen_random_uuid(), 'acme', gen_random_uuid(), now()), (gen_random_uuid(), 'other', gen_random_uuid(), now())")
	b.exec("INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since) VALUES ('acme', gen_random_uuid(), now()), ('other', gen_random_uuid(), now())")
	b.exec("DROP SCHEMA acme CASCADE")
	require.NoError(t, schema.RemoveTenant(b.ctx, b.dsn, "acme", nil))
	assert.Equal(t, []string{"other"}, list(b, "SELECT tenant FROM outbox_relay.retry_queue"))
	assert.Equal(t, []string{"other"}, list(b, "SELECT tenant FROM outbox_relay.endpoint_health"))
	require.ErrorIs(t, schema.RemoveTenant(b.ctx, b.dsn, "acme", nil), schema.ErrNotTenant)
}

// TestPauseOfSuspended: a pause outlasts the suspension, and only resuming ends it.
func TestPauseOfSuspended(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec("CREATE SCHEMA acme")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}))
	state := "SELECT concat_ws('|', state, coalesce(reason, '-'), coalesce(pause, '-'), coalesce(backfill, '-'), backfill_upto IS NOT NULL) FROM outbox_relay.tenants"
	suspend := func() {
		b.exec("UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'a lock', backfill = 'missed', backfill_from = '100:100:', backfill_upto = NULL, backfill_done_at = NULL")
	}
	pause := func(reason string) {
		suspended, err := schema.PauseTenant(b.ctx, b.dsn, "acme", reason, nil)
		require.NoError(t, err)
		assert.True(t, suspended)
	}
	unsuspend := func() string { return get[string](b, "SELECT coalesce(outbox_relay.unsuspend_tenant('acme'), '-')") }

	suspend()
	pause("it moves")
	assert.Equal(t, []string{"suspended|a lock|it moves|missed|f"}, list(b, state))
	tenants, err := schema.Tenants(b.ctx, b.conn)
	require.NoError(t, err)
	assert.Equal(t, []any{"suspended", "a lock", true, "it moves"}, []any{tenants[0].State, tenants[0].Reason, tenants[0].Paused, tenants[0].PauseReason})
	pause("") // again
	assert.Equal(t, "paused", unsuspend())
	assert.Equal(t, []string{"paused|it moves|-|missed|t"}, list(b, state))
	assert.Equal(t, "-", unsuspend(), "it is not suspended any more")
	assert.Equal(t, []string{"paused|it moves|-|missed|t"}, list(b, state))
	tenants, err = schema.Tenants(b.ctx, b.conn)
	require.NoError(t, err)
	assert.True(t, tenants[0].Paused)
	require.NoError(t, schema.ResumeTenant(b.ctx, b.dsn, "acme", nil))
	assert.Equal(t, []string{"active|-|-|missed|t"}, list(b, state))

	suspend()
	pause("")
	assert.Equal(t, "paused", unsuspend())
	assert.Equal(t, []string{"paused|-|-|missed|t"}, list(b, state), "nobody said why")

	suspend()
	pause("it moves")
	require.NoError(t, schema.ResumeTenant(b.ctx, b.dsn, "acme", nil))
	assert.Equal(t, []string{"active|-|-|missed|t"}, list(b, state), "resuming ends both")
	suspend()
	assert.Equal(t, "active", unsuspend())
	assert.Equal(t, []string{"active|-|-|missed|t"}, list(b, state))
	assert.Equal(t, "-", get[string](b, "SELECT coalesce(outbox_relay.unsuspend_tenant('nosuch'), '-')"))
}

func TestCandidates(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, name := range []string{"tenant_a", "tenant_b", "other"} {
		b.neo(name, 1)
	}
	b.exec("CREATE SCHEMA tenant_empty")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "tenant_b", schema.AddOptions{}))
	got, err := schema.Candidates(b.ctx, b.conn, []string{"tenant_*", "tenant_a"})
	require.NoError(t, err)
	assert.Equal(t, []string{"tenant_a"}, got)
	got, err = schema.Candidates(b.ctx, b.conn, nil)
	require.NoError(t, err)
	assert.Empty(t, got)
	_, err = schema.Candidates(b.ctx, b.conn, []string{"["})
	require.ErrorContains(t, err, `tenant pattern "["`)
}

// TestTableMadeAnewKeepsTheTenant: its row is as it was, but for the tables, which has relays load them.
func TestTableMadeAnewKeepsTheTenant(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec("CREATE SCHEMA acme")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}))
	b.exec("SELECT outbox_relay.pause_tenant('acme', 'maintenance')")
	row := "SELECT (to_jsonb(t) - 'tables')::text FROM outbox_relay.tenants t"
	before, tables := list(b, row), "SELECT tables::text FROM outbox_relay.tenants"
	made := list(b, tables)

	b.exec("SELECT outbox_relay.add_tenant('acme')")
	assert.Equal(t, made, list(b, tables), "nothing was made anew")
	b.exec(`DROP TABLE acme.webhook_subscriptions;
		DO $$ BEGIN EXECUTE (SELECT format(t.ddl, 'acme') FROM outbox_relay.tenant_tables() t WHERE t.name = 'webhook_subscriptions'); END $$;
		SELECT outbox_relay.add_tenant('acme')`)
	assert.Equal(t, before, list(b, row))
	assert.NotEqual(t, made, list(b, tables))
}

// TestWhatAnotherTableMissed: where a tenant is added again with another webhook_events, what it has missed begins at the last checkpoint of whoever reads its slot.
func TestWhatAnotherTableMissed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec("CREATE SCHEMA acme")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}))
	swap := `DROP TABLE acme.webhook_events CASCADE;
		DO $$ BEGIN EXECUTE (SELECT format(t.ddl, 'acme') FROM outbox_relay.tenant_tables() t WHERE t.name = 'webhook_events'); END $$`
	missed := func() string {
		b.exec("SELECT outbox_relay.add_tenant('acme')")
		mark := list(b, "SELECT concat_ws(' ', backfill, backfill_from) FROM outbox_relay.tenants")[0]
		b.exec("UPDATE outbox_relay.tenants SET backfill_done_at = now() WHERE backfill IS NOT NULL")
		return mark
	}
	require.Empty(t, missed(), "it is the same table")
	b.exec(swap)
	added := list(b, "SELECT added_snapshot::text FROM outbox_relay.tenants")[0]
	require.Equal(t, "missed "+added, missed(), "no checkpoint yet")

	saved := list(b, "SELECT pg_current_snapshot()::text")[0]
	b.exec("UPDATE outbox_relay.progress SET snapshot = $1::text::pg_snapshot", saved)
	b.exec("INSERT INTO outbox_relay.progress (slot) VALUES ('never_led')")
	b.exec("INSERT INTO outbox_relay.progress (slot, snapshot, updated_at) VALUES ('left_behind', $1::text::pg_snapshot, now() - interval '2 days')", added)
	b.exec("INSERT INTO outbox_relay.progress (slot, snapshot, shard) VALUES ('another_shard', $1::text::pg_snapshot, 1)", added)
	b.exec(swap)
	require.Equal(t, "missed "+saved, missed())

	// An older snapshot would not see what was committed between it and the lock.
	again := "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT outbox_relay.add_tenant('acme'); COMMIT"
	b.exec(again)
	b.exec(swap)
	_, err := b.conn.Exec(b.ctx, again)
	require.ErrorContains(t, err, "needs a READ COMMITTED transaction")
	b.exec("ROLLBACK")
}
