package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// A server makes a slot once all transactions have ended that were writing when it was begun. These tests have a server of their own, as they would hold up
// the slots of others.

// unhealed is a site whose slot is gone while a transaction is open.
func unhealed(ctx context.Context, t *testing.T) (s *site, writer *pgx.Conn) {
	t.Helper()
	server, err := pgtest.Start(ctx, pgtest.Options{Config: map[string]string{"max_prepared_transactions": "2"}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s = newSiteOn(t, server.URL("postgres"), "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme")
	s.asRunner(t)
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	_, exit := p.stop(t)
	require.NoError(t, exit)
	s.exec(t, "SELECT pg_drop_replication_slot($1)", s.slot)
	cfg, err := pgx.ParseConfig(s.dsn)
	require.NoError(t, err)
	cfg.RuntimeParams["application_name"] = "nightly report"
	cfg.User = "runner_" + s.slot // of another role the relay's may not know since when
	writer, err = pgx.ConnectConfig(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(func() { _ = writer.Close(context.WithoutCancel(ctx)) })
	_, err = writer.Exec(ctx, "BEGIN; SELECT pg_current_xact_id()")
	require.NoError(t, err)
	return s, writer
}

// makers are the server processes that make the slot.
func (s *site) makers(ctx context.Context, t *testing.T) (pids []int32) {
	t.Helper()
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT coalesce(array_agg(active_pid), '{}') FROM pg_replication_slots
		WHERE slot_name = $1 AND active AND confirmed_flush_lsn IS NULL`, s.slot).Scan(&pids))
	return pids
}

// awaitMaker waits until the slot is being made.
func (s *site) awaitMaker(ctx context.Context, t *testing.T) (pid int32) {
	t.Helper()
	s.receiver.await(ctx, t, "the making of the slot", func() bool {
		pids := s.makers(ctx, t)
		if len(pids) > 0 {
			pid = pids[0]
		}
		return pid != 0
	})
	return pid
}

// TestHealSaysWhatItWaitsFor: /readyz, status, check and the log name the transactions, prepared ones too, and what ends them.
func TestHealSaysWhatItWaitsFor(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s, writer := unhealed(ctx, t)
	s.exec(t, "BEGIN; SELECT pg_current_xact_id(); PREPARE TRANSACTION 'it''s two-fold'")
	listen := "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0"
	a := startBinary(t, binary(t), s.config, listen)
	maker := s.awaitMaker(ctx, t)
	b := startBinary(t, binary(t), s.config, listen)
	process := fmt.Sprintf("server process %d", writer.PgConn().PID())
	waits := process + ` since \S+ \(idle in transaction, application "nightly report", role "runner_\S+", database "postgres"\)`
	prepared := `prepared transaction "it's two-fold" since \S+ in database "postgres"`
	a.awaitReady(ctx, t, s, http.StatusServiceUnavailable, `healing: .* does not exist; server process `+fmt.Sprint(maker)+` is making it since \S+, a relay is healing as server process \d+, `+
		`which waits for transactions that are open: (`+waits+`; `+prepared+`|`+prepared+`; `+waits+`)$`)
	b.awaitReady(ctx, t, s, http.StatusOK, `standing by: no relay leads slot ".*": server process `+fmt.Sprint(maker)+` is making it since .*: .*`+waits)
	told := `"msg":"healing goes on, and no relay leads until the slot is made"`
	s.receiver.await(ctx, t, "the log", func() bool { return strings.Contains(a.said(t), told) })
	assert.Contains(t, a.said(t), "let it end, or end it: ")

	out, _, code := s.desk(t, "check")
	assert.Equal(t, exitFailure, code)
	assert.Regexp(t, `(?m)^FAIL  slot \S+: no relay leads: server process \d+ is making it .*`+waits+`.* → let it end, or end it: (SELECT pg_terminate_backend\(\d+\)|ROLLBACK PREPARED 'it''s two-fold')$`, out)
	assert.Regexp(t, `(?m)^FAIL  slot .*`+prepared, out)
	out, _, code = s.desk(t, "status")
	assert.Zero(t, code)
	assert.Regexp(t, fmt.Sprintf(`(?m)^ *leader +nobody: server process %d is making it since \S+, a relay is healing as server process \d+$`, maker), out)
	assert.Regexp(t, `(?m)^ *waits for +`+waits+`; to end it: SELECT pg_terminate_backend\(\d+\)$`, out)
	assert.Regexp(t, `(?m)^ *waits for +`+prepared+`; to end it: ROLLBACK PREPARED 'it''s two-fold'$`, out)
	assert.NotContains(t, out, "0 B unconfirmed")

	b.awaitReady(ctx, t, s, http.StatusServiceUnavailable, `no relay leads slot `)
	assert.Contains(t, b.said(t), `"msg":"no relay leads until the slot is made"`)
	assert.LessOrEqual(t, strings.Count(a.said(t), told), 2, "more than once a minute")
	s.exec(t, "SELECT pg_terminate_backend($1::int4)", writer.PgConn().PID())
	s.exec(t, "ROLLBACK PREPARED 'it''s two-fold'")
	a.awaitReady(ctx, t, s, http.StatusOK, "(leading|standing by: another relay leads)")
	b.awaitReady(ctx, t, s, http.StatusOK, "(leading|standing by: another relay leads)")
	assert.Equal(t, 1, strings.Count(a.said(t)+b.said(t), `"msg":"healed`))
}

// TestHealerThatEnds: the server does not go on with what a relay has begun that was stopped or killed, so that the next one may begin.
func TestHealerThatEnds(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s, writer := unhealed(ctx, t)
	for range 10 {
		p := startRelay(t, s.config)
		s.awaitMaker(ctx, t)
		_, exit := p.stop(t)
		require.NoError(t, exit)
		require.Empty(t, s.makers(ctx, t), "a stopped relay left one")
	}
	p := startRelay(t, s.config)
	maker := s.awaitMaker(ctx, t)
	p.kill(t)
	next := startRelay(t, s.config)
	s.receiver.await(ctx, t, "another process to make the slot", func() bool {
		pids := s.makers(ctx, t)
		return len(pids) == 1 && pids[0] != maker
	})
	_, err := writer.Exec(ctx, "COMMIT")
	require.NoError(t, err)
	s.receiver.await(ctx, t, "a leader", func() bool { return strings.Contains(next.said(t), `"msg":"leading"`) })
	require.Contains(t, next.said(t), `"msg":"healed`)
}

// TestHealerThatFreezes: another relay heals once the server has taken the lock from one that does not keep it, and that one finds out.
func TestHealerThatFreezes(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s, writer := unhealed(ctx, t)
	a := startBinary(t, binary(t), s.config, "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0")
	s.awaitMaker(ctx, t)
	healing := func() (pid int) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT coalesce(min(l.pid), 0) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
			WHERE l.locktype = 'advisory' AND l.granted AND a.state = 'idle in transaction'`).Scan(&pid))
		return pid
	}
	first := healing()
	require.NotZero(t, first)
	// Frozen, with the slot made meanwhile.
	require.NoError(t, a.cmd.Process.Signal(syscall.SIGSTOP))
	_, err := writer.Exec(ctx, "COMMIT")
	require.NoError(t, err)
	s.receiver.await(ctx, t, "the slot", func() bool { return len(s.makers(ctx, t)) == 0 })
	b := startBinary(t, binary(t), s.config, "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0")
	b.awaitReady(ctx, t, s, http.StatusOK, `standing by: no relay leads slot .*: a relay is healing as server process `+fmt.Sprint(first))
	require.NotContains(t, b.said(t), "another relay leads")
	require.LessOrEqual(t, strings.Count(b.said(t), "no relay leads"), 2, "it is told once, and once a minute")
	require.NotContains(t, b.said(t), "replication started")
	s.exec(t, "SELECT pg_terminate_backend($1)", first) // as the server does after a minute
	b.awaitReady(ctx, t, s, http.StatusOK, "leading")
	require.NoError(t, a.cmd.Process.Signal(syscall.SIGCONT))
	a.awaitReady(ctx, t, s, http.StatusOK, "standing by: another relay leads")
	b.awaitReady(ctx, t, s, http.StatusOK, "leading")
	require.NotContains(t, a.said(t), `"msg":"healed`)
}

// TestHealWithoutItsLock: a relay that has lost the lock does not go on.
func TestHealWithoutItsLock(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s, writer := unhealed(ctx, t)
	p := startRelay(t, s.config)
	maker := s.awaitMaker(ctx, t)
	s.exec(t, `SELECT pg_terminate_backend(l.pid) FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid WHERE l.locktype = 'advisory' AND a.state = 'idle in transaction'`)
	s.receiver.await(ctx, t, "another try", func() bool {
		pids := s.makers(ctx, t)
		return len(pids) == 1 && pids[0] != maker
	})
	require.Contains(t, p.said(t), "healing is broken off: keep the lock of healing")
	_, err := writer.Exec(ctx, "COMMIT")
	require.NoError(t, err)
	s.receiver.await(ctx, t, "a leader", func() bool { return strings.Contains(p.said(t), `"msg":"leading"`) })
	require.Equal(t, 1, strings.Count(p.said(t), `"msg":"healed`))
}
