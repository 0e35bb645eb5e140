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
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// place is a database, a receiver, and a relay between them.
type place struct {
	t        *testing.T
	ctx      context.Context //nolint:containedctx // the test's own
	cfg      relay.Config
	pool     *pgxpool.Pool
	receiver *httptest.Server
	registry *prometheus.Registry // of the latest run

	mu   sync.Mutex
	seen map[string]int // requests by delivery
}

func newPlace(ctx context.Context, t *testing.T) *place {
	t.Helper()
	dsn := pgtest.Database(t)
	there, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	p := &place{t: t, ctx: ctx, cfg: relay.DefaultConfig(), seen: make(map[string]int)}
	p.cfg.Database.URL, p.cfg.Database.Slot = dsn, "place_"+there.Database
	p.cfg.Network.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	require.NoError(t, schema.Migrate(ctx, dsn, schema.Options{Slot: p.cfg.Database.Slot}))
	p.pool, err = pgxpool.New(ctx, dsn)
	require.NoError(t, err)
	t.Cleanup(p.pool.Close)
	p.receiver = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.seen[r.Header.Get("webhook-id")+r.URL.Path]++
	}))
	t.Cleanup(p.receiver.Close)
	return p
}

func (p *place) exec(sql string, args ...any) {
	p.t.Helper()
	_, err := p.pool.Exec(p.ctx, sql, args...)
	require.NoError(p.t, err, sql)
}

// join makes a tenant with some endpoints that want order.created.
func (p *place) join(tenant string, endpoints int) {
	p.t.Helper()
	p.exec(`CREATE SCHEMA ` + tenant)
	require.NoError(p.t, schema.AddTenant(p.ctx, p.cfg.Database.URL, tenant, schema.AddOptions{}))
	p.exec(`INSERT INTO `+tenant+`.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
		SELECT gen_random_uuid(), 'e' || n, $1 || '/' || n, 'a secret of the test', gen_random_uuid() FROM generate_series(1, $2::int4) n`, p.receiver.URL, endpoints)
	p.exec(`INSERT INTO ` + tenant + `.webhook_event_types (id, event_type, category, display_name) VALUES (gen_random_uuid(), 'order.created', 'order', 'x')`)
	p.exec(`INSERT INTO ` + tenant + `.webhook_subscriptions (id, endpoint_id, event_type_id, event_type)
		SELECT gen_random_uuid(), e.id, t.id, 'order.created' FROM ` + tenant + `.webhook_endpoints e, ` + tenant + `.webhook_event_types t`)
}

func (p *place) events(tenant string, n int) {
	p.t.Helper()
	p.exec(`INSERT INTO `+tenant+`.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
		SELECT gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', '{}' FROM generate_series(1, $1)`, n)
}

// arrived is how many deliveries have.
func (p *place) arrived() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.seen)
}

// gauge reads a metric without labels.
func (p *place) gauge(name string) float64 {
	p.t.Helper()
	families, err := p.registry.Gather()
	require.NoError(p.t, err)
	for _, f := range families {
		if f.GetName() == "outbox_relay_"+name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	require.Fail(p.t, "there is no such metric", name)
	return 0
}

// run relays until stop is called.
func (p *place) run(log slog.Handler, updates <-chan relay.Config) (stop func()) {
	p.t.Helper()
	ctx, cancel := context.WithCancel(p.ctx)
	done := make(chan error, 1)
	var status relay.Status
	p.registry = prometheus.NewRegistry()
	options := relay.Options{Config: p.cfg, Version: "test", Log: slog.New(log), Registry: p.registry, Updates: updates, Status: &status}
	go func() {
		done <- relay.Run(ctx, options)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(p.t, <-done)
	})
	p.t.Cleanup(stop)
	require.Eventually(p.t, func() bool { ok, _ := status.Ready(); return ok }, time.Minute, 10*time.Millisecond)
	return stop
}
