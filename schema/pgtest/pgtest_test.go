package pgtest_test

import (
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

func TestDatabaseIsDroppedWithItsSlots(t *testing.T) {
	t.Parallel()
	s := pgtest.Shared(t)
	var dsn string
	t.Run("user", func(t *testing.T) {
		dsn = pgtest.Database(t)
		conn, err := pgx.Connect(t.Context(), dsn)
		require.NoError(t, err)
		_, err = conn.Exec(t.Context(), "SELECT pg_create_logical_replication_slot('dropped_with_its_database', 'pgoutput')")
		require.NoError(t, err)
	})
	conn, err := pgx.Connect(t.Context(), s.URL("postgres"))
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(t.Context())) }()
	var left int
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_database WHERE datname LIKE 'db%'`).Scan(&left))
	require.Zero(t, left)
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT count(*) FROM pg_replication_slots`).Scan(&left))
	require.Zero(t, left)
}
