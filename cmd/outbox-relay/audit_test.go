package main

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestAudit has the log not carry some events, which nothing in the log can tell: the relay finds them in the table. Then records are taken away by hand,
// and the command finds what is missing and queues it.
func TestAudit(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	first, second := s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", first, "order.created", "{}")
	s.subscribe(t, "acme", second, "order.created", `{"n": {"$lt": 0}}`)
	s.asRunner(t)
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	checkpoint := func() { p = s.checkpoint(ctx, t, p) }
	s.insertMany(t, "acme", "order.created", 10)
	s.receiver.await(ctx, t, "the first events", func() bool { return s.arrivedAt(first) == 10 })
	checkpoint()

	s.exec(t, "ALTER PUBLICATION outbox_relay_events SET (publish = 'delete')")
	s.insertMany(t, "acme", "order.created", 7)
	s.insertMany(t, "acme", "order.cancelled", 7) // nobody wants these
	s.exec(t, "ALTER PUBLICATION outbox_relay_events SET (publish = 'insert')")
	s.insertMany(t, "acme", "order.created", 3)
	s.receiver.await(ctx, t, "what the log carried", func() bool { return s.arrivedAt(first) == 13 })
	checkpoint()
	s.receiver.await(ctx, t, "what the log did not carry", func() bool { return s.arrivedAt(first) == 20 })
	s.receiver.await(ctx, t, "the record of it", func() bool { return s.recorded(t, []string{"acme"}) == 20 })
	require.Contains(t, p.said(t), `"msg":"audit: committed events had no delivery; it is being queued","tenant":"acme","deliveries":7`)

	audit := func(want int, args ...string) (r auditResult) {
		t.Helper()
		out, errors, code := s.desk(t, append([]string{"audit", "-o", "json"}, args...)...)
		require.Equal(t, want, code, errors)
		require.NoError(t, json.Unmarshal([]byte(out), &r))
		require.Len(t, r.Tenants, 1)
		return r
	}
	r := audit(exitOK)
	assert.Equal(t, int64(27), r.Tenants[0].Events)
	s.exec(t, "DELETE FROM acme.webhook_deliveries WHERE id IN (SELECT id FROM acme.webhook_deliveries ORDER BY id LIMIT 2)")
	r = audit(exitFailure)
	assert.Equal(t, int64(2), r.Tenants[0].Missing)
	assert.Len(t, r.First, 2)
	r = audit(exitOK, "acme", "--repair")
	assert.Equal(t, int64(2), r.Tenants[0].Queued)
	s.receiver.await(ctx, t, "what was queued", func() bool { return s.receiver.count() == 22 })
	s.receiver.await(ctx, t, "the record of it", func() bool { return s.recorded(t, []string{"acme"}) == 20 })

	// What only one endpoint misses takes a closer look.
	s.exec(t, "UPDATE acme.webhook_subscriptions SET event_filters = '{}'")
	r = audit(exitOK)
	assert.Zero(t, r.Tenants[0].Missing)
	r = audit(exitFailure, "--thorough")
	assert.Equal(t, int64(20), r.Tenants[0].Missing)

	_, _, code := s.desk(t, "audit", "--since", "3000d")
	require.Equal(t, exitUsage, code)
}

// checkpoint starts the relay anew, which saves soon after its start what has been handled before.
func (s *site) checkpoint(ctx context.Context, t *testing.T, p *relayProcess) *relayProcess {
	t.Helper()
	_, exit := p.stop(t)
	require.NoError(t, exit)
	var now string
	require.NoError(t, s.pool.QueryRow(ctx, "SELECT pg_current_snapshot()::text").Scan(&now))
	p = startRelay(t, s.config)
	s.receiver.await(ctx, t, "a checkpoint", func() (saved bool) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT coalesce(pg_snapshot_xmax(snapshot) >= pg_snapshot_xmax($1::pg_snapshot), false)
			FROM outbox_relay.progress WHERE slot = $2`, now, s.slot).Scan(&saved))
		return saved
	})
	return p
}

// TestAuditAfterAnotherSubscription: what nobody wanted when it came is not missing for somebody who came after it, nor after a restart, while what is missing
// of a tenant whose rows are as they were is found.
func TestAuditAfterAnotherSubscription(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme", "other")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	endpoint := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", endpoint, "order.created", "{}")
	s.subscribe(t, "other", s.endpoint(t, "other", 3), "order.created", "{}")
	s.asRunner(t)
	p := startRelay(t, s.config)
	s.receiver.await(ctx, t, "a checkpoint", func() (saved bool) {
		require.NoError(t, s.pool.QueryRow(ctx, "SELECT bool_and(digest IS NOT NULL) FROM outbox_relay.tenants").Scan(&saved))
		return saved
	})

	s.insertMany(t, "acme", "order.paid", 5) // nobody wants these
	s.subscribe(t, "acme", endpoint, "order.paid", "{}")
	s.insertMany(t, "acme", "order.paid", 1)
	s.insertMany(t, "other", "order.created", 2)
	s.receiver.await(ctx, t, "what is wanted", func() bool { return s.recorded(t, []string{"acme", "other"}) == 3 })
	s.exec(t, "DELETE FROM other.webhook_deliveries")
	p = s.checkpoint(ctx, t, p)
	s.receiver.await(ctx, t, "what is missing", func() bool { return s.receiver.count() == 5 })
	s.receiver.await(ctx, t, "the record of it", func() bool { return s.recorded(t, []string{"other"}) == 2 })
	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.NotContains(t, p.said(t), `"tenant":"acme","deliveries"`)
	require.Equal(t, 1, s.arrivedAt(endpoint))
}

// Without --since an audit reaches back as far as there are records; who asks for more is told where they begin.
func TestAuditWithinRetention(t *testing.T) {
	t.Parallel()
	d := installed(t)
	env := append(d.env, "OUTBOX_RELAY_RETENTION_DELIVERIES=2h")
	o := invoke(t, env, "audit")
	assert.Contains(t, o.err, "nothing has been handled yet", "which is what it asks the database next")
	o = invoke(t, env, "audit", "--since", "1d")
	assert.Equal(t, exitUsage, o.code, o.out)
	assert.Regexp(t, `--since \S+Z: reaches back further than retention.deliveries \(2h\): .*; begin at \S+Z or later`, o.err)
}

// TestAuditSaysWhatItHasNotLookedAt: a tenant that cannot be read is no tenant of which nothing is missing, nor is one that was asked for and left out.
func TestAuditSaysWhatItHasNotLookedAt(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK), "acme", "zebra")
	s.asRunner(t)
	s.insertMany(t, "acme", "order.created", 3)
	s.exec(t, "INSERT INTO outbox_relay.progress (slot, snapshot) VALUES ($1, pg_current_snapshot()) ON CONFLICT (slot) DO UPDATE SET snapshot = excluded.snapshot", s.slot)
	audit := func(want int, args ...string) (last string) {
		t.Helper()
		out, errors, code := s.desk(t, append([]string{"audit", "--since", "2h"}, args...)...)
		require.Equal(t, want, code, "%s%s", out, errors)
		lines := strings.Split(strings.TrimSpace(out), "\n")
		return lines[len(lines)-1]
	}
	assert.Equal(t, "nothing is missing in what was looked at", audit(exitOK), "they have just been added")
	out, _, code := s.desk(t, "audit", "zebra")
	assert.Equal(t, exitOK, code)
	assert.Regexp(t, `(?m)^zebra +0 +0 +0 +events from before it was added, 2\S+Z, are left out$`, out)
	out, _, _ = s.desk(t, "audit", "zebra", "-o", "json")
	assert.Regexp(t, `"added_at": "2\S+Z"`, out)
	s.exec(t, "UPDATE outbox_relay.tenants SET since = now() - interval '3 hours'")
	assert.Equal(t, "nothing is missing", audit(exitOK))
	s.exec(t, "UPDATE outbox_relay.tenants SET restored_at = now() - interval '1 hour' WHERE schema = 'zebra'")
	assert.Equal(t, "nothing is missing in what was looked at", audit(exitOK))
	out, _, _ = s.desk(t, "audit", "zebra", "--since", "2h")
	assert.Regexp(t, `(?m)^zebra +0 +0 +0 +it came from another cluster at 2\S+Z; events from before are left out$`, out)
	out, _, _ = s.desk(t, "audit", "zebra", "--since", "2h", "-o", "json")
	assert.Regexp(t, `"restored_at": "2\S+Z"`, out)
	s.exec(t, "UPDATE outbox_relay.tenants SET restored_at = now() - interval '3 hours'")
	assert.Equal(t, "nothing is missing", audit(exitOK))

	s.exec(t, "REVOKE SELECT ON acme.webhook_deliveries FROM outbox_relay_runner")
	assert.Equal(t, "nothing is missing in what was looked at; 1 tenant was left out", audit(exitFailure))
	assert.Equal(t, "nothing was looked at; 1 tenant was left out", audit(exitFailure, "acme"))
	assert.Equal(t, "nothing is missing", audit(exitOK, "zebra"))
	var r auditResult
	out, _, code = s.desk(t, "audit", "-o", "json", "--since", "2h")
	require.Equal(t, exitFailure, code)
	assert.NotContains(t, out, "added_at")
	require.NoError(t, json.Unmarshal([]byte(out), &r))
	require.Len(t, r.Tenants, 2)
	assert.True(t, r.Tenants[0].Failed)
	assert.Contains(t, r.Tenants[0].Skipped, "permission denied")
	s.exec(t, "GRANT SELECT ON acme.webhook_deliveries TO outbox_relay_runner")

	s.exec(t, "UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'as it was told' WHERE schema = 'acme'")
	assert.Equal(t, "nothing is missing in what was looked at; 1 tenant was left out", audit(exitOK), "nobody has asked for it")
	assert.Equal(t, "nothing is missing in what was looked at; 1 tenant was left out", audit(exitFailure, "acme", "zebra"))
}

func TestAuditOfNoTimeAtAll(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"--since", "2026-01-02T00:00:00Z", "--until", "2026-01-02T00:00:00Z"},
		{"--since", "1h", "--until", "2h"},
		{"--until", "3d"}, // the default of --since is one day
	} {
		o := invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + dsn, "OUTBOX_RELAY_RETENTION_DELIVERIES=0"}, append([]string{"audit"}, args...)...)
		assert.Equal(t, exitUsage, o.code, o.out)
		assert.Regexp(t, `--until \S+Z: must be after --since, which is \S+Z`, o.err)
	}
}
