package main

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestRunsAreCalledBack: what was claimed of an ordered key is not sent to its end when somebody decides otherwise meanwhile.
func TestRunsAreCalledBack(t *testing.T) {
	t.Parallel()
	actions := map[string]struct {
		do, undo string
	}{
		"endpoint paused":       {"SELECT outbox_relay.pause_endpoint('acme', $1)", "SELECT outbox_relay.resume_endpoint('acme', $1)"},
		"endpoint not active":   {"UPDATE acme.webhook_endpoints SET is_active = false WHERE id = $1", "UPDATE acme.webhook_endpoints SET is_active = true WHERE id = $1"},
		"tenant paused":         {"SELECT outbox_relay.pause_tenant('acme', $1::uuid::text)", "SELECT outbox_relay.resume_tenant('acme') FROM acme.webhook_endpoints WHERE id = $1"},
		"endpoint gone":         {"DELETE FROM acme.webhook_endpoints WHERE id = $1", ""},
		"tenant removed":        {"SELECT outbox_relay.remove_tenant('acme') FROM acme.webhook_endpoints WHERE id = $1", ""},
		"endpoint of elsewhere": {"UPDATE acme.webhook_endpoints SET endpoint_url = 'http://127.0.0.1:1/' WHERE id = $1", ""},
	}
	for name, action := range actions {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const events, first = 60, 3
			let, asked := make(chan struct{}), new(atomic.Int32)
			s := newSite(t, "queue:\n  poll: 100ms\nwindow:\n  hold: 200ms\n", func(outbox.UUID, string) int {
				if asked.Add(1) > first {
					<-let
				}
				return http.StatusOK
			}, "acme")
			goOn := sync.OnceFunc(func() { close(let) })
			t.Cleanup(goOn)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			id := s.endpoint(t, "acme", 3)
			s.subscribe(t, "acme", id, "order.created", "{}")
			s.exec(t, "UPDATE acme.webhook_endpoints SET delivery_order = 'strict', paused_at = now()")
			p := startBinary(t, binary(t), s.config, "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0")
			s.leading(ctx, t)
			s.insertMany(t, "acme", "order.created", events)
			count := func(where string) func() int {
				return func() (n int) {
					require.NoError(t, s.pool.QueryRow(ctx, "SELECT count(*) FROM outbox_relay.retry_queue WHERE "+where).Scan(&n))
					return n
				}
			}
			waiting, leased := count("true"), count("leased_by IS NOT NULL")
			s.receiver.await(ctx, t, "the rows", func() bool { return waiting() == events })
			s.exec(t, "SELECT outbox_relay.resume_endpoint('acme', $1)", id)
			s.receiver.await(ctx, t, "one after the first ones to be on its way", func() bool { return asked.Load() > first })
			inMemory := func() float64 { return p.scrape(ctx, t, s).value(t, "claimed_deliveries") }
			require.Greater(t, inMemory(), 2.)

			s.exec(t, action.do, id)
			s.receiver.await(ctx, t, "the run to be called back", func() bool { return inMemory() <= 1 }) // the one on its way
			goOn()
			s.receiver.await(ctx, t, "the end of that one", func() bool { return s.receiver.count() > first && leased() == 0 })
			assert.Equal(t, first+1, s.receiver.count())
			if action.undo == "" {
				return
			}
			s.exec(t, action.undo, id)
			s.receiver.await(ctx, t, "the rest", func() bool { return s.receiver.count() == events && waiting() == 0 })
		})
	}
}
