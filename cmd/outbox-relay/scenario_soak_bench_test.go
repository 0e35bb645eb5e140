package main

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// mark is what should stay flat while a relay works for hours.
type mark struct {
	rss, goroutines, descriptors, retained float64 // of the relay, and WAL that the server keeps for it
	progress, queue, health                float64 // sizes of the relay's own tables with their indexes
	waiting                                float64 // deliveries in the queue
	p99                                    float64 // from commit to receipt at the healthy endpoints since the mark before, in ms
}

// BenchmarkScenarioSoak has a relay work for OUTBOX_RELAY_BENCH_SOAK (2m) at OUTBOX_RELAY_BENCH_RATE (1000) events a second: three tenants with a healthy
// endpoint each, one of which also has one that answers after 100 ms, and another one that is down every other minute. What it holds after a sixth of the
// time stands beside what it holds at the end.
func BenchmarkScenarioSoak(b *testing.B) {
	long, rate := 2*time.Minute, 1000
	if d, err := time.ParseDuration(os.Getenv("OUTBOX_RELAY_BENCH_SOAK")); err == nil {
		long = d
	}
	if n, err := strconv.Atoi(os.Getenv("OUTBOX_RELAY_BENCH_RATE")); err == nil {
		rate = n
	}
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), long+10*time.Minute)
		c := newCrowd(b, 5, 5)
		tenants := []string{"one", "two", "three"}
		s := newScene(b, "breaker:\n  open_for: 5s\nretry:\n  backoff: 1s\n  max_backoff: 10s\n  attempts: 100\n", tenants...)
		s.listen(b)
		for i, tenant := range tenants {
			s.join(b, tenant, []string{c.url(5, i, "ok")}, own, "")
		}
		s.join(b, "one", []string{c.url(5, 3, "slow")}, func(int) string { return own(3) }, "")
		s.join(b, "two", []string{c.url(5, 4, "moody")}, func(int) string { return own(4) }, "")
		s.exec(b, "UPDATE two.webhook_endpoints SET max_retry_attempts = 10, retry_backoff_seconds = 1 WHERE endpoint_url LIKE '%moody%'")
		p := startRelay(b, s.config)
		s.awaitLeader(ctx, b)
		run, stop := context.WithTimeout(ctx, long)
		var wg sync.WaitGroup
		for i, tenant := range tenants {
			types := []string{own(0)}
			if i < 2 { // one in ten for the endpoint that is slow, or moody
				types = []string{own(0), own(0), own(0), own(0), own(3 + i), own(0), own(0), own(0), own(0), own(0)}
			}
			wg.Go(func() { s.steady(run, b, tenant, rate/len(tenants), types) })
		}
		wg.Go(func() { // moods
			for bad := true; ; bad = !bad {
				select {
				case <-time.After(min(time.Minute, long/10)):
				case <-run.Done():
					c.setMood("ok")
					return
				}
				c.setMood(map[bool]string{true: "error", false: "ok"}[bad])
			}
		})
		began := time.Now()
		sixth := s.soakMark(run, ctx, b, c, p, began.Add(long/6))
		end := s.soakMark(run, ctx, b, c, p, began.Add(long))
		stop()
		wg.Wait()
		var events int64
		for _, tenant := range tenants {
			var n int64
			require.NoError(b, s.pool.QueryRow(ctx, "SELECT count(*) FROM "+tenant+".webhook_events").Scan(&n))
			events += n
		}
		c.await(ctx, b, events)
		cancel()
		b.ReportMetric(float64(events)/long.Seconds(), "events/s")
		for _, m := range []struct {
			at string
			mark
		}{{"sixth", sixth}, {"end", end}} {
			b.ReportMetric(m.rss, m.at+"-rss-MB")
			b.ReportMetric(m.goroutines, m.at+"-goroutines")
			b.ReportMetric(m.descriptors, m.at+"-descriptors")
			b.ReportMetric(m.retained, m.at+"-wal-MB")
			b.ReportMetric(m.progress, m.at+"-progress-kB")
			b.ReportMetric(m.queue, m.at+"-queue-kB")
			b.ReportMetric(m.health, m.at+"-health-kB")
			b.ReportMetric(m.waiting, m.at+"-waiting")
			b.ReportMetric(m.p99, m.at+"-p99-ms")
		}
		_, exit := p.stop(b)
		require.NoError(b, exit)
	}
}

// listen has the relay serve its metrics.
func (s *site) listen(b testing.TB) {
	b.Helper()
	yaml, err := os.ReadFile(s.config)
	require.NoError(b, err)
	require.NoError(b, os.WriteFile(s.config, []byte(strings.Replace(string(yaml), `listen: ""`, "listen: 127.0.0.1:0", 1)), 0o600))
}

// steady inserts at a rate, in ten transactions a second, until ctx is done.
func (s *site) steady(ctx context.Context, b testing.TB, schema string, rate int, types []string) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.burst(context.WithoutCancel(ctx), schema, max(rate/10, 1), max(rate/10, 1), types); err != nil {
			b.Error(err)
			return
		}
	}
}

var servedAt = regexp.MustCompile(`"serving health and metrics","address":"([^"]+)"`)

// soakMark waits until a time, says every minute how it stands, and looks at everything then.
func (s *site) soakMark(run, ctx context.Context, b testing.TB, c *crowd, p *relayProcess, at time.Time) (m mark) {
	b.Helper()
	for {
		select {
		case <-time.After(min(time.Minute, time.Until(at))):
		case <-ctx.Done():
			require.NoError(b, ctx.Err())
		}
		m = s.measure(ctx, b, p)
		b.Logf("%s: accepted %d, %+v", time.Now().Format(time.TimeOnly), c.total.Load(), m)
		if time.Now().After(at) || run.Err() != nil {
			break
		}
	}
	// Two hundred single events, whose way is measured.
	probe, done := context.WithTimeout(ctx, 10*time.Second)
	defer done()
	c.arrivals(true)
	committed := s.pace(probe, b, "three", 20, []string{own(0)})
	for settled := 0; settled < 50 && c.arrivedOf(committed) < len(committed); settled++ {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	list, missing := delays(committed, c.arrivals(false))
	require.Zero(b, missing)
	m.p99 = quantile(list, .99)
	return m
}

// arrivedOf counts how many of these have arrived.
func (c *crowd) arrivedOf(committed map[string]time.Time) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range committed {
		if _, ok := c.arrived[id]; ok {
			n++
		}
	}
	return n
}

func (s *site) measure(ctx context.Context, b testing.TB, p *relayProcess) (m mark) {
	b.Helper()
	found := servedAt.FindStringSubmatch(p.said(b))
	require.NotNil(b, found)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+found[1]+"/metrics", nil)
	require.NoError(b, err)
	res, err := http.DefaultClient.Do(req)
	require.NoError(b, err)
	defer func() { _ = res.Body.Close() }()
	for lines := bufio.NewScanner(res.Body); lines.Scan(); {
		name, text, _ := strings.Cut(lines.Text(), " ")
		value, err := strconv.ParseFloat(text, 64)
		if err != nil {
			continue
		}
		switch name {
		case "process_resident_memory_bytes":
			m.rss = value / (1 << 20)
		case "go_goroutines":
			m.goroutines = value
		case "process_open_fds":
			m.descriptors = value
		case "outbox_relay_slot_retained_bytes":
			m.retained = value / (1 << 20)
		case "outbox_relay_queue_deliveries":
			m.waiting = value
		}
	}
	for table, size := range map[string]*float64{"progress": &m.progress, "retry_queue": &m.queue, "endpoint_health": &m.health} {
		require.NoError(b, s.pool.QueryRow(ctx, fmt.Sprintf("SELECT pg_total_relation_size('outbox_relay.%s')::float8 / 1024", table)).Scan(size))
	}
	return m
}
