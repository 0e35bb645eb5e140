package main

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestNothingGoesBackBeyondRetention without being told to: deliveries of that time are gone, and would be made again.
func TestNothingGoesBackBeyondRetention(t *testing.T) {
	t.Parallel()
	s := newSite(t, "retention:\n  deliveries: 240h\n", always(http.StatusOK), "acme")
	endpoint, old := s.endpoint(t, "acme", 3).String(), outbox.NewUUID().String()
	s.exec(t, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, occurred_at) VALUES ($1, 'a.b', $1, 'a', now() - interval '11 days')`, old)
	ago := func(days int) string {
		return time.Now().Add(-time.Duration(days) * 24 * time.Hour).Format(time.RFC3339)
	}
	for _, args := range [][]string{
		{"endpoints", "recover", endpoint, "--wait=false", "--since", "11d"},
		{"endpoints", "recover", endpoint, "--wait=false", "--since", ago(11)},
		{"endpoints", "recover", endpoint, "--wait=false", "--since", old},
		{"tenants", "add", "acme", "--since", ago(11)},
	} {
		_, said, code := s.desk(t, args...)
		require.NotZero(t, code, args)
		require.Contains(t, said, "retention.deliveries is 240h", args)
		require.Contains(t, said, "hint: begin with --since", args)
		s.command(t, append(args, "--yes")...)
	}
	s.exec(t, `UPDATE outbox_relay.tenants SET backfill_done_at = now()`) // another one may begin
	s.command(t, "endpoints", "recover", endpoint, "--wait=false", "--since", "9d")
	s.command(t, "tenants", "add", "acme", "--since", ago(9))
	s.exec(t, `CREATE SCHEMA fresh`)
	s.command(t, "tenants", "add", "fresh", "--since", ago(1000)) // nothing of it was ever delivered
	var n int
	require.NoError(t, s.pool.QueryRow(t.Context(), `SELECT count(*) FROM outbox_relay.recoveries`).Scan(&n))
	require.Equal(t, 4, n)
}
