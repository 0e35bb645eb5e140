package relay_test

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay"
)

// TestUpdatesUnderLoad changes all that may change, again and again, while events are read, deferred, claimed and delivered, and tenants join. Each delivery
// arrives once.
func TestUpdatesUnderLoad(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.cfg.Queue.Poll = 20 * time.Millisecond
	p.join("first", 3)

	updates := make(chan relay.Config)
	stop := p.run(slog.DiscardHandler, updates)

	const rounds, events = 20, 25
	wanted := 0
	for i := range rounds {
		if i == rounds/2 {
			p.join("second", 3)
		}
		for _, tenant := range []string{"first", "second"}[:1+2*i/rounds] {
			p.events(tenant, events)
			wanted += 3 * events
		}
		next := p.cfg
		next.Delivery.EndpointConcurrency, next.Delivery.HostConcurrency = 1+i%5, 1+i%7
		next.Delivery.EndpointRate = float64(i % 3 * 200)
		next.Delivery.KeepResponse, next.Delivery.Source = relay.ByteSize(i), "/source"
		next.Breaker.OpenFor, next.Breaker.Failures = time.Duration(1+i)*time.Second, 1+i
		next.Retry.Backoff, next.Record.Interval, next.Record.Batch = time.Duration(1+i)*time.Millisecond, time.Duration(1+i)*time.Millisecond, 10+i
		next.Queue.Poll, next.Queue.Batch = time.Duration(10+i)*time.Millisecond, 10+i
		next.Retention.Attempts, next.Health.WarnAfter = time.Duration(1+i)*time.Hour, time.Duration(1+i)*time.Hour
		if i%2 == 0 {
			next.Network.Deny = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
		}
		next.Window.Deliveries = 1 // which stays
		select {
		case updates <- next:
		case <-ctx.Done():
			require.NoError(t, ctx.Err())
		}
	}
	updates <- p.cfg
	require.Eventually(t, func() bool { return p.arrived() == wanted }, 2*time.Minute, 10*time.Millisecond)
	stop()
	for id, n := range p.seen {
		assert.Equal(t, 1, n, id)
	}
}
