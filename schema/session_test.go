package schema

import (
	"context"
	"database/sql"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// left is all that a session has been told and keeps.
func left(t *testing.T, conn *pgx.Conn) (s []string) {
	t.Helper()
	require.Equal(t, "I", string(conn.PgConn().TxStatus()), "a transaction is left")
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT ARRAY(SELECT name || '=' || setting FROM pg_settings WHERE source = 'session'
		UNION ALL SELECT 'prepared ' || statement FROM pg_prepared_statements
		UNION ALL SELECT 'lock ' || locktype FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory')`).Scan(&s))
	return s
}

// TestSessionIsLeftAsItWas: a pooler in transaction mode gives it to an application next. What cannot be in a transaction has its settings all the same.
func TestSessionIsLeftAsItWas(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dsn := pgtest.Database(t)
	admin, err := dial(ctx, dsn)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, closeConn(context.WithoutCancel(ctx), admin)) })
	slot := "s_" + admin.Config().Database
	require.NoError(t, Migrate(ctx, dsn, Options{Slot: slot}))
	_, err = admin.Exec(ctx, `CREATE SCHEMA acme; CREATE SCHEMA late; SELECT outbox_relay.add_tenant('acme'); SELECT outbox_relay.add_tenant('late');
		SELECT outbox_relay.remove_tenant('acme'); SELECT outbox_relay.remove_tenant('late');
		DROP INDEX acme.webhook_events_xid_idx, late.webhook_events_xid_idx`)
	require.NoError(t, err)
	conn, err := connect(ctx, dsn)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, closeConn(context.WithoutCancel(ctx), conn.Conn())) })
	in := &installer{conn: conn, progress: func(string) {}}
	require.NoError(t, in.checkEncoding(ctx))
	require.NoError(t, in.migrateOwn(ctx, dsn))
	require.NoError(t, in.ensureSlot(ctx, slot, 0))
	require.NoError(t, in.ensureSlot(ctx, slot+"_1", 1))
	require.NoError(t, in.addTenant(ctx, "acme", AddOptions{}))
	require.NoError(t, in.leaveShards(ctx, Options{Slot: slot, Shards: 1}))
	assert.Empty(t, left(t, conn.Conn()))

	_, err = conn.Conn().Exec(ctx, "SET default_transaction_read_only = on; SET lock_timeout = '1234ms'")
	require.NoError(t, err)
	_, err = admin.Exec(ctx, "ALTER DATABASE "+admin.Config().Database+" SET default_transaction_read_only = on")
	require.NoError(t, err)
	require.NoError(t, in.addTenant(ctx, "late", AddOptions{}))
	var built bool
	require.NoError(t, admin.QueryRow(ctx, "SELECT to_regclass('late.webhook_events_xid_idx') IS NOT NULL").Scan(&built))
	assert.True(t, built)
	assert.Empty(t, left(t, conn.Conn()), "settings that were changed for an index")
}

// TestMigrationsHaveOurSettings, each for itself.
func TestMigrationsHaveOurSettings(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	cfg, err := parse(pgtest.Database(t))
	require.NoError(t, err)
	db := sql.OpenDB(connector{stdlib.GetConnector(*cfg)})
	t.Cleanup(func() { assert.NoError(t, db.Close()) })
	db.SetMaxOpenConns(1)
	const show = `SELECT current_setting('lock_timeout') || ' ' || current_setting('transaction_isolation') || ' ' || current_setting('transaction_read_only')`
	_, err = db.ExecContext(ctx, "SET default_transaction_isolation = 'serializable'; SET default_transaction_read_only = on")
	require.NoError(t, err)
	tx, err := db.BeginTx(ctx, nil)
	require.NoError(t, err)
	var is string
	require.NoError(t, tx.QueryRowContext(ctx, show).Scan(&is))
	assert.Equal(t, "300ms read committed off", is)
	require.NoError(t, tx.Commit())
	require.NoError(t, db.QueryRowContext(ctx, show).Scan(&is))
	assert.Equal(t, "0 serializable on", is)
}

// TestNobodyLendsAServersSessions: a direct connection is no pooler's.
func TestNobodyLendsAServersSessions(t *testing.T) {
	t.Parallel()
	conn, err := dial(t.Context(), pgtest.Database(t))
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, closeConn(context.WithoutCancel(t.Context()), conn)) })
	lends, err := lendsSessions(t.Context(), conn)
	require.NoError(t, err)
	assert.False(t, lends)
}

// TestInstallLockThatIsLost: it ends with its transaction, though the session goes on. That the session has ended is told.
func TestInstallLockThatIsLost(t *testing.T) {
	t.Parallel()
	l, err := takeLock(t.Context(), pgtest.Database(t), func(string) {})
	require.NoError(t, err)
	_, err = l.conn.Exec(t.Context(), "ROLLBACK")
	require.NoError(t, err)
	assert.Empty(t, left(t, l.conn))
	_, err = l.conn.Exec(t.Context(), "SELECT pg_terminate_backend(pg_backend_pid())")
	require.Error(t, err)
	assert.ErrorContains(t, l.release(t.Context()), "keep the install lock: it was lost: ")
	assert.True(t, l.conn.IsClosed())
}
