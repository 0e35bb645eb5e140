package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// own gives every endpoint a type of its own.
func own(n int) string { return fmt.Sprintf("type.n%d", n) }

// BenchmarkScenarioBadNeighbours: 47 of 50 endpoints hang, refuse, reset or answer 500. The three healthy ones get 300 events a second each, the others
// 30 a second each, of which none arrives. Reported is what the healthy ones receive in relation to what they receive alone.
func BenchmarkScenarioBadNeighbours(b *testing.B) {
	const healthy, all, rate, badRate, span = 3, 50, 300.0, 30.0, 20 * time.Second
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 5*time.Minute)
		c := newCrowd(b, all, all)
		s := newScene(b, "", "acme")
		refused, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // closed at once: its port refuses
		require.NoError(b, err)
		require.NoError(b, refused.Close())
		var urls, good, bad []string
		for i := range all {
			switch {
			case i < healthy:
				urls, good = append(urls, c.url(all, i, "ok")), append(good, own(i))
				continue
			case i%4 == 0:
				urls = append(urls, c.url(all, i, "hang"))
			case i%4 == 1:
				urls = append(urls, fmt.Sprintf("http://%s/refuse/%d", refused.Addr(), i))
			case i%4 == 2:
				urls = append(urls, c.url(all, i, "reset"))
			default:
				urls = append(urls, c.url(all, i, "error"))
			}
			bad = append(bad, own(i))
		}
		s.join(b, "acme", urls, own, "")
		p := startRelay(b, s.config)
		s.awaitLeader(ctx, b)
		round := func(withBad bool) (count int64, list []time.Duration, missing int, lag time.Duration) {
			before := c.total.Load()
			c.arrivals(true)
			run, stop := context.WithTimeout(ctx, span)
			defer stop()
			var wg sync.WaitGroup
			var mu sync.Mutex
			committed := make(map[string]time.Time)
			for _, kind := range good {
				wg.Go(func() {
					own := s.pace(run, b, "acme", rate, []string{kind})
					mu.Lock()
					defer mu.Unlock()
					maps.Copy(committed, own)
				})
			}
			if withBad {
				for part := range 3 {
					wg.Go(func() { s.pace(run, b, "acme", badRate*float64(len(bad))/3, bad[part*len(bad)/3:(part+1)*len(bad)/3]) })
				}
				wg.Go(func() { lag = s.worstLag(run, b) })
			}
			wg.Wait()
			c.awaitQuiet(ctx, b, before+int64(len(committed)))
			list, missing = delays(committed, c.arrivals(false))
			return c.total.Load() - before, list, missing, lag
		}
		alone, quiet, lost, _ := round(false)
		require.Zero(b, lost)
		beside, busy, lost, lag := round(true)
		require.Zero(b, lost)
		cancel()
		b.ReportMetric(float64(alone)/span.Seconds(), "alone/s")
		b.ReportMetric(float64(beside)/span.Seconds(), "beside/s")
		b.ReportMetric(float64(beside)/float64(alone), "ratio")
		b.ReportMetric(quantile(quiet, .99), "alone-p99-ms")
		b.ReportMetric(quantile(busy, .99), "beside-p99-ms")
		b.ReportMetric(lag.Seconds(), "worst-lag-s")
		b.ReportMetric(float64(p.peakMemory(b))/(1<<20), "peak-MB")
		_, exit := p.stop(b)
		require.NoError(b, exit)
	}
}

// BenchmarkScenarioSlowReceivers: every one of 1,000 endpoints answers after 100 ms.
func BenchmarkScenarioSlowReceivers(b *testing.B) {
	const endpoints, hosts, events = 1000, 50, 100_000
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 5*time.Minute)
		c := newCrowd(b, hosts, endpoints)
		s := newScene(b, "", "acme")
		var urls, types []string
		for i := range endpoints {
			urls, types = append(urls, c.url(hosts, i, "slow")), append(types, own(i))
		}
		s.join(b, "acme", urls, own, "")
		require.NoError(b, s.burst(ctx, "acme", events, 1000, types))
		p := startRelay(b, s.config)
		c.await(ctx, b, events/10)
		began, cpu := time.Now(), p.cpu(b)
		c.await(ctx, b, events*9/10)
		took := time.Since(began)
		b.ReportMetric(events*.8/took.Seconds(), "deliveries/s")
		b.ReportMetric((p.cpu(b)-cpu).Seconds()/took.Seconds(), "cores")
		c.await(ctx, b, events)
		cancel()
		b.ReportMetric(float64(p.peakMemory(b))/(1<<20), "peak-MB")
		_, exit := p.stop(b)
		require.NoError(b, exit)
	}
}

// BenchmarkScenarioBurst: 20 tenants commit five events a second each, when another one commits 200,000 in transactions of 100 from two writers. The
// delays are of those that the others commit from then on until all has been delivered.
func BenchmarkScenarioBurst(b *testing.B) {
	const others, burst = 20, 200_000
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
		tenants := []string{"noisy"}
		for i := range others {
			tenants = append(tenants, fmt.Sprintf("quiet%d", i))
		}
		c := newCrowd(b, others+1, others+1)
		s := newScene(b, "", tenants...)
		for i, schema := range tenants {
			s.join(b, schema, []string{c.url(others+1, i, "ok")}, own, "")
		}
		p := startRelay(b, s.config)
		s.awaitLeader(ctx, b)
		run, stop := context.WithCancel(ctx)
		c.arrivals(true)
		var wg sync.WaitGroup
		var mu sync.Mutex
		committed := make(map[string]time.Time)
		for _, schema := range tenants[1:] {
			wg.Go(func() {
				mine := s.pace(run, b, schema, 5, []string{own(0)})
				mu.Lock()
				defer mu.Unlock()
				maps.Copy(committed, mine)
			})
		}
		c.await(ctx, b, 2*others)
		began := time.Now()
		var writers sync.WaitGroup
		for range 2 {
			writers.Go(func() { require.NoError(b, s.burst(ctx, "noisy", burst/2, 100, []string{own(0)})) })
		}
		writers.Wait()
		written := time.Since(began)
		for c.accepted[0].Load() < burst { // the others go on until all of it is delivered
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
				require.FailNow(b, "gave up waiting", "%d arrived", c.accepted[0].Load())
			}
		}
		delivered := time.Since(began)
		stop()
		wg.Wait()
		c.awaitQuiet(ctx, b, burst+int64(len(committed)))
		maps.DeleteFunc(committed, func(_ string, at time.Time) bool { return at.Before(began) })
		list, missing := delays(committed, c.arrivals(false))
		require.Zero(b, missing)
		cancel()
		b.ReportMetric(written.Seconds(), "written-s")
		b.ReportMetric(delivered.Seconds(), "delivered-s")
		b.ReportMetric(float64(len(list)), "others")
		b.ReportMetric(quantile(list, .5), "others-p50-ms")
		b.ReportMetric(quantile(list, .99), "others-p99-ms")
		b.ReportMetric(quantile(list, 1), "others-max-ms")
		b.ReportMetric(float64(p.peakMemory(b))/(1<<20), "peak-MB")
		_, exit := p.stop(b)
		require.NoError(b, exit)
	}
}

// awaitQuiet waits until so many have been accepted.
func (c *crowd) awaitQuiet(ctx context.Context, b testing.TB, n int64) {
	b.Helper()
	patience, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	c.await(patience, b, n)
}

// awaitLeader waits until the slot is in use.
func (s *site) awaitLeader(ctx context.Context, b testing.TB) {
	b.Helper()
	for active := false; !active; {
		require.NoError(b, s.pool.QueryRow(ctx, `SELECT coalesce(bool_or(active), false) FROM pg_replication_slots WHERE slot_name = $1`, s.slot).Scan(&active))
		select {
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// worstLag samples how old the oldest position is that is not confirmed, until ctx is done, and returns the worst.
func (s *site) worstLag(ctx context.Context, b testing.TB) (worst time.Duration) {
	type mark struct {
		at  time.Time
		lsn string
	}
	var marks []mark
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return worst
		case <-tick.C:
		}
		var lsn string
		var passed int
		var list []string
		for _, m := range marks {
			list = append(list, m.lsn)
		}
		err := s.pool.QueryRow(context.WithoutCancel(ctx), `SELECT pg_current_wal_lsn()::text, (SELECT count(*) FROM unnest($2::text[]) m
			WHERE m::pg_lsn <= s.confirmed_flush_lsn) FROM pg_replication_slots s WHERE slot_name = $1`, s.slot, list).Scan(&lsn, &passed)
		if err != nil {
			b.Error(err)
			return worst
		}
		marks = append(marks[passed:], mark{time.Now(), lsn})
		worst = max(worst, time.Since(marks[0].at))
	}
}

// BenchmarkScenarioOutage: an endpoint with a limit of 1,000 a second and 8 at a time comes back from an outage with 50,000 events waiting, while another
// gets 50 a second.
func BenchmarkScenarioOutage(b *testing.B) {
	const events, rate, concurrency = 50_000, 1000, 8
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
		c := newCrowd(b, 2, 2)
		c.setMood("error")
		s := newScene(b, "breaker:\n  open_for: 5s\nretry:\n  backoff: 5s\n  max_backoff: 10s\n", "acme")
		s.join(b, "acme", []string{c.url(2, 0, "moody"), c.url(2, 1, "ok")}, own, "")
		s.exec(b, `UPDATE acme.webhook_endpoints SET rate_limit_per_second = $1, max_concurrency = $2, retry_backoff_seconds = 5 WHERE endpoint_url LIKE '%moody%'`, rate, concurrency)
		p := startRelay(b, s.config)
		s.awaitLeader(ctx, b)
		require.NoError(b, s.burst(ctx, "acme", events, 500, []string{own(0)}))
		for waiting := 0; waiting < events; {
			require.NoError(b, s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&waiting))
		}
		run, stop := context.WithCancel(ctx)
		c.arrivals(true)
		var committed map[string]time.Time
		var wg sync.WaitGroup
		wg.Go(func() { committed = s.pace(run, b, "acme", 50, []string{own(1)}) })
		c.peak[0].Store(0)
		c.setMood("ok")
		back := time.Now()
		tick := time.NewTicker(time.Second)
		var most, before int64
		for c.accepted[0].Load() < events {
			<-tick.C
			now := c.accepted[0].Load()
			most, before = max(most, now-before), now
			require.NoError(b, ctx.Err())
		}
		tick.Stop()
		took := time.Since(back)
		stop()
		wg.Wait()
		c.awaitQuiet(ctx, b, events+int64(len(committed)))
		list, missing := delays(committed, c.arrivals(false))
		require.Zero(b, missing)
		cancel()
		b.ReportMetric(took.Seconds(), "drained-s")
		b.ReportMetric(float64(most), "most-in-a-second")
		b.ReportMetric(float64(c.peak[0].Load()), "most-at-once")
		b.ReportMetric(quantile(list, .99), "others-p99-ms")
		b.ReportMetric(float64(p.peakMemory(b))/(1<<20), "peak-MB")
		_, exit := p.stop(b)
		require.NoError(b, exit)
	}
}

// BenchmarkScenarioReplicas: 40,000 deliveries that wait in the queue for 20 endpoints, worked off by one replica and by two.
func BenchmarkScenarioReplicas(b *testing.B) {
	const events, endpoints = 40_000, 20
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
		work := func(replicas int) (rate float64, twice int64) {
			c := newCrowd(b, endpoints, endpoints)
			s := newScene(b, "", "acme")
			var urls, types []string
			for i := range endpoints {
				urls, types = append(urls, c.url(endpoints, i, "ok")), append(types, own(i))
			}
			s.join(b, "acme", urls, own, "paused_at = now()")
			var list []*relayProcess
			for range replicas {
				list = append(list, startRelay(b, s.config))
			}
			require.NoError(b, s.burst(ctx, "acme", events, 500, types))
			for waiting := 0; waiting < events; {
				require.NoError(b, s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&waiting))
			}
			c.arrivals(true)
			began := time.Now()
			s.exec(b, `SELECT outbox_relay.resume_endpoint('acme', id) FROM acme.webhook_endpoints`)
			c.await(ctx, b, events)
			rate = events / time.Since(began).Seconds()
			for waiting := 1; waiting > 0; {
				require.NoError(b, s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&waiting))
			}
			for _, p := range list {
				_, exit := p.stop(b)
				require.NoError(b, exit)
			}
			require.Len(b, c.arrivals(false), events)
			return rate, c.total.Load() - events
		}
		one, twice := work(1)
		require.Zero(b, twice)
		two, twice := work(2)
		cancel()
		b.ReportMetric(one, "one/s")
		b.ReportMetric(two, "two/s")
		b.ReportMetric(two/one, "ratio")
		b.ReportMetric(float64(twice), "sent-twice")
	}
}
