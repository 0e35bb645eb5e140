package relay_test

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestUpdatesUnderLoad changes all that may change, again and again, while events are read, deferred, claimed and delivered, and tenants join. Each delivery
// arrives once.
func TestUpdatesUnderLoad(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	dsn := pgtest.Database(t)
	there, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	cfg := relay.DefaultConfig()
	cfg.Database.URL, cfg.Database.Slot = dsn, "updates_"+there.Database
	cfg.Network.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	cfg.Queue.Poll = 20 * time.Millisecond
	require.NoError(t, schema.Migrate(ctx, dsn, schema.Options{Slot: cfg.Database.Slot}))
	pool, err := pgxpool.New(ctx, dsn)
	require.NoError(t, err)
	defer pool.Close()
	exec := func(sql string, args ...any) {
		t.Helper()
		_, err := pool.Exec(ctx, sql, args...)
		require.NoError(t, err, sql)
	}
	var mu sync.Mutex
	seen := make(map[string]int)
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		seen[r.Header.Get("webhook-id")+r.URL.Path]++
	}))
	defer receiver.Close()
	join := func(tenant string) {
		t.Helper()
		exec(`CREATE SCHEMA ` + tenant)
		require.NoError(t, schema.AddTenant(ctx, dsn, tenant, schema.AddOptions{}))
		exec(`INSERT INTO `+tenant+`.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
			SELECT gen_random_uuid(), 'e' || n, $1 || '/' || n, 'a secret of the test', gen_random_uuid() FROM generate_series(1, 3) n`, receiver.URL)
		exec(`INSERT INTO ` + tenant + `.webhook_event_types (id, event_type, category, display_name) VALUES (gen_random_uuid(), 'order.created', 'order', 'x')`)
		exec(`INSERT INTO ` + tenant + `.webhook_subscriptions (id, endpoint_id, event_type_id, event_type)
			SELECT gen_random_uuid(), e.id, t.id, 'order.created' FROM ` + tenant + `.webhook_endpoints e, ` + tenant + `.webhook_event_types t`)
	}
	join("first")

	updates := make(chan relay.Config)
	running, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan error, 1)
	var status relay.Status
	go func() {
		done <- relay.Run(running, relay.Options{
			Config: cfg, Version: "test", Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry(), Updates: updates, Status: &status,
		})
	}()
	require.Eventually(t, func() bool { ok, _ := status.Ready(); return ok }, time.Minute, 10*time.Millisecond)

	const rounds, events = 20, 25
	wanted := 0
	for i := range rounds {
		if i == rounds/2 {
			join("second")
		}
		for _, tenant := range []string{"first", "second"}[:1+2*i/rounds] {
			exec(`INSERT INTO `+tenant+`.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
				SELECT gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', '{}' FROM generate_series(1, $1)`, events)
			wanted += 3 * events
		}
		next := cfg
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
	updates <- cfg
	require.Eventually(t, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(seen) == wanted
	}, 2*time.Minute, 10*time.Millisecond)
	stop()
	require.NoError(t, <-done)
	for id, n := range seen {
		assert.Equal(t, 1, n, id)
	}
}
