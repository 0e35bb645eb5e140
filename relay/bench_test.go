package relay_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// drainWorkers is the concurrency of both sides of BenchmarkDrain.
const drainWorkers = 64

// counter is a receiver in a process of its own: what it costs must not count as the relay's. It answers every POST with 200 and tells the number
// of them on GET.
func counter(b *testing.B) (url string, count func() int64) {
	b.Helper()
	cmd := exec.Command(os.Args[0], "-test.run=^$") //nolint:noctx // ended by its standard input
	cmd.Env = append(os.Environ(), "OUTBOX_RELAY_BENCH_RECEIVER=1")
	out, err := cmd.StdoutPipe()
	require.NoError(b, err)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe() // it ends when this is closed, by whatever end we meet
	require.NoError(b, err)
	require.NoError(b, cmd.Start())
	b.Cleanup(func() {
		require.NoError(b, stdin.Close())
		require.NoError(b, cmd.Wait())
	})
	var address string
	_, err = fmt.Fscanln(out, &address)
	require.NoError(b, err)
	url = "http://" + address
	return url, func() int64 {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, url, nil)
		require.NoError(b, err)
		res, err := http.DefaultClient.Do(req)
		require.NoError(b, err)
		defer func() { require.NoError(b, res.Body.Close()) }()
		var n int64
		_, err = fmt.Fscan(res.Body, &n)
		require.NoError(b, err)
		return n
	}
}

// serveCounter is the child's side of counter.
func serveCounter() int {
	var n atomic.Int64
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // lives as long as the process
	if err != nil {
		return 1
	}
	fmt.Println(listener.Addr()) //nolint:forbidigo // what the parent reads
	go func() {
		_ = http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet {
				fmt.Fprint(w, n.Load())
				return
			}
			_, _ = io.Copy(io.Discard, r.Body)
			n.Add(1)
		}))
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// drainSite is a durable server with one tenant, one endpoint and one subscription.
type drainSite struct {
	dsn  string
	pool *pgxpool.Pool
	slot string
}

func newDrainSite(b *testing.B, url string) *drainSite {
	b.Helper()
	server, err := pgtest.Start(b.Context(), pgtest.Options{Durable: true})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, server.Close()) })
	s := &drainSite{dsn: server.URL("postgres"), slot: schema.Slot}
	s.pool, err = pgxpool.New(b.Context(), s.dsn)
	require.NoError(b, err)
	b.Cleanup(s.pool.Close)
	require.NoError(b, schema.Migrate(b.Context(), s.dsn, schema.Options{Slot: s.slot}))
	s.exec(b, `CREATE SCHEMA bench`)
	require.NoError(b, schema.AddTenant(b.Context(), s.dsn, "bench", schema.AddOptions{}))
	s.exec(b, `INSERT INTO bench.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
		VALUES (gen_random_uuid(), 'bench', $1, 'secret of the benchmark', gen_random_uuid())`, url)
	s.exec(b, `INSERT INTO bench.webhook_event_types (id, event_type, category, display_name) VALUES (gen_random_uuid(), 'order.created', 'order', 'x')`)
	s.exec(b, `INSERT INTO bench.webhook_subscriptions (id, endpoint_id, event_type_id, event_type)
		SELECT gen_random_uuid(), e.id, t.id, 'order.created' FROM bench.webhook_endpoints e, bench.webhook_event_types t`)
	return s
}

func (s *drainSite) exec(b *testing.B, sql string, args ...any) {
	b.Helper()
	_, err := s.pool.Exec(b.Context(), sql, args...)
	require.NoError(b, err)
}

// insert commits n events of about 300 bytes, one a transaction, with ids of version 7 as package outbox makes them.
func (s *drainSite) insert(b *testing.B, n int) {
	b.Helper()
	s.exec(b, fmt.Sprintf(`DO $$ BEGIN SET synchronous_commit = off; FOR i IN 1..%d LOOP
		INSERT INTO bench.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
		VALUES ((lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7' || substr(md5(i::text), 1, 3) || '8' ||
			substr(md5(random()::text), 1, 15))::uuid, 'order.created', gen_random_uuid(), 'order', jsonb_build_object('n', i, 'note', repeat('x', 240)));
		COMMIT; END LOOP; RESET synchronous_commit; END $$`, n))
}

// drain runs the relay until it has delivered n events more, and returns the time that took from the first to the last. set may change its options.
func (s *drainSite) drain(b *testing.B, count func() int64, n int64, set ...func(*relay.Options)) time.Duration {
	b.Helper()
	cfg := relay.DefaultConfig()
	cfg.Database.URL, cfg.Database.Slot = s.dsn, s.slot
	cfg.Delivery.EndpointConcurrency = drainWorkers
	cfg.Network.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	base := count()
	ctx, stop := context.WithCancel(b.Context())
	done := make(chan error, 1)
	options := relay.Options{Config: cfg, Version: "bench", Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()}
	for _, f := range set {
		f(&options)
	}
	go func() { done <- relay.Run(ctx, options) }()
	took := span(count, base, n)
	stop()
	require.NoError(b, <-done)
	return took
}

// span returns the time between the first and the last of n requests more than base.
func span(count func() int64, base, n int64) time.Duration {
	var first time.Time
	for {
		c := count() - base
		if first.IsZero() && c > 0 {
			first = time.Now()
			n -= c // what came before the clock started
			base += c
			continue
		}
		if !first.IsZero() && c >= n {
			return time.Duration(float64(time.Since(first)) * float64(n+1) / float64(n))
		}
		<-time.After(2 * time.Millisecond)
	}
}

// post is the limit: a loop of keep-alive POSTs through net/http, signed, with the same bodies and as many workers.
func post(b *testing.B, url string, count func() int64, n int64) time.Duration {
	b.Helper()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: drainWorkers, DisableCompression: true}}
	defer client.CloseIdleConnections()
	body := []byte(fmt.Sprintf(`{"id":"%s","type":"order.created","timestamp":"2026-01-01T00:00:00.000000Z","data":{"n": 1, "note": "%s"}}`,
		outbox.NewUUID(), strings.Repeat("x", 240)))
	base := count()
	var left atomic.Int64
	left.Store(n)
	var workers sync.WaitGroup
	for range drainWorkers {
		workers.Go(func() {
			for left.Add(-1) >= 0 {
				mac := hmac.New(sha256.New, []byte("secret of the benchmark"))
				mac.Write(body)
				req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, url, bytes.NewReader(body))
				if err != nil {
					b.Error(err)
					return
				}
				req.Header.Set("Content-Type", "application/json")
				req.Header.Set("X-Webhook-Signature", "sha256="+hex.EncodeToString(mac.Sum(nil)))
				res, err := client.Do(req)
				if err != nil {
					b.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
		})
	}
	took := span(count, base, n)
	workers.Wait()
	return took
}

// BenchmarkDrain drains a backlog of events that were committed one by one, through matching, signing, delivery and recording on a server with
// fsync on, and compares with a plain net/http POST loop in the same run. The ratio is the result; the rates depend on the machine.
func BenchmarkDrain(b *testing.B) {
	const events = 100_000
	url, count := counter(b)
	s := newDrainSite(b, url)
	var relayed, posted time.Duration
	for b.Loop() {
		s.insert(b, events)
		relayed += s.drain(b, count, events)
		posted += post(b, url, count, events)
	}
	rate := func(t time.Duration) float64 { return float64(events) * float64(b.N) / t.Seconds() }
	b.ReportMetric(rate(relayed), "relay/s")
	b.ReportMetric(rate(posted), "post/s")
	b.ReportMetric(rate(relayed)/rate(posted), "relay/post")
	b.ReportMetric(0, "ns/op")
}
