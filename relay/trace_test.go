package relay

import (
	"context"
	"encoding/hex"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// tracingFor records spans.
func tracingFor(sampler sdktrace.Sampler) (*Tracing, *tracetest.SpanRecorder) {
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans), sdktrace.WithSampler(sampler), sdktrace.WithIDGenerator(SpanIDs{}))
	return &Tracing{Tracer: provider.Tracer("test"), Headers: true}, spans
}

func tracedJob(t testing.TB, header ...delivery.HeaderField) *job {
	t.Helper()
	ep, err := delivery.NewEndpoint(delivery.EndpointRow{
		ID: outbox.UUID{3}, URL: "https://user:planted@hooks.example.com/planted?planted=planted", SecretToken: "planted-secret-token", VerifySSL: true,
		CustomHeaders: []byte(`{"X-Key": "planted"}`),
	}, endpointDefaults())
	require.NoError(t, err)
	return &job{
		Delivery: store.Delivery{
			ID: outbox.UUID{1}, Tenant: "acme", EventID: outbox.UUID{2}, EndpointID: ep.ID, URL: ep.URL, Method: ep.Method,
			Message: &delivery.Message{ID: outbox.UUID{2}, Body: []byte("planted"), Header: header},
		},
		endpoint: ep,
	}
}

func TestSpansHoldNoSecrets(t *testing.T) {
	t.Parallel()
	tracing, spans := tracingFor(sdktrace.AlwaysSample())
	j := tracedJob(t)
	event := tracing.event(t.Context(), time.Now().Add(time.Hour), &outbox.Event{ID: j.EventID, Type: "order.created", Data: []byte("planted"), Metadata: []byte("planted")}, []*job{j})
	event.End()
	message, attempt := tracing.attempt(t.Context(), j)
	res := delivery.Result{
		Class: delivery.ClassTLS, Err: "the certificate has expired", Started: time.Now(), Duration: time.Second, Connected: time.Millisecond,
		Body: []byte("planted"), Signature: "planted",
	}
	endAttempt(attempt, &res)
	endDelivery(j.span, &store.Outcome{Delivery: &j.Delivery, Attempted: true, Status: store.Failed, Result: res})

	ended := spans.Ended()
	require.Len(t, ended, 3)
	for _, s := range ended {
		text := s.Name() + s.Status().Description
		for _, a := range s.Attributes() {
			text += string(a.Key) + a.Value.String()
		}
		for _, e := range s.Events() {
			text += e.Name
		}
		assert.NotContains(t, text, "planted")
	}
	assert.False(t, ended[0].StartTime().After(ended[0].EndTime()), "though the server's clock is ahead")
	assert.Equal(t, "POST", ended[1].Name())
	assert.Subset(t, ended[1].Attributes(), []attribute.KeyValue{
		semconv.ServerAddress("hooks.example.com"), semconv.ServerPort(443), semconv.ErrorTypeKey.String("tls"), traceClass.String("tls"),
	})
	assert.Equal(t, time.Second, ended[1].EndTime().Sub(res.Started))
	assert.Equal(t, "dead letter: the certificate has expired", ended[2].Status().Description)
	assert.Equal(t, "00-"+hex.EncodeToString(traceOf(attempt.SpanContext().TraceID()))+"-"+attempt.SpanContext().SpanID().String()+"-01", message.Header[0].Value)
	assert.Empty(t, j.Message.Header, "what a row may keep is as it was")
}

func traceOf(id [16]byte) []byte { return id[:] }

// TestTraceOfAnEventWithoutOne: whoever retries it, whenever, is in the same trace, and goes by the same decision.
func TestTraceOfAnEventWithoutOne(t *testing.T) {
	t.Parallel()
	recorded := 0
	const events = 2000
	for range events {
		id := outbox.NewUUID()
		first, _ := tracingFor(sdktrace.TraceIDRatioBased(.25))
		again, _ := tracingFor(sdktrace.TraceIDRatioBased(.25))
		a, b := tracedJob(t), tracedJob(t)
		a.EventID, b.EventID = id, id
		first.event(t.Context(), time.Now(), &outbox.Event{ID: id}, []*job{a})
		again.delivery(t.Context(), b)
		require.Equal(t, a.span.SpanContext().TraceID(), b.span.SpanContext().TraceID())
		require.NotEqual(t, a.span.SpanContext().SpanID(), b.span.SpanContext().SpanID())
		require.Equal(t, a.span.IsRecording(), b.span.IsRecording())
		if a.span.IsRecording() {
			recorded++
		}
	}
	assert.InDelta(t, events/4, recorded, events/20, "the share that the sampler was asked for")
}

func TestTraceOfAParent(t *testing.T) {
	t.Parallel()
	const id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	tracing, spans := tracingFor(sdktrace.ParentBased(sdktrace.AlwaysSample()))
	for flags, want := range map[string]bool{"01": true, "00": false, "03": true} {
		j := tracedJob(t, delivery.HeaderField{Name: "traceparent", Value: "00-" + id + "-" + parent + "-" + flags})
		tracing.delivery(t.Context(), j)
		sc := j.span.SpanContext()
		assert.Equal(t, id, sc.TraceID().String())
		assert.NotEqual(t, parent, sc.SpanID().String())
		assert.Equal(t, want, sc.IsSampled(), flags)
	}
	for _, s := range spans.Started() {
		assert.Equal(t, parent, s.Parent().SpanID().String())
		assert.True(t, s.Parent().IsRemote())
	}
	j := tracedJob(t, delivery.HeaderField{Name: "traceparent", Value: "00-" + id + "-" + parent + "-ff"}) // no such flags
	tracing.delivery(t.Context(), j)
	assert.NotEqual(t, id, j.span.SpanContext().TraceID().String())
}

// BenchmarkTracing compares what an event of one delivery pays for its spans when it is recorded, when it is not, and when there are no traces.
func BenchmarkTracing(b *testing.B) {
	e := &outbox.Event{ID: outbox.UUID{2}, Type: "order.created"}
	road := func(b *testing.B, t *Tracing) {
		b.Helper()
		b.ReportAllocs()
		res := delivery.Result{Class: delivery.ClassSuccess, Status: 200, Started: time.Now()}
		j := tracedJob(b)
		o := store.Outcome{Delivery: &j.Delivery, Attempted: true, Status: store.Success, Result: res}
		jobs := []*job{j}
		ctx := b.Context()
		for b.Loop() {
			if t != nil {
				t.event(ctx, res.Started, e, jobs).End()
			}
			if j.span != nil {
				_, span := t.attempt(ctx, j)
				endAttempt(span, &res)
				endDelivery(j.span, &o)
			}
		}
	}
	sampled := func(s sdktrace.Sampler) *Tracing {
		provider := sdktrace.NewTracerProvider(sdktrace.WithSampler(s), sdktrace.WithIDGenerator(SpanIDs{}))
		b.Cleanup(func() { require.NoError(b, provider.Shutdown(context.WithoutCancel(b.Context()))) })
		return &Tracing{Tracer: provider.Tracer("bench"), Headers: true}
	}
	b.Run("off", func(b *testing.B) { road(b, nil) })
	b.Run("not recorded", func(b *testing.B) { road(b, sampled(sdktrace.NeverSample())) })
	b.Run("recorded", func(b *testing.B) { road(b, sampled(sdktrace.AlwaysSample())) })
}
