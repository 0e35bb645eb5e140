package schema_test

import (
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
)

// catalog is everything in the relay's schema and publications, by name, definition and rights.
const catalog = `
	SELECT 'function ' || pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '') FROM pg_proc p WHERE p.pronamespace = 'outbox_relay'::regnamespace
	UNION ALL SELECT 'column ' || c.relname || '.' || a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull || ' '
	    || coalesce(pg_get_expr(d.adbin, d.adrelid), '') || coalesce(a.attacl::text, '') || coalesce(col_description(c.oid, a.attnum), '')
	  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
	  WHERE c.relnamespace = 'outbox_relay'::regnamespace
	UNION ALL SELECT 'relation ' || c.relname || c.relkind::text || coalesce(c.relacl::text, '') || coalesce(c.reloptions::text, '')
	  FROM pg_class c WHERE c.relnamespace = 'outbox_relay'::regnamespace
	UNION ALL SELECT 'constraint ' || conname || pg_get_constraintdef(oid) FROM pg_constraint WHERE connamespace = 'outbox_relay'::regnamespace
	UNION ALL SELECT 'schema ' || coalesce(nspacl::text, '') FROM pg_namespace WHERE nspname = 'outbox_relay'
	UNION ALL SELECT 'publication ' || pubname || pubinsert || pubupdate || pubdelete || pubtruncate || pubviaroot FROM pg_publication
	UNION ALL SELECT 'published ' || pubname || ' ' || schemaname || '.' || tablename FROM pg_publication_tables
	UNION ALL SELECT 'version ' || version_id || is_applied FROM outbox_relay.schema_migrations
	UNION ALL SELECT 'slot ' || plugin || (p.slot IS NOT NULL) || coalesce(to_jsonb(s) ->> 'failover', '') FROM pg_replication_slots s LEFT JOIN outbox_relay.progress p ON p.slot = s.slot_name
	  WHERE s.database = current_database()
	ORDER BY 1`

func TestPrintMakesWhatMigrateMakes(t *testing.T) {
	t.Parallel()
	migrated, printed := setup(t), empty(t)
	var sql strings.Builder
	require.NoError(t, schema.Print(&sql, schema.Options{Slot: printed.slot}))
	for range 2 { // it may be run again
		_, err := printed.conn.PgConn().Exec(printed.ctx, sql.String()).ReadAll()
		require.NoError(t, err)
	}
	assert.Equal(t, list(migrated, catalog), list(printed, catalog))

	require.NoError(t, schema.Migrate(printed.ctx, printed.dsn, schema.Options{Slot: printed.slot}), "migrate accepts it")
	assert.Equal(t, list(migrated, catalog), list(printed, catalog))
}

// TestPrintAgainChangesNothing looks after each of its transactions: relays and provisioning go on meanwhile, and the next one may not come.
func TestPrintAgainChangesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var sql strings.Builder
	require.NoError(t, schema.Print(&sql, schema.Options{Slot: b.slot}))
	before := list(b, catalog)
	for part := range strings.SplitAfterSeq(sql.String(), "\nCOMMIT;\n") {
		_, err := b.conn.PgConn().Exec(b.ctx, part).ReadAll()
		require.NoError(t, err)
		now := list(b, catalog)
		for i := range min(len(now), len(before)) { // one by one: all of it is long
			require.Equal(t, before[i], now[i])
		}
		require.Len(t, now, len(before))
	}
}

// While a slot is made PostgreSQL reads what others do to the catalog, in a subtransaction, and goes on as if the caller held nothing outside of it.
func TestPrintMakesTheSlotWhileTablesAreMade(t *testing.T) {
	t.Parallel()
	b := empty(t)
	var sql strings.Builder
	require.NoError(t, schema.Print(&sql, schema.Options{Slot: b.slot}))
	older, newer, dba := connect(t, b.dsn), connect(t, b.dsn), connect(t, b.dsn)
	run := func(conn *pgx.Conn, sql string) {
		t.Helper()
		_, err := conn.Exec(b.ctx, sql)
		require.NoError(t, err)
	}
	dbaWaitsFor := func(conn *pgx.Conn) {
		t.Helper()
		require.Eventually(t, func() bool {
			return len(list(b, "SELECT '' WHERE $2::int = ANY(pg_blocking_pids($1))", dba.PgConn().PID(), conn.PgConn().PID())) > 0
		}, time.Minute, time.Millisecond)
	}

	run(older, "BEGIN; SELECT pg_current_xact_id()")
	done := make(chan error, 1)
	go func() {
		_, err := dba.PgConn().Exec(b.ctx, sql.String()).ReadAll()
		done <- err
	}()
	dbaWaitsFor(older)
	run(newer, "BEGIN; SELECT pg_current_xact_id()")
	run(older, "COMMIT")
	dbaWaitsFor(newer) // and reads from now on
	b.exec("CREATE TABLE public.made_meanwhile (id int)")
	run(newer, "COMMIT")
	require.NoError(t, <-done)
	assert.Equal(t, []string{b.slot}, list(b, "SELECT s.slot_name::text FROM pg_replication_slots s JOIN outbox_relay.progress p ON p.slot = s.slot_name"))
}
