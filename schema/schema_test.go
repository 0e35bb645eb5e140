package schema_test

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) {
	os.Exit(pgtest.Main(leakTest{m}))
}

// leakTest fails the run when a goroutine outlives the tests. It looks before the shared server stops.
type leakTest struct{ m *testing.M }

func (l leakTest) Run() int {
	code := l.m.Run()
	if err := goleak.Find(goleak.IgnoreTopFunction("os/exec.(*Cmd).Wait"), goleak.IgnoreAnyFunction("os.(*Process).Wait")); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// bundle is a fresh database with the relay's schema in it.
type bundle struct {
	t    *testing.T
	ctx  context.Context //nolint:containedctx // the test's own
	dsn  string
	slot string
	conn *pgx.Conn // superuser
}

func empty(t *testing.T) *bundle {
	t.Helper()
	dsn := pgtest.Database(t)
	b := &bundle{t: t, ctx: t.Context(), dsn: dsn, conn: connect(t, dsn)}
	b.slot = "s_" + b.conn.Config().Database
	return b
}

func setup(t *testing.T) *bundle {
	t.Helper()
	b := empty(t)
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot}))
	return b
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}

// login makes a role of the test's own and gives its DSN: roles belong to the cluster that all tests share.
func (b *bundle) login(attributes string) (role, dsn string) {
	b.t.Helper()
	role = "r_" + b.conn.Config().Database
	b.exec("CREATE ROLE " + role + " LOGIN " + attributes)
	b.t.Cleanup(func() {
		ctx := context.WithoutCancel(b.ctx)
		conn, err := pgx.Connect(ctx, b.dsn)
		require.NoError(b.t, err)
		_, err = conn.Exec(ctx, "REASSIGN OWNED BY "+role+" TO postgres; DROP OWNED BY "+role+"; DROP ROLE "+role)
		require.NoError(b.t, err)
		require.NoError(b.t, conn.Close(ctx))
	})
	cfg := b.conn.Config()
	return role, "postgres://" + role + "@" + cfg.Host + ":" + portString(cfg.Port) + "/" + cfg.Database + "?sslmode=disable"
}

func (b *bundle) exec(sql string, args ...any) {
	b.t.Helper()
	_, err := b.conn.Exec(b.ctx, sql, args...)
	require.NoError(b.t, err)
}

// get reads one value.
func get[T any](b *bundle, sql string, args ...any) T {
	b.t.Helper()
	rows, err := b.conn.Query(b.ctx, sql, args...)
	require.NoError(b.t, err)
	v, err := pgx.CollectExactlyOneRow(rows, pgx.RowTo[T])
	require.NoError(b.t, err)
	return v
}

// list reads one column.
func list(b *bundle, sql string, args ...any) []string {
	b.t.Helper()
	rows, err := b.conn.Query(b.ctx, sql, args...)
	require.NoError(b.t, err)
	v, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(b.t, err)
	return v
}

func portString(p uint16) string { return strconv.Itoa(int(p)) }
