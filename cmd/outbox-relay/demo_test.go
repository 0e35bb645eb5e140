package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// demoLeftovers lists what demos have left on a server.
func demoLeftovers(t *testing.T, dsn string) []string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close(context.WithoutCancel(t.Context()))) }()
	rows, err := conn.Query(t.Context(), `SELECT 'database ' || datname FROM pg_database WHERE datname LIKE 'outbox_relay_demo%'
		UNION ALL SELECT 'slot ' || slot_name FROM pg_replication_slots WHERE slot_name LIKE 'outbox_relay_demo%'`)
	require.NoError(t, err)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	return names
}

func TestDemo(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Shared(t).URL("postgres")
	// A role that was there stays there: the other tests of this server need it.
	execOn(t, dsn, `DO $$ BEGIN CREATE ROLE `+schema.RunnerRole+` NOLOGIN; EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$`)
	o := invoke(t, nil, "demo", "--dsn", dsn, "--events", "900", "--rate", "0", "--seed", "7")
	require.Equal(t, exitOK, o.code, "%s%s", o.out, o.err)
	assert.Empty(t, o.err)
	for _, line := range []string{
		`committed +[1-9]\d* +events`, `rolled back +[1-9]\d* `, `delivered +[1-9]\d* `, `retried +[1-9]\d* `, `dead-lettered +[1-9]\d* `,
		`lost +0 `, `ghosts +0 `, `duplicates +\d`, `bad signatures +0 `, `unrecorded +0 `,
		`events/s +[1-9]\S* `, `p50 / p99 +\S+ / \S+ ms `, `tenants: acme, globex, Initech "EU"`, `outbox-relay migrate --database-url`,
	} {
		assert.Regexp(t, `(?m)^.*`+line, o.out)
	}
	assert.NotContains(t, o.out, "\x1b", "no terminal, no control sequences")
	assert.Empty(t, demoLeftovers(t, dsn))
}

func TestInterruptedDemoLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	dsn := server.URL("postgres")
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), binary(t), "demo", "--dsn", dsn, "--events", "1000000")
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	lines, guide := bufio.NewScanner(out), ""
	for lines.Scan() && !strings.Contains(lines.Text(), "received ") {
		if _, command, ok := strings.Cut(lines.Text(), "in a second terminal: "); ok {
			guide = command
		}
	}
	require.Len(t, demoLeftovers(t, dsn), 2)

	// The command for a second terminal is one that works as it stands, but for a person to end it.
	require.Contains(t, guide, " status --watch --config ")
	shown, err := exec.CommandContext(t.Context(), "sh", "-c", strings.Replace(guide, "--watch", "-o json", 1)).Output()
	require.NoError(t, err)
	var report struct {
		Databases []struct {
			Slots []struct{ Leader *struct{ Address string } }
		}
	}
	require.NoError(t, json.Unmarshal(shown, &report), string(shown))
	require.Len(t, report.Databases, 1)
	require.Len(t, report.Databases[0].Slots, 1)
	assert.NotNil(t, report.Databases[0].Slots[0].Leader, "the relay of the demo")
	_, config, _ := strings.Cut(guide, "--config ")
	assert.FileExists(t, config)

	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	for lines.Scan() { // to the end of the process
	}
	require.NoError(t, lines.Err())
	require.Error(t, cmd.Wait())
	assert.Equal(t, exitFailure, cmd.ProcessState.ExitCode())
	assert.Equal(t, "error: interrupted\n", errOut.String())
	assert.NoFileExists(t, config)
	assert.Empty(t, demoLeftovers(t, dsn))
	execOn(t, dsn, "CREATE ROLE "+schema.RunnerRole) // it had brought this one
}

func TestDemoRefuses(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"--events 0":         "write at least 1 event",
		"--rate -1":          "a rate that is 0 or more",
		"--database-url x":   "name an existing server with --dsn",
		"--config x":         "name an existing server with --dsn",
		"--log-level loud":   "must be debug, info, warn or error",
		"--dsn postgres://[": "--dsn: is not a PostgreSQL DSN",
		"--dsn nonsense":     "--dsn: write postgres://",
	} {
		o := invoke(t, nil, append([]string{"demo"}, strings.Fields(args)...)...)
		assert.Equal(t, exitUsage, o.code, args)
		assert.Contains(t, o.err, want, args)
	}
	o := invoke(t, nil, "demo", "--dsn", "postgres://127.0.0.1:1/postgres")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "hint: check host, port and sslmode of --dsn")
}

func TestDSNOfTheDemosDatabase(t *testing.T) {
	t.Parallel()
	for _, dsn := range []string{
		"postgres://me:p%20w@db:5433/app?sslmode=disable", "postgresql://me@db:5433", "host=db port=5433 user=me dbname=app", "host=db port=5433",
	} {
		own, err := inDatabase(dsn, "demo")
		require.NoError(t, err, dsn)
		c, err := pgconn.ParseConfig(own)
		require.NoError(t, err, dsn)
		assert.Equal(t, "demo", c.Database, dsn)
		assert.Equal(t, "db", c.Host, dsn)
		assert.Equal(t, uint16(5433), c.Port, dsn)
	}
	_, err := inDatabase("postgres://me@db/?dbname=app", "demo")
	assert.Error(t, err, "it would be installed in somebody's database")
}
