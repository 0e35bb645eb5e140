package pgtest_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// helperEnv makes the test binary start a server, print its pid and folder, and wait to be killed.
const helperEnv = "PGTEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		os.Exit(helper())
	}
	os.Exit(pgtest.Main(leakTest{m}))
}

// leakTest fails if goroutines are left while the shared server still runs: a running server must not need any, or no
// test that uses it could look for its own.
type leakTest struct{ m *testing.M }

func (l leakTest) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func helper() int {
	s, err := pgtest.Start(context.Background(), pgtest.Options{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Fprintln(os.Stdout, s.PID(), s.Dir(), s.URL("postgres"))
	<-time.After(time.Hour) // it is killed; without cgo, the runtime would call an endless wait a deadlock
	return 0
}

func TestServerEndsWithAKilledProcess(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	var (
		pid      int
		dir, url string
	)
	_, err = fmt.Sscan(line, &pid, &dir, &url)
	require.NoError(t, err)
	conn := connect(t, url)

	require.NoError(t, cmd.Process.Signal(syscall.SIGKILL))
	require.Error(t, cmd.Wait())

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err = conn.Exec(ctx, "SELECT pg_sleep(60)")
	require.Error(t, err, "the server ends the session")
	require.NoError(t, ctx.Err(), "the server ended in time")
	require.Eventually(t, func() bool {
		_, err := os.Stat(dir)
		return os.IsNotExist(err) && syscall.Kill(pid, 0) == syscall.ESRCH
	}, 30*time.Second, 10*time.Millisecond, "the postmaster ends and its folder is removed")
}

func TestLifecycle(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.Options{})
	exec1(t, s, "CREATE TABLE t AS SELECT 1 AS n")
	for _, end := range []struct {
		name string
		f    func(context.Context) error
	}{
		{"smart", func(ctx context.Context) error { return s.Stop(ctx, "smart") }},
		{"fast", func(ctx context.Context) error { return s.Stop(ctx, "fast") }},
		{"immediate", func(ctx context.Context) error { return s.Stop(ctx, "immediate") }},
		{"kill", s.Kill},
		{"restart", func(context.Context) error { return nil }},
	} {
		pid, url := s.PID(), s.URL("postgres")
		require.NoError(t, end.f(t.Context()), end.name)
		if end.name != "restart" {
			require.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH, end.name)
			_, err := pgx.Connect(t.Context(), url)
			require.Error(t, err, end.name)
			require.NoError(t, end.f(t.Context()), "%s of a server that is down", end.name)
		}
		require.NoError(t, s.Restart(t.Context()), end.name)
		require.NotEqual(t, pid, s.PID(), end.name)
		require.Equal(t, url, s.URL("postgres"), end.name)
		exec1(t, s, "SELECT n FROM t")
	}
	require.ErrorContains(t, s.Stop(t.Context(), "slow"), `"slow"`)

	dir := s.Dir()
	require.NoError(t, s.Close())
	require.NoDirExists(t, dir)
	require.NoError(t, s.Close())
}

func TestServerThatDiedByItselfIsRestarted(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.Options{})
	require.NoError(t, syscall.Kill(s.PID(), syscall.SIGKILL))
	require.NoError(t, s.Restart(t.Context()))
	exec1(t, s, "SELECT 1")
}

func TestStopGivesUpWithItsContext(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.Options{})
	conn := connect(t, s.URL("postgres"))
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, s.Stop(ctx, "smart"), context.DeadlineExceeded, "a client is still there")
	require.NoError(t, conn.Close(t.Context()))
	require.NoError(t, s.Stop(t.Context(), "smart"))
}

func TestSettings(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		options pgtest.Options
		want    map[string]string
	}{
		{"default", pgtest.Options{}, map[string]string{
			"wal_level": "logical", "max_replication_slots": "100", "max_wal_senders": "100", "max_connections": "300",
			"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off",
			"server_encoding": "UTF8", "listen_addresses": "127.0.0.1",
		}},
		{
			"durable",
			pgtest.Options{Durable: true, Config: map[string]string{"wal_level": "replica", "cluster_name": "it's"}},
			map[string]string{
				"fsync": "on", "full_page_writes": "on", "synchronous_commit": "on", "wal_level": "replica", "cluster_name": "it's",
			},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			s := start(t, test.options)
			conn := connect(t, s.URL("postgres"))
			got := map[string]string{}
			for name := range test.want {
				var value string
				require.NoError(t, conn.QueryRow(t.Context(), "SELECT current_setting($1)", name).Scan(&value))
				got[name] = value
			}
			require.Equal(t, test.want, got)
			var version int
			require.NoError(t, conn.QueryRow(t.Context(), "SELECT current_setting('server_version_num')::int / 10000").Scan(&version))
			require.Equal(t, version, s.Version())
			require.FileExists(t, filepath.Join(s.Bin(), "pg_ctl"))
		})
	}
}

func TestDataIsKeptWhereTheCallerSays(t *testing.T) {
	t.Parallel()
	data, err := os.MkdirTemp("/tmp", "pgtest-data-") // where the server's user can reach it
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(data)) })
	s := start(t, pgtest.Options{Data: data})
	require.FileExists(t, filepath.Join(data, "PG_VERSION"))
	require.NoError(t, s.Restart(t.Context()))
	exec1(t, s, "SELECT 1")
	require.NoError(t, s.Close())
	require.NoDirExists(t, s.Dir())
	require.FileExists(t, filepath.Join(data, "PG_VERSION"), "the caller's to remove")
}

func TestStartShowsTheServersLog(t *testing.T) {
	t.Parallel()
	_, err := pgtest.Start(t.Context(), pgtest.Options{Config: map[string]string{"no_such_setting": "1"}})
	require.ErrorContains(t, err, "no_such_setting")
}

func TestStartLeavesNothingBehindWhenItGivesUp(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.Options{})
	require.NoError(t, s.Stop(t.Context(), "fast"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, s.Restart(ctx), context.Canceled)
	require.NoFileExists(t, filepath.Join(s.Dir(), "data", "postmaster.pid"), "the server has ended")
}

func TestDatabase(t *testing.T) {
	t.Parallel()
	s := start(t, pgtest.Options{}) // not the shared one: other tests have databases there
	admin := connect(t, s.URL("postgres"))
	name, err := s.CreateDatabase(t.Context())
	require.NoError(t, err)
	idle := connect(t, s.URL(name))
	_, err = idle.Exec(t.Context(), "SELECT pg_create_logical_replication_slot(s, 'pgoutput') FROM unnest('{idle,active}'::text[]) s")
	require.NoError(t, err)
	_, err = idle.Exec(t.Context(), "CREATE PUBLICATION p FOR ALL TABLES")
	require.NoError(t, err)
	stream(t, s.URL(name), "active")

	require.NoError(t, s.DropDatabase(t.Context(), name))

	var databases, slots int
	require.NoError(t, admin.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM pg_database WHERE datname = $1),
		(SELECT count(*) FROM pg_replication_slots)`, name).Scan(&databases, &slots))
	require.Zero(t, databases)
	require.Zero(t, slots)
}

func TestDatabasesOfTests(t *testing.T) {
	t.Parallel()
	a, b := pgtest.Database(t), pgtest.Database(t)
	assert.NotEqual(t, a, b)
	var dropped string
	t.Run("test", func(t *testing.T) {
		dropped = pgtest.Database(t)
		_, err := connect(t, dropped).Exec(t.Context(), "CREATE TABLE mine ()")
		require.NoError(t, err)
	})
	_, err := pgx.Connect(t.Context(), dropped)
	require.ErrorContains(t, err, "does not exist")
	_, err = connect(t, a).Exec(t.Context(), "CREATE TABLE mine ()")
	require.NoError(t, err)
}

// start runs a server of the test's own.
func start(t *testing.T, o pgtest.Options) *pgtest.Server {
	t.Helper()
	s, err := pgtest.Start(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	return conn
}

func exec1(t *testing.T, s *pgtest.Server, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.URL("postgres"))
	require.NoError(t, err)
	_, err = conn.Exec(t.Context(), sql)
	require.NoError(t, err)
	require.NoError(t, conn.Close(t.Context()))
}

// stream holds a replication slot active.
func stream(t *testing.T, url, slot string) {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), url+"&replication=database")
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.WithoutCancel(t.Context())) })
	conn.Frontend().SendQuery(&pgproto3.Query{
		String: "START_REPLICATION SLOT " + slot + " LOGICAL 0/0 (proto_version '1', publication_names 'p')",
	})
	require.NoError(t, conn.Frontend().Flush())
	for {
		m, err := conn.ReceiveMessage(t.Context())
		require.NoError(t, err)
		if _, ok := m.(*pgproto3.CopyBothResponse); ok {
			return
		}
	}
}
