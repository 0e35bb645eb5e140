package relay_test

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/neo-commons/outbox-relay/relay"
)

// BenchmarkDrainTraced drains the same backlog without traces, with one in a hundred recorded, with all of them, and with a line of the log for each attempt,
// one after the other in each round. The spans go to a collector in a process of its own. The ratios to the drain without are the result.
func BenchmarkDrainTraced(b *testing.B) {
	const events = 50_000
	url, count := counter(b)
	collector, _ := counter(b)
	s := newDrainSite(b, url)
	nowhere, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, nowhere.Close()) })
	traced := func(share float64) func(*relay.Options) {
		return func(o *relay.Options) {
			exporter, err := otlptracehttp.New(b.Context(), otlptracehttp.WithEndpoint(strings.TrimPrefix(collector, "http://")), otlptracehttp.WithInsecure())
			require.NoError(b, err)
			provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithIDGenerator(relay.SpanIDs{}),
				sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(share))))
			b.Cleanup(func() { require.NoError(b, provider.Shutdown(context.WithoutCancel(b.Context()))) })
			o.Tracing = &relay.Tracing{Tracer: provider.Tracer("bench"), Headers: true}
		}
	}
	rounds := []struct {
		name string
		set  func(*relay.Options)
		took time.Duration
	}{
		{"off", func(*relay.Options) {}, 0},
		{"info", func(o *relay.Options) { o.Log = slog.New(slog.NewJSONHandler(nowhere, nil)) }, 0},
		{"1%", traced(.01), 0},
		{"all", traced(1), 0},
		{"debug", func(o *relay.Options) {
			o.Log = slog.New(slog.NewJSONHandler(nowhere, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}, 0},
	}
	n := 0
	for b.Loop() {
		for i := range rounds {
			r := &rounds[(n+i)%len(rounds)] // none always comes first
			s.insert(b, events)
			r.took += s.drain(b, count, events, r.set)
		}
		n++
	}
	for i := range rounds {
		r := &rounds[i]
		b.ReportMetric(float64(events)*float64(n)/r.took.Seconds(), r.name+"/s")
		if i > 0 {
			b.ReportMetric(rounds[0].took.Seconds()/r.took.Seconds(), r.name+"/off")
		}
	}
	b.ReportMetric(0, "ns/op")
}
