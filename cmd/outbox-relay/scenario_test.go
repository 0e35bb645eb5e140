package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// What the benchmarks of whole scenarios share: a durable server, the real binary, and a receiver that costs little. Run them with
//
//	go test -run '^$' -bench Scenario -benchtime 1x -timeout 60m ./cmd/outbox-relay

// crowd is a receiver with many addresses. The path says how it behaves: /ok, /slow (after 100 ms), /hang, /reset, /error, then the number of the
// endpoint. It notes when each event has arrived first.
type crowd struct {
	port     int
	accepted []atomic.Int64 // by endpoint
	running  []atomic.Int64
	peak     []atomic.Int64
	total    atomic.Int64
	mood     atomic.Pointer[string] // of all /moody endpoints
	quit     chan struct{}

	mu      sync.Mutex
	arrived map[string]time.Time // by webhook-id, while it is not nil
}

// newCrowd listens on 127.0.0.1 and as many addresses after it, all at one port.
func newCrowd(b testing.TB, hosts, endpoints int) *crowd {
	b.Helper()
	c := &crowd{
		accepted: make([]atomic.Int64, endpoints), running: make([]atomic.Int64, endpoints), peak: make([]atomic.Int64, endpoints),
		quit: make(chan struct{}),
	}
	c.setMood("ok")
	server := &http.Server{Handler: c, ReadHeaderTimeout: time.Minute}
	b.Cleanup(func() {
		close(c.quit)
		_ = server.Close()
	})
	for i := range hosts {
		l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", host(i), c.port)) //nolint:noctx // lives as long as the benchmark
		require.NoError(b, err)
		c.port = l.Addr().(*net.TCPAddr).Port
		go func() { _ = server.Serve(l) }()
	}
	return c
}

func host(i int) string { return fmt.Sprintf("127.0.%d.%d", i/200, 1+i%200) }

func (c *crowd) setMood(mood string) { c.mood.Store(&mood) }

// url is that of the endpoint with a number, at its own share of the hosts.
func (c *crowd) url(hosts, n int, mood string) string {
	return fmt.Sprintf("http://%s:%d/%s/%d", host(n%hosts), c.port, mood, n)
}

func (c *crowd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	mood, number, _ := strings.Cut(r.URL.Path[1:], "/")
	n, _ := strconv.Atoi(number)
	now := c.running[n].Add(1)
	defer c.running[n].Add(-1)
	for old := c.peak[n].Load(); now > old && !c.peak[n].CompareAndSwap(old, now); old = c.peak[n].Load() {
	}
	if mood == "moody" {
		mood = *c.mood.Load()
	}
	switch mood {
	case "slow":
		<-time.After(100 * time.Millisecond)
	case "hang":
		select {
		case <-r.Context().Done():
		case <-c.quit:
		}
		return
	case "reset":
		conn, _, err := w.(http.Hijacker).Hijack()
		if err == nil {
			_ = conn.(*net.TCPConn).SetLinger(0)
			_ = conn.Close()
		}
		return
	case "error":
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	c.mu.Lock()
	if id := r.Header.Get("webhook-id"); c.arrived != nil {
		if _, again := c.arrived[id]; !again {
			c.arrived[id] = time.Now()
		}
	}
	c.mu.Unlock()
	c.accepted[n].Add(1)
	c.total.Add(1)
}

// await waits until so many have been accepted.
func (c *crowd) await(ctx context.Context, b testing.TB, n int64) {
	b.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for c.total.Load() < n {
		select {
		case <-tick.C:
		case <-ctx.Done():
			require.FailNow(b, "gave up waiting", "%d of %d have arrived", c.total.Load(), n)
		}
	}
}

// arrivals turns the notes on, or off, and returns those so far.
func (c *crowd) arrivals(on bool) map[string]time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.arrived
	c.arrived = nil
	if on {
		c.arrived = make(map[string]time.Time)
	}
	return old
}

// newScene is a site on a durable server of its own.
func newScene(b testing.TB, settings string, tenants ...string) *site {
	b.Helper()
	server, err := pgtest.Start(b.Context(), pgtest.Options{Durable: true, Config: map[string]string{"shared_buffers": "512MB", "max_wal_size": "8GB"}})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, server.Close()) })
	s := &site{dsn: server.URL("postgres"), slot: "scenario"}
	s.config = filepath.Join(b.TempDir(), "relay.yaml")
	yaml := fmt.Sprintf("database:\n  url: %q\n  slot: %s\nnetwork:\n  allow: [127.0.0.0/8]\nserver:\n  listen: \"\"\n%s", s.dsn, s.slot, settings)
	require.NoError(b, os.WriteFile(s.config, []byte(yaml), 0o600))
	s.pool, err = pgxpool.New(b.Context(), s.dsn)
	require.NoError(b, err)
	b.Cleanup(s.pool.Close)
	s.command(b, "migrate")
	for _, schema := range tenants {
		s.exec(b, "CREATE SCHEMA "+pgx.Identifier{schema}.Sanitize())
		s.exec(b, "SELECT outbox_relay.add_tenant($1)", schema)
	}
	return s
}

// join inserts an endpoint for each URL, the n-th with a subscription to the type that typeOf names for it.
func (s *site) join(b testing.TB, schema string, urls []string, typeOf func(n int) string, settings string) {
	b.Helper()
	types := make([]string, len(urls))
	for i := range urls {
		types[i] = typeOf(i)
	}
	s.exec(b, fmt.Sprintf(`WITH u AS (SELECT url, type, gen_random_uuid() AS id FROM unnest($1::text[], $2::text[]) u (url, type)),
		t AS (INSERT INTO %[1]s.webhook_event_types (event_type, category, display_name) SELECT DISTINCT type, 'x', type FROM u RETURNING id, event_type),
		e AS (INSERT INTO %[1]s.webhook_endpoints (id, name, endpoint_url, secret_token, timeout_seconds, created_by_user_id)
			SELECT u.id, 'scenario', u.url, 'secret', 5, u.id FROM u)
		INSERT INTO %[1]s.webhook_subscriptions (endpoint_id, event_type_id, event_type) SELECT u.id, t.id, u.type FROM u JOIN t ON t.event_type = u.type`,
		pgx.Identifier{schema}.Sanitize()), urls, types)
	if settings != "" {
		s.exec(b, "UPDATE "+pgx.Identifier{schema}.Sanitize()+".webhook_endpoints SET "+settings)
	}
}

// burst commits n events in transactions of so many each, their types in turn.
func (s *site) burst(ctx context.Context, schema string, n, each int, types []string) error {
	for done := 0; done < n; done += each {
		_, err := s.pool.Exec(ctx, fmt.Sprintf(`INSERT INTO %s.webhook_events (event_type, aggregate_id, aggregate_type, event_data)
			SELECT ($3::text[])[1 + (i %% cardinality($3::text[]))], gen_random_uuid(), 'order', jsonb_build_object('n', i, 'note', repeat('x', 200))
			FROM generate_series($1::int, $1::int + $2::int - 1) i`, pgx.Identifier{schema}.Sanitize()), done, min(each, n-done), types)
		if err != nil {
			return err
		}
	}
	return nil
}

// pace inserts one event of each type in turn at a rate until ctx is done, and returns when each was committed.
func (s *site) pace(ctx context.Context, b testing.TB, schema string, rate float64, types []string) map[string]time.Time {
	committed := make(map[string]time.Time)
	tick := time.NewTicker(time.Duration(float64(time.Second) / rate))
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return committed
		case <-tick.C:
		}
		id := outbox.NewUUID()
		_, err := s.pool.Exec(context.WithoutCancel(ctx), fmt.Sprintf(`INSERT INTO %s.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
			VALUES ($1, $2, $1, 'order', '{"n": 1}')`, pgx.Identifier{schema}.Sanitize()), id, types[i%len(types)])
		if err != nil {
			b.Error(err)
			return committed
		}
		committed[id.String()] = time.Now()
	}
}

// delays matches commits with arrivals. What has not arrived counts as missing.
func delays(committed, arrived map[string]time.Time) (list []time.Duration, missing int) {
	for id, at := range committed {
		if got, ok := arrived[id]; ok {
			list = append(list, got.Sub(at))
		} else {
			missing++
		}
	}
	slices.Sort(list)
	return list, missing
}

func quantile(list []time.Duration, q float64) float64 {
	if len(list) == 0 {
		return 0
	}
	return float64(list[int(q*float64(len(list)-1))].Microseconds()) / 1000
}

// cpu is the time on a processor that the relay has had.
func (p *relayProcess) cpu(b testing.TB) time.Duration {
	b.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	require.NoError(b, err)
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	user, err := strconv.Atoi(fields[11])
	require.NoError(b, err)
	system, err := strconv.Atoi(fields[12])
	require.NoError(b, err)
	return time.Duration(user+system) * 10 * time.Millisecond
}
