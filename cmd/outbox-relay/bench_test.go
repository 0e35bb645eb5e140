package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// measure runs the command as a user does and returns what it measured.
func measure(t *testing.T, dsn string, args ...string) *benchReport {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary(t), append([]string{"bench", "--dsn", dsn, "-o", "json"}, args...)...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	require.NoError(t, err, "%s", &said)
	r := new(benchReport)
	require.NoError(t, json.Unmarshal(out, r))
	return r
}

func TestBench(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{Durable: true}) // its own: others would write into the log meanwhile
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	dsn := server.URL("postgres")

	r := measure(t, dsn, "--events", "300", "--tenants", "2", "--endpoints", "3", "--size", "1000")
	assert.Equal(t, 900, r.Deliveries)
	assert.Zero(t, r.Repeated)
	assert.Positive(t, r.Rate)
	assert.Positive(t, r.CPU)
	assert.Nil(t, r.Latency, "a backlog has the age that it has")
	assert.InDelta(t, 3, r.Writes, 1, "a row for each delivery, and some of the relay's own")
	assert.Greater(t, r.WAL, 3*200., "bytes of three rows")

	r = measure(t, dsn, "--events", "200", "--rate", "200", "--answer", "5ms")
	assert.Equal(t, 200, r.Deliveries)
	require.NotNil(t, r.Latency)
	assert.Positive(t, r.Latency.P50)
	assert.GreaterOrEqual(t, r.Latency.Max, r.Latency.P99)
	assert.Greater(t, r.Seconds, .5, "200 events at 200 a second; the first may have come late")
	assert.Greater(t, r.WAL, 1000., "the event itself is among it")

	config := filepath.Join(t.TempDir(), "relay.yaml")
	require.NoError(t, os.WriteFile(config, []byte("verification:\n  method: challenge\n"), 0o600))
	r = measure(t, dsn, "--events", "200", "--rate", "100", "--endpoints", "3", "--config", config)
	assert.Equal(t, 600, r.Deliveries)
	assert.Zero(t, r.Repeated, "challenges are none")

	r = measure(t, dsn, "--events", "200", "--tls")
	assert.Equal(t, 200, r.Deliveries)
	assert.Zero(t, r.Repeated)

	conn, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close(context.WithoutCancel(t.Context()))) }()
	var left int
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT (SELECT count(*) FROM pg_database WHERE datname LIKE 'outbox_relay_bench%') +
		(SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_roles WHERE rolname = $1)`, schema.RunnerRole).Scan(&left))
	assert.Zero(t, left, "databases, slots and roles")
}

// TestBenchSaysWhatFailed has a relay that cannot start.
func TestBenchSaysWhatFailed(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), binary(t), "bench", "--dsn", pgtest.Shared(t).URL("postgres"), "--events", "10")
	cmd.Env = append(cmd.Environ(), "OUTBOX_RELAY_DELIVERY_WORKERS=-1")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	assert.Contains(t, string(out), "delivery.workers: -1")
	assert.Contains(t, string(out), "the relay ended before the last delivery")
	for _, args := range [][]string{{"--events", "1"}, {"--rate", "-1"}, {"--tenants", "0"}, {"--size", "-1"}, {"--answer", "-1s"}, {"-o", "xml"}, {"--database-url", "x"}} {
		o := invoke(t, nil, append([]string{"bench"}, args...)...)
		assert.Equal(t, exitUsage, o.code, "%v: %s", args, o.err)
	}
}
