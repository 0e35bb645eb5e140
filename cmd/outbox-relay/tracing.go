package main

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/neo-commons/outbox-relay/relay"
)

// Traces are switched on by OpenTelemetry's own variables and by nothing else: what they say is the same for every program, and whoever runs a collector
// has them at hand. OTEL_TRACES_EXPORTER has to name the exporter. Its default elsewhere is otlp; here it is none.

// flushTraces bounds how long the end of the process waits for the last spans to be sent.
const flushTraces = 2 * time.Second

// tracing is what becomes of spans. The zero value makes none.
type tracing struct {
	relay    *relay.Tracing
	provider *sdktrace.TracerProvider
}

// newTracing reads the environment. The error is a *configError.
func newTracing(ctx context.Context, registry prometheus.Registerer, log *slog.Logger) (t tracing, err error) {
	if on, err := tracesAsked(); !on {
		return t, err
	}
	otel.SetLogger(logr.Discard()) // it prints headers that it cannot read, and they hold keys
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		log.Warn("traces do not work as they should", "error", withoutURL(err))
	}))
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		var faults configError
		faults.add("OTEL_EXPORTER_OTLP_…", "", withoutURL(err).Error())
		return t, &faults
	}
	about, err := resource.New(ctx,
		resource.WithAttributes(semconv.ServiceName("outbox-relay"), semconv.ServiceVersion(version())),
		resource.WithHost(), resource.WithTelemetrySDK(), resource.WithFromEnv(),
	)
	if err != nil { // what could be read is in it
		log.Warn("OTEL_RESOURCE_ATTRIBUTES cannot be read in full", "error", err)
	}
	t.provider = sdktrace.NewTracerProvider(
		sdktrace.WithIDGenerator(relay.SpanIDs{}), sdktrace.WithResource(about), sdktrace.WithSpanProcessor(newSpanQueue(exporter, registry)),
	)
	t.relay = &relay.Tracing{
		Tracer:  t.provider.Tracer("github.com/neo-commons/outbox-relay/relay"),
		Headers: listed("OTEL_PROPAGATORS", "tracecontext"),
	}
	log.Info("traces are on", "receivers_get_traceparent", t.relay.Headers)
	return t, nil
}

// tracesAsked tells whether somebody wants traces, and how they are sent.
func tracesAsked() (bool, error) {
	var faults configError
	exporter := os.Getenv("OTEL_TRACES_EXPORTER")
	if exporter == "" || exporter == "none" || strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") {
		return false, nil
	}
	if exporter != "otlp" {
		faults.add("OTEL_TRACES_EXPORTER", strconv.Quote(exporter), "must be otlp, or none")
	}
	for _, name := range []string{"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"} {
		protocol := os.Getenv(name)
		if protocol != "" && protocol != "http/protobuf" {
			faults.add(name, strconv.Quote(protocol), "must be http/protobuf, which collectors take at port 4318")
		}
		if protocol != "" {
			break // the first one counts
		}
	}
	if len(faults.faults) > 0 {
		return false, &faults
	}
	return true, nil
}

// listed tells whether a variable, a list, has a value; it has if it is not set.
func listed(name, value string) bool {
	list := os.Getenv(name)
	return list == "" || slices.Contains(strings.Split(strings.ReplaceAll(list, " ", ""), ","), value)
}

// close sends the last spans, as far as there is time.
func (t *tracing) close(ctx context.Context, log *slog.Logger) {
	if t.provider == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTraces)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		log.Warn("the last spans are lost", "error", withoutURL(err))
	}
}

// withoutURL leaves out of an error the URL of a request, which may have a key in it.
func withoutURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// A spanQueue keeps ended spans until the exporter has taken them or given them up, and counts what becomes of each. It is the batch processor's bounded
// queue, which drops spans without a word, behind a bound of its own: so many as that queue holds.
type spanQueue struct {
	sdktrace.SpanProcessor

	limit   int64
	waiting atomic.Int64
	dropped prometheus.Counter
}

// newSpanQueue honours OTEL_BSP_….
func newSpanQueue(exporter sdktrace.SpanExporter, registry prometheus.Registerer) *spanQueue {
	spans := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "outbox_relay", Name: "trace_spans_total", Help: "Spans by what became of them: exported, failed to be, dropped as too many waited.",
	}, []string{"result"})
	registry.MustRegister(spans)
	q := &spanQueue{limit: sdktrace.DefaultMaxQueueSize, dropped: spans.WithLabelValues("dropped")}
	if n, err := strconv.Atoi(os.Getenv("OTEL_BSP_MAX_QUEUE_SIZE")); err == nil && n > 0 {
		q.limit = int64(n)
	}
	q.SpanProcessor = sdktrace.NewBatchSpanProcessor(&countedExporter{
		SpanExporter: exporter, waiting: &q.waiting, exported: spans.WithLabelValues("exported"), failed: spans.WithLabelValues("failed"),
	}, sdktrace.WithMaxQueueSize(int(q.limit)))
	return q
}

// OnEnd takes a span, or drops it. It does not wait.
func (q *spanQueue) OnEnd(span sdktrace.ReadOnlySpan) {
	if q.waiting.Add(1) > q.limit {
		q.waiting.Add(-1)
		q.dropped.Inc()
		return
	}
	q.SpanProcessor.OnEnd(span)
}

// A countedExporter counts what it is given.
type countedExporter struct {
	sdktrace.SpanExporter

	waiting          *atomic.Int64
	exported, failed prometheus.Counter
}

// ExportSpans implements sdk/trace.SpanExporter.
func (e *countedExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	e.waiting.Add(int64(-len(spans)))
	if err != nil {
		e.failed.Add(float64(len(spans)))
		return err
	}
	e.exported.Add(float64(len(spans)))
	return nil
}
