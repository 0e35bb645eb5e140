package main

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// moods are what endpoints answer; 200 unless told otherwise.
type moods struct{ status sync.Map }

func (m *moods) set(endpoint outbox.UUID, status int) { m.status.Store(endpoint, status) }

func (m *moods) answer(endpoint outbox.UUID, _ string) int {
	if status, ok := m.status.Load(endpoint); ok {
		return status.(int)
	}
	return http.StatusOK
}

// TestEndpointsComeAndGo lets endpoints fail for good, for long and for a while, and looks whether the news of it is told, whether what they missed
// can be recovered by the commands, and whether the statistics tell it.
func TestEndpointsComeAndGo(t *testing.T) {
	t.Parallel()
	var m moods
	s := newSite(t, "health:\n  warn_after: 1s\n  disable_after: 15s\nqueue:\n  poll: 100ms\nbreaker:\n  open_for: 1s\n", m.answer, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s.asRunner(t)
	ops, gone, down, shaky := s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 10), s.endpoint(t, "acme", 10)
	s.subscribe(t, "acme", ops, "outbox_relay.**", "{}")
	s.subscribe(t, "acme", gone, "a.gone", "{}")
	s.subscribe(t, "acme", down, "a.down", "{}")
	s.subscribe(t, "acme", shaky, "a.shaky", "{}")
	m.set(gone, http.StatusGone)
	m.set(down, http.StatusInternalServerError)
	m.set(shaky, http.StatusServiceUnavailable)
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	// told counts the news that have reached ops.
	told := func(kind string, endpoint outbox.UUID) (n int) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_events e JOIN acme.webhook_deliveries d ON d.webhook_event_id = e.id
			WHERE e.event_type = 'outbox_relay.' || $1 AND e.aggregate_id = $2 AND e.event_data ->> 'endpoint_id' = $2::text AND d.webhook_endpoint_id = $3
			AND d.delivery_status = 'success'`, kind, endpoint, ops).Scan(&n))
		return n
	}
	hear := func(kind string, endpoint outbox.UUID) {
		t.Helper()
		s.receiver.await(ctx, t, "news "+kind, func() bool { return told(kind, endpoint) == 1 })
	}
	text := func(sql string, args ...any) (text string) {
		t.Helper()
		require.NoError(t, s.pool.QueryRow(ctx, sql, args...).Scan(&text))
		return text
	}

	// Gone: disabled at once. Its events are missed, and recovered afterwards; the dead letter is replayed.
	s.insertMany(t, "acme", "a.gone", 1)
	hear("endpoint.disabled", gone)
	hear("delivery.dead", gone)
	s.insertMany(t, "acme", "a.gone", 700)
	m.set(gone, http.StatusOK)
	s.command(t, "endpoints", "resume", "-t", "acme", gone.String())
	s.command(t, "endpoints", "recover", "-t", "acme", gone.String(), "--since", "1h")
	s.receiver.await(ctx, t, "what was missed", func() bool { return s.arrivedAt(gone) == 700 })
	s.command(t, "deadletters", "replay", "-t", "acme", "--endpoint", gone.String(), "--yes")
	s.receiver.await(ctx, t, "the dead letter", func() bool { return s.arrivedAt(gone) == 701 })
	s.command(t, "endpoints", "recover", "-t", "acme", gone.String(), "--since", "1h")
	require.Equal(t, "700 0", text(`SELECT string_agg(queued::text, ' ' ORDER BY id) FROM outbox_relay.recoveries`), "the second found nothing missing")

	// A while: a warning, then the news that it is over.
	s.insertMany(t, "acme", "a.shaky", 1)
	hear("endpoint.failing", shaky)
	m.set(shaky, http.StatusOK)
	s.receiver.await(ctx, t, "news endpoint.recovered", func() bool {
		s.insertMany(t, "acme", "a.shaky", 1) // the first one may have used up its attempts
		return told("endpoint.recovered", shaky) == 1
	})

	// Too long: a warning, then the end.
	s.insertMany(t, "acme", "a.down", 1)
	hear("endpoint.failing", down)
	s.receiver.await(ctx, t, "the endpoint's end", func() bool {
		s.insertMany(t, "acme", "a.down", 1)
		return told("endpoint.disabled", down) == 1
	})
	require.Contains(t, text(`SELECT disabled_reason FROM acme.webhook_endpoints WHERE id = $1`, down), "every attempt has failed for")
	waiting := func() string {
		return text(`SELECT count(*)::text FROM outbox_relay.retry_queue WHERE endpoint_id = $1`, down)
	}
	require.NotEqual(t, "0", waiting(), "what had been queued is kept")
	m.set(down, http.StatusOK)
	s.exec(t, `UPDATE acme.webhook_endpoints SET is_active = true WHERE id = $1`, down) // one UPDATE is enough
	s.receiver.await(ctx, t, "what was kept", func() bool { return waiting() == "0" })
	require.Positive(t, s.arrivedAt(down))

	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.Empty(t, s.receiver.bad)
	require.Equal(t, "702 701", text(`SELECT total_attempts || ' ' || successful_deliveries FROM acme.webhook_delivery_stats WHERE webhook_endpoint_id = $1`, gone))
	require.Equal(t, "true true", text(`SELECT (e.last_used_at IS NOT NULL) || ' ' || (s.last_triggered_at IS NOT NULL) FROM acme.webhook_endpoints e
		JOIN acme.webhook_subscriptions s ON s.endpoint_id = e.id WHERE e.id = $1`, ops))
	var exhausted int // the first one's, where the warning came late
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_deliveries WHERE webhook_endpoint_id = $1 AND delivery_status = 'failed'`, shaky).Scan(&exhausted))
	require.LessOrEqual(t, told("delivery.exhausted", shaky), exhausted)
}
