package main

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkScenarioManyTenants: 1,000 tenants with 10 endpoints each: the start, the idle load, and the drain against that of one tenant, in turns, of which the
// medians count. The first events of a tenant have PostgreSQL read and plan what it needs for its tables, on each connection: some 2 ms. So the second half of
// each drain counts, and the first apart.
func BenchmarkScenarioManyTenants(b *testing.B) {
	const many, drains = 1000, 5
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 20*time.Minute)
		one, all := newTenants(ctx, b, 1), newTenants(ctx, b, many)
		first := startRelay(b, all.config)
		began := time.Now()
		all.burst(ctx, b, 1)
		all.await(ctx, b)
		start := time.Since(began)
		idle := idleLoad(ctx, b, first)
		_, exit := first.stop(b)
		require.NoError(b, exit)
		var cold, warm, peaks, singles []float64
		for range drains {
			oneCold, single, _ := one.drain(ctx, b)
			allCold, rate, peak := all.drain(ctx, b)
			cold, warm = append(cold, allCold/oneCold), append(warm, rate/single)
			peaks, singles = append(peaks, peak), append(singles, single)
		}
		cancel()
		b.ReportMetric(start.Seconds(), "start-s")
		b.ReportMetric(100*idle, "idle-%")
		b.ReportMetric(median(singles), "one-tenant/s")
		b.ReportMetric(median(warm), "ratio")
		b.ReportMetric(slices.Min(warm), "worst-ratio")
		b.ReportMetric(median(cold), "cold-ratio")
		b.ReportMetric(slices.Max(peaks), "peak-MB")
	}
}

func median(list []float64) float64 {
	slices.Sort(list)
	return list[len(list)/2]
}

// tenants are some on a server of their own, each with ten endpoints.
type tenants struct {
	*site
	crowd *crowd
	names []string
	types []string
	sent  int64
}

func newTenants(ctx context.Context, b *testing.B, n int) *tenants {
	b.Helper()
	const each = 10
	t := &tenants{crowd: newCrowd(b, each, each)}
	for i := range n {
		t.names = append(t.names, fmt.Sprintf("t%d", i))
	}
	t.site = newScene(b, "", t.names...)
	var urls []string
	for i := range each {
		urls, t.types = append(urls, t.crowd.url(each, i, "ok")), append(t.types, own(i))
	}
	for _, schema := range t.names {
		t.join(b, schema, urls, own, "")
	}
	reader := startRelay(b, t.config) // through the log of the tenants' making
	t.burst(ctx, b, 1)
	t.await(ctx, b)
	_, exit := reader.stop(b)
	require.NoError(b, exit)
	return t
}

// burst inserts n events of the first tenant.
func (t *tenants) burst(ctx context.Context, b *testing.B, n int) {
	b.Helper()
	require.NoError(b, t.site.burst(ctx, t.names[0], n, 1, t.types[:1]))
	t.sent += int64(n)
}

func (t *tenants) await(ctx context.Context, b *testing.B) {
	b.Helper()
	t.crowd.await(ctx, b, t.sent)
}

// drain has a relay deliver a backlog of all tenants, and returns how many a second that were in the first half and in the second, and the peak of its memory
// in MiB.
func (t *tenants) drain(ctx context.Context, b *testing.B) (cold, warm, peak float64) {
	b.Helper()
	const events, turns = 200_000, 5
	for range turns {
		for _, schema := range t.names {
			require.NoError(b, t.site.burst(ctx, schema, events/turns/len(t.names), 100, t.types))
		}
	}
	p := startRelay(b, t.config)
	t.crowd.await(ctx, b, t.sent+1)
	began := time.Now()
	t.crowd.await(ctx, b, t.sent+events/2)
	half := time.Now()
	t.sent += events
	t.await(ctx, b)
	cold, warm = events/2/half.Sub(began).Seconds(), events/2/time.Since(half).Seconds()
	peak = float64(p.peakMemory(b)) / (1 << 20)
	_, exit := p.stop(b)
	require.NoError(b, exit)
	return cold, warm, peak
}

// idleLoad is the share of a processor that a relay needs with nothing to do. The first look at all that the tenants have is part of the start, and over within
// half a minute.
func idleLoad(ctx context.Context, b *testing.B, p *relayProcess) float64 {
	b.Helper()
	var before time.Duration
	for range 2 {
		before = p.cpu(b)
		select {
		case <-time.After(time.Minute):
		case <-ctx.Done():
		}
	}
	return (p.cpu(b) - before).Seconds() / 60
}
