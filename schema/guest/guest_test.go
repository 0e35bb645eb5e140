package guest_test

import (
	"context"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/guest"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

const (
	begin    = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
	settings = "SELECT set_config('DateStyle', 'ISO', true), set_config('lock_timeout', $1::text, true)"
	show     = "SELECT current_setting('DateStyle') || ' ' || current_setting('lock_timeout')"
	ours     = "ISO, DMY 7s"
)

func open(t *testing.T) (*guest.Conn, *pgx.Conn) {
	t.Helper()
	cfg, err := pgx.ParseConfig(pgtest.Database(t))
	require.NoError(t, err)
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, conn.Close(context.WithoutCancel(t.Context()))) })
	_, err = conn.Exec(t.Context(), "SET DateStyle = 'German'; SET default_transaction_read_only = on; SET default_transaction_isolation = 'serializable'")
	require.NoError(t, err)
	return guest.New(conn, begin, settings, "7s"), conn
}

// left makes sure that the session is as it was.
func left(t *testing.T, conn *pgx.Conn, after string) {
	t.Helper()
	require.Equal(t, "I", string(conn.PgConn().TxStatus()), after)
	var is string
	require.NoError(t, conn.QueryRow(t.Context(), show+" || current_setting('transaction_isolation')").Scan(&is))
	require.Equal(t, "German, DMY 0serializable", is, after)
}

func TestEveryStatementHasTheSettings(t *testing.T) {
	t.Parallel()
	c, conn := open(t)
	ctx := t.Context()
	var is string
	require.NoError(t, c.QueryRow(ctx, show).Scan(&is))
	assert.Equal(t, ours, is)
	left(t, conn, "a row")

	tag, err := c.Exec(ctx, "CREATE TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED, s text DEFAULT current_setting('lock_timeout'))")
	require.NoError(t, err)
	assert.Equal(t, "CREATE TABLE", tag.String())
	tag, err = c.Exec(ctx, "INSERT INTO t SELECT generate_series(1, $1::int4)", 1000)
	require.NoError(t, err)
	assert.Equal(t, int64(1000), tag.RowsAffected())
	left(t, conn, "a statement")

	rows, err := c.Query(ctx, "SELECT DISTINCT s FROM t")
	require.NoError(t, err)
	list, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	assert.Equal(t, []string{"7s"}, list)
	left(t, conn, "rows")

	rows, err = c.Query(ctx, "SELECT n FROM t")
	require.NoError(t, err)
	require.True(t, rows.Next())
	rows.Close() // before the last one
	require.NoError(t, rows.Err())
	left(t, conn, "some of the rows")

	b := &pgx.Batch{}
	seen := 0
	for range 2 {
		b.Queue(show).QueryRow(func(row pgx.Row) error {
			seen++
			return row.Scan(&is)
		})
	}
	require.NoError(t, c.SendBatch(ctx, b).Close())
	assert.Equal(t, 2, seen)
	assert.Equal(t, ours, is)
	left(t, conn, "a batch")

	require.NoError(t, pgx.BeginFunc(ctx, c, func(pgx.Tx) error {
		if err := c.QueryRow(ctx, show).Scan(&is); err != nil {
			return err
		}
		assert.Equal(t, "T", string(conn.PgConn().TxStatus()), "a statement has ended the transaction that is under way")
		return nil
	}))
	assert.Equal(t, ours, is)
	left(t, conn, "a transaction")
}

func TestStatementsThatFail(t *testing.T) {
	t.Parallel()
	c, conn := open(t)
	ctx := t.Context()
	_, err := c.Exec(ctx, "CREATE TABLE t (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
	require.NoError(t, err)
	code := func(err error) string {
		var server *pgconn.PgError
		require.ErrorAs(t, err, &server)
		return server.Code
	}
	var n int
	assert.ErrorIs(t, c.QueryRow(ctx, "SELECT n FROM t").Scan(&n), pgx.ErrNoRows)
	left(t, conn, "no row")
	assert.Equal(t, "42P01", code(c.QueryRow(ctx, "SELECT FROM nowhere").Scan()))
	left(t, conn, "no table")
	assert.Equal(t, "22012", code(c.QueryRow(ctx, "SELECT 1 / (2 - n) FROM generate_series(1, 5) n WHERE n > $1::int4", 1).Scan(&n)))
	left(t, conn, "a value")
	assert.Error(t, c.QueryRow(ctx, "SELECT 'x'").Scan(&n))
	left(t, conn, "a value that cannot be read")
	_, err = c.Exec(ctx, "INSERT INTO t VALUES (1), (1)")
	assert.Equal(t, "23505", code(err), "what is looked at when the transaction ends")
	left(t, conn, "the end")
	assert.Equal(t, "23505", code(c.QueryRow(ctx, "INSERT INTO t VALUES (1), (1) RETURNING 1").Scan(&n)), "also after a row")
	left(t, conn, "a row and the end")
	_, err = guest.New(conn, begin, "SELECT set_config('lock_timeout', $1::text, true)", "x").Begin(ctx)
	assert.Equal(t, "22023", code(err))
	left(t, conn, "settings")
	assert.Equal(t, "22023", code(guest.New(conn, begin, "SELECT set_config('lock_timeout', $1::text, true)", "x").QueryRow(ctx, "SELECT 1").Scan(&n)))
	left(t, conn, "settings of a statement")
}
