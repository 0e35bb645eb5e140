package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/neo-commons/outbox-relay/outbox"
)

// traceCollector takes spans as a collector does.
type traceCollector struct {
	*httptest.Server

	mu       sync.Mutex
	spans    []*otlp.Span
	resource map[string]string
	raw      []byte // all that has come, as it came
	faults   []string
}

func newTraceCollector(t testing.TB) *traceCollector {
	t.Helper()
	c := &traceCollector{}
	c.Server = httptest.NewServer(c)
	t.Cleanup(c.Close)
	return c
}

func (c *traceCollector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var request collector.ExportTraceServiceRequest
	if err == nil {
		err = proto.Unmarshal(body, &request)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || r.URL.Path != "/v1/traces" || r.Header.Get("Content-Type") != "application/x-protobuf" {
		c.faults = append(c.faults, fmt.Sprintf("%s %s: %v", r.URL.Path, r.Header.Get("Content-Type"), err))
	}
	c.raw = append(c.raw, body...)
	for _, rs := range request.GetResourceSpans() {
		c.resource = attributesOf(rs.GetResource().GetAttributes())
		for _, ss := range rs.GetScopeSpans() {
			c.spans = append(c.spans, ss.GetSpans()...)
		}
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
	w.WriteHeader(http.StatusOK)
}

// environment has a relay send all its spans here, soon.
func (c *traceCollector) environment(more ...string) []string {
	return append([]string{"OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_ENDPOINT=" + c.URL, "OTEL_BSP_SCHEDULE_DELAY=100"}, more...)
}

// bytes is all that has come, as it came.
func (c *traceCollector) bytes() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.raw)
}

// all returns the spans of a name, in the order of their start.
func (c *traceCollector) all(name string) (list []*otlp.Span) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.GetName() == name {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b *otlp.Span) int {
		return int(int64(a.GetStartTimeUnixNano()) - int64(b.GetStartTimeUnixNano()))
	})
	return list
}

// check looks at all that has come.
func (c *traceCollector) check(t *testing.T) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	require.Empty(t, c.faults)
	assert.Equal(t, "outbox-relay", c.resource["service.name"])
	assert.Equal(t, "test", c.resource["deployment.environment.name"])
	for _, planted := range []string{"planted-query-value", "planted-payload-value", "?key", "whsec_"} {
		assert.NotContains(t, string(c.raw), planted)
	}
}

// The names of spans.
const (
	spanEvent    = "process webhook_events"
	spanDelivery = "delivery"
	spanAttempt  = "POST"
)

func attributesOf(list []*common.KeyValue) map[string]string {
	m := make(map[string]string)
	for _, a := range list {
		switch v := a.GetValue().GetValue().(type) {
		case *common.AnyValue_StringValue:
			m[a.GetKey()] = v.StringValue
		default:
			m[a.GetKey()] = strings.TrimSpace(a.GetValue().String()[strings.IndexByte(a.GetValue().String(), ':')+1:])
		}
	}
	return m
}

// headers notes the trace context of every request, by event and attempt.
type headers struct {
	mu   sync.Mutex
	seen map[string]http.Header
}

func (h *headers) of(event outbox.UUID, attempt int) http.Header {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.seen[fmt.Sprintf("%s/%d", event, attempt)]
}

// tracedSite has an endpoint that fails the first attempt of each event, and notes the headers of every request.
func tracedSite(t *testing.T) (*site, *headers, outbox.UUID) {
	t.Helper()
	s := newSite(t, "queue:\n  poll: 100ms\nbreaker:\n  failures: 1000\n  failure_ratio: 0\n", func(_ outbox.UUID, attempt string) int {
		if attempt == "1" {
			return http.StatusBadGateway
		}
		return http.StatusOK
	}, "acme")
	h := &headers{seen: make(map[string]http.Header)}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		h.seen[r.Header.Get("webhook-id")+"/"+r.Header.Get("webhook-attempt")] = r.Header
		h.mu.Unlock()
		s.receiver.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	ep := s.endpoint(t, "acme", 3)
	s.exec(t, `UPDATE acme.webhook_endpoints SET endpoint_url = $1`, front.URL+"/"+ep.String()+"?key=planted-query-value")
	s.subscribe(t, "acme", ep, "order.created", "{}")
	return s, h, ep
}

func (s *site) insertTraced(t *testing.T, metadata string) outbox.UUID {
	t.Helper()
	id := outbox.NewUUID()
	s.exec(t, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data, event_metadata)
		VALUES ($1, 'order.created', $1, 'order', '{"card": "planted-payload-value"}', $2)`, id, metadata)
	return id
}

const (
	callerTrace  = "0af7651916cd43dd8448eb211c80319c"
	callerSpan   = "b7ad6b7169203331"
	callerParent = "00-" + callerTrace + "-" + callerSpan + "-01"
)

// TestTraces follows an event that came with a trace, and one that did not, over a failed attempt and a retry.
func TestTraces(t *testing.T) {
	t.Parallel()
	s, sent, ep := tracedSite(t)
	c := newTraceCollector(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := startBinary(t, binary(t), s.config, c.environment("OTEL_RESOURCE_ATTRIBUTES=deployment.environment.name=test")...)
	s.leading(ctx, t)
	before := time.Now()
	joined := s.insertTraced(t, `{"traceparent": "`+callerParent+`", "tracestate": "vendor=1"}`)
	alone := s.insertTraced(t, `{}`)
	s.receiver.await(ctx, t, "both events", func() bool { return s.arrivedAt(ep) == 2 })
	_, exit := p.stop(t) // sends what is left
	require.NoError(t, exit)

	c.check(t)
	for event, trace := range map[outbox.UUID]string{joined: callerTrace, alone: ""} {
		of := func(name string) (list []*otlp.Span) {
			for _, span := range c.all(name) {
				if attributesOf(span.GetAttributes())["messaging.message.id"] == event.String() {
					list = append(list, span)
				}
			}
			return list
		}
		events, deliveries := of(spanEvent), of(spanDelivery)
		require.Len(t, events, 1)
		require.Len(t, deliveries, 2, "the first attempt and its retry")
		root := events[0]
		if trace == "" {
			trace = hex.EncodeToString(root.GetTraceId())
			assert.Empty(t, root.GetParentSpanId())
			assert.Empty(t, deliveries[1].GetParentSpanId())
		} else {
			assert.Equal(t, callerSpan, hex.EncodeToString(root.GetParentSpanId()))
			assert.Equal(t, callerSpan, hex.EncodeToString(deliveries[1].GetParentSpanId()))
			assert.Equal(t, "vendor=1", root.GetTraceState())
		}
		assert.Equal(t, root.GetSpanId(), deliveries[0].GetParentSpanId())
		assert.WithinRange(t, time.Unix(0, int64(root.GetStartTimeUnixNano())), before.Add(-time.Second), time.Now(), "it begins with the COMMIT")
		about := attributesOf(root.GetAttributes())
		assert.Equal(t, "acme", about["outbox_relay.tenant"])
		assert.Equal(t, "webhook_events", about["messaging.destination.name"])
		assert.Equal(t, "order.created", about["outbox_relay.event.type"])

		for i, status := range []string{"retrying", "success"} {
			about := attributesOf(deliveries[i].GetAttributes())
			assert.Equal(t, status, about["outbox_relay.delivery.status"])
			assert.Equal(t, ep.String(), about["outbox_relay.endpoint.id"])
			var attempt *otlp.Span
			for _, span := range c.all(spanAttempt) {
				if string(span.GetParentSpanId()) == string(deliveries[i].GetSpanId()) {
					attempt = span
				}
			}
			require.NotNil(t, attempt)
			assert.Equal(t, trace, hex.EncodeToString(attempt.GetTraceId()))
			assert.Equal(t, trace, hex.EncodeToString(deliveries[i].GetTraceId()))
			assert.Equal(t, otlp.Span_SPAN_KIND_CLIENT, attempt.GetKind())
			got := sent.of(event, i+1)
			assert.Equal(t, "00-"+trace+"-"+hex.EncodeToString(attempt.GetSpanId())+"-01", got.Get("traceparent"))
			about = attributesOf(attempt.GetAttributes())
			assert.Equal(t, "127.0.0.1", about["server.address"])
			assert.Equal(t, []string{"502", "200"}[i], about["http.response.status_code"])
			if i == 0 {
				assert.Equal(t, "502", about["error.type"])
				assert.Equal(t, otlp.Status_STATUS_CODE_ERROR, attempt.GetStatus().GetCode())
			}
			if event == joined {
				assert.Equal(t, "vendor=1", got.Get("tracestate"))
			} else {
				assert.Empty(t, got.Values("tracestate"))
			}
		}
	}
	var kept string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT request_headers->>'traceparent' FROM acme.webhook_deliveries WHERE webhook_event_id = $1`, joined).Scan(&kept))
	assert.Equal(t, callerParent, kept, "the row keeps what the application wrote")
}

// TestTracesSampled: who began the trace decides, and OTEL_TRACES_SAMPLER where nobody has; the receiver is told either way.
func TestTracesSampled(t *testing.T) {
	t.Parallel()
	s, sent, ep := tracedSite(t)
	c := newTraceCollector(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := startBinary(t, binary(t), s.config, c.environment("OTEL_TRACES_SAMPLER=parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG=0.5")...)
	s.leading(ctx, t)
	unwanted := s.insertTraced(t, `{"traceparent": "`+strings.TrimSuffix(callerParent, "1")+`0"}`)
	const events = 60
	ids := make([]outbox.UUID, events)
	for i := range ids {
		ids[i] = s.insertTraced(t, `{}`)
	}
	s.receiver.await(ctx, t, "the events", func() bool { return s.arrivedAt(ep) == events+1 })
	_, exit := p.stop(t)
	require.NoError(t, exit)

	recorded := make(map[string]int)
	for _, span := range c.all(spanDelivery) {
		recorded[attributesOf(span.GetAttributes())["messaging.message.id"]]++
	}
	assert.NotContains(t, recorded, unwanted.String())
	got := sent.of(unwanted, 1).Get("traceparent")
	assert.Regexp(t, "^00-"+callerTrace+"-[0-9a-f]{16}-00$", got)
	assert.NotContains(t, got, callerSpan)
	assert.Greater(t, len(recorded), events/6, "a half is meant")
	assert.Less(t, len(recorded), events*5/6)
	for _, id := range ids {
		first, again := sent.of(id, 1).Get("traceparent"), sent.of(id, 2).Get("traceparent")
		require.Len(t, first, 55)
		require.Len(t, again, 55)
		assert.Equal(t, first[:36], again[:36], "a retry belongs to the same trace")
		if n := recorded[id.String()]; n > 0 {
			assert.Equal(t, 2, n, "of a delivery all is recorded or nothing")
			assert.Equal(t, "-01", first[52:])
			assert.Equal(t, "-01", again[52:])
		} else {
			assert.Equal(t, "-00", first[52:])
			assert.Equal(t, "-00", again[52:])
		}
	}
}

// TestTracesOff: what a receiver gets is what the metadata has, and nobody is sent any span.
func TestTracesOff(t *testing.T) {
	t.Parallel()
	for name, env := range map[string][]string{
		"unset":         {"OTEL_TRACES_EXPORTER="},
		"none":          {"OTEL_TRACES_EXPORTER=none"},
		"disabled":      {"OTEL_TRACES_EXPORTER=otlp", "OTEL_SDK_DISABLED=true"},
		"no propagator": {"OTEL_TRACES_EXPORTER=otlp", "OTEL_PROPAGATORS=none"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, sent, ep := tracedSite(t)
			c := newTraceCollector(t)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			p := startBinary(t, binary(t), s.config, append(c.environment(), env...)...)
			s.leading(ctx, t)
			joined, alone := s.insertTraced(t, `{"traceparent": "`+callerParent+`", "tracestate": "vendor=1"}`), s.insertTraced(t, `{}`)
			s.receiver.await(ctx, t, "the events", func() bool { return s.arrivedAt(ep) == 2 })
			_, exit := p.stop(t)
			require.NoError(t, exit)
			for attempt := 1; attempt <= 2; attempt++ {
				assert.Equal(t, callerParent, sent.of(joined, attempt).Get("traceparent"))
				assert.Equal(t, "vendor=1", sent.of(joined, attempt).Get("tracestate"))
				assert.Empty(t, sent.of(alone, attempt).Values("traceparent"))
			}
			assert.Equal(t, name == "no propagator", len(c.all(spanAttempt)) > 0)
		})
	}
}

// TestTracesCollectorDown: deliveries do not notice, what finds no room is counted, and the end of the process is not held up.
func TestTracesCollectorDown(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK), "acme")
	hangs := make(chan struct{})
	hanging := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hangs:
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(hanging.Close)
	t.Cleanup(func() { close(hangs) })
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ep := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", ep, "order.created", "{}")
	p := startBinary(t, binary(t), s.config, "OTEL_TRACES_EXPORTER=otlp", "OTEL_EXPORTER_OTLP_ENDPOINT="+hanging.URL, "OTEL_BSP_MAX_QUEUE_SIZE=100",
		"OTEL_EXPORTER_OTLP_TIMEOUT=3600000", "OTEL_BSP_EXPORT_TIMEOUT=3600000",
		"OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0")
	s.leading(ctx, t)
	const events = 1000
	s.insertMany(t, "acme", "order.created", events)
	s.receiver.await(ctx, t, "the events", func() bool { return s.arrivedAt(ep) == events })
	s.receiver.await(ctx, t, "the record", func() bool { return s.recorded(t, []string{"acme"}) == events })
	s.receiver.await(ctx, t, "the spans to be counted", func() bool {
		m := p.scrape(ctx, t, s)
		dropped, failed := m.value(t, `trace_spans_total{result="dropped"}`), m.value(t, `trace_spans_total{result="failed"}`)
		return dropped > 0 && dropped+failed >= 3*events-100 // an event, a delivery and an attempt each
	})
	took, exit := p.stop(t)
	require.NoError(t, exit)
	assert.Less(t, took, 30*time.Second, "the exporter would wait for an hour")
	assert.Contains(t, p.said(t), "the last spans are lost")
}

func TestTracesThatCannotBe(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	for env, want := range map[string]string{
		"OTEL_TRACES_EXPORTER=zipkin":                                     `OTEL_TRACES_EXPORTER: "zipkin": must be otlp, or none`,
		"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_PROTOCOL=grpc":      `OTEL_EXPORTER_OTLP_PROTOCOL: "grpc": must be http/protobuf`,
		"OTEL_TRACES_EXPORTER=otlp OTEL_EXPORTER_OTLP_TRACES_PROTOCOL=xx": `OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: "xx": must be http/protobuf`,
	} {
		o := invoke(t, append(slices.Clone(d.env), strings.Fields(env)...), "run", "--listen", "")
		assert.Equal(t, exitUsage, o.code, o.err)
		assert.Contains(t, o.err, want)
	}
}
