package relay

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"strconv"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Tracing makes the spans of an event's road, joined to the traceparent of its metadata:
//
//	process webhook_events ── delivery ── POST ──traceparent──► receiver
//	(COMMIT to dispatched)    (to its durable outcome)
//	                          delivery ── POST   a retry, in this process or another, later
//
// Whether they are recorded is decided once, for the event. Of one that is not, there is a span context and no more: its attempts pass that on. A nil
// *Tracing costs a comparison.
//
// No span holds a payload, a secret, or a URL: its path may be what a receiver knows its senders by.
type Tracing struct {
	// Tracer is required. Its provider should make ids with SpanIDs.
	Tracer trace.Tracer
	// Headers has the receiver be told of the attempt's span as its parent (traceparent, tracestate). Without it, it is told what the event's metadata
	// has, as without traces.
	Headers bool
}

// Attributes that the semantic conventions have none for.
const (
	traceTenant      = attribute.Key("outbox_relay.tenant")
	traceEndpoint    = attribute.Key("outbox_relay.endpoint.id")
	traceDelivery    = attribute.Key("outbox_relay.delivery.id")
	traceEventType   = attribute.Key("outbox_relay.event.type")
	traceDeliveries  = attribute.Key("outbox_relay.event.deliveries") // how many it has led to
	traceStatus      = attribute.Key("outbox_relay.delivery.status")
	traceReason      = attribute.Key("outbox_relay.delivery.reason") // why it was deferred
	traceReplay      = attribute.Key("outbox_relay.delivery.replay")
	traceQueued      = attribute.Key("outbox_relay.delivery.queued") // it comes from the retry queue
	traceClass       = attribute.Key("outbox_relay.attempt.class")
	traceAttempt     = attribute.Key("outbox_relay.attempt.number")
	traceReused      = attribute.Key("outbox_relay.attempt.connection_reused")
	traceDestination = "webhook_events"
)

// event begins the span of an event that was matched, and those of its deliveries. The caller ends it once these are dispatched.
func (t *Tracing) event(ctx context.Context, committed time.Time, e *outbox.Event, jobs []*job) trace.Span {
	if now := time.Now(); committed.After(now) { // the server's clock is ahead
		committed = now
	}
	ctx, span := t.Tracer.Start(origin(ctx, jobs[0]), "process "+traceDestination, trace.WithSpanKind(trace.SpanKindConsumer), trace.WithTimestamp(committed))
	if span.IsRecording() {
		span.SetAttributes(
			semconv.MessagingSystemKey.String("outbox_relay"), semconv.MessagingDestinationName(traceDestination),
			semconv.MessagingOperationName("process"), semconv.MessagingOperationTypeProcess,
			semconv.MessagingMessageID(e.ID.String()), semconv.MessagingMessageBodySize(len(e.Data)),
			traceTenant.String(jobs[0].Tenant), traceEventType.String(e.Type), traceDeliveries.Int(len(jobs)),
		)
	}
	for _, j := range jobs {
		t.begin(ctx, span, j)
	}
	return span
}

// delivery begins the span of a delivery whose event is not at hand: one of the retry queue, or that the log repeats. It belongs to the event's trace
// all the same.
func (t *Tracing) delivery(ctx context.Context, j *job) { t.begin(origin(ctx, j), nil, j) }

func (t *Tracing) begin(ctx context.Context, parent trace.Span, j *job) {
	if parent != nil && !parent.IsRecording() {
		j.span = parent
		return
	}
	_, j.span = t.Tracer.Start(ctx, "delivery")
	if !j.span.IsRecording() {
		return
	}
	j.span.SetAttributes(
		traceTenant.String(j.Tenant), traceEndpoint.String(j.EndpointID.String()), traceDelivery.String(j.ID.String()),
		semconv.MessagingMessageID(j.EventID.String()), traceQueued.Bool(j.Queued),
	)
	if j.EventType != "" {
		j.span.SetAttributes(traceEventType.String(j.EventType))
	}
	if j.Replay > 0 {
		j.span.SetAttributes(traceReplay.Int(int(j.Replay)))
	}
}

// endDelivery ends the span of a delivery whose outcome is durable.
func endDelivery(span trace.Span, o *store.Outcome) {
	if !span.IsRecording() {
		return
	}
	span.SetAttributes(traceStatus.String(o.Status.String()))
	if o.Reason != "" && !o.Attempted {
		span.SetAttributes(traceReason.String(o.Reason))
	}
	if o.Status == store.Failed {
		span.SetStatus(codes.Error, "dead letter: "+o.Result.Err)
	}
	span.End()
}

// attempt begins the span of an attempt and returns the message as it is to be sent. The job keeps its own, whose headers a row may have to keep.
func (t *Tracing) attempt(ctx context.Context, j *job) (*delivery.Message, trace.Span) {
	span := j.span
	if span.IsRecording() {
		_, span = t.Tracer.Start(trace.ContextWithSpan(ctx, span), j.Method, trace.WithSpanKind(trace.SpanKindClient))
	}
	if span.IsRecording() {
		host, port, _ := net.SplitHostPort(j.endpoint.Host)
		number, _ := strconv.Atoi(port)
		span.SetAttributes(
			semconv.HTTPRequestMethodKey.String(j.Method), semconv.ServerAddress(host), semconv.ServerPort(number),
			semconv.HTTPRequestBodySize(len(j.Message.Body)), traceAttempt.Int(j.Attempts+1),
			traceTenant.String(j.Tenant), traceEndpoint.String(j.EndpointID.String()),
		)
	}
	if !t.Headers {
		return j.Message, span
	}
	var header traceHeader
	propagation.TraceContext{}.Inject(trace.ContextWithSpan(ctx, span), &header)
	return j.Message.Traced(header), span
}

// endAttempt ends the span of an attempt. One that is none of its own is left alone.
func endAttempt(span trace.Span, res *delivery.Result) {
	if !span.IsRecording() {
		return
	}
	span.SetAttributes(traceClass.String(string(res.Class)), traceReused.Bool(res.Reused))
	if res.Connected > 0 {
		span.AddEvent("connected", trace.WithTimestamp(res.Started.Add(res.Connected)))
	}
	if res.Answered > 0 {
		span.AddEvent("first byte of the answer", trace.WithTimestamp(res.Started.Add(res.Answered)))
	}
	if res.Status > 0 {
		span.SetAttributes(semconv.HTTPResponseStatusCode(res.Status))
	}
	if !res.OK() {
		kind := string(res.Class)
		if res.Status > 0 {
			kind = strconv.Itoa(res.Status) // as the conventions for HTTP have it
		}
		span.SetAttributes(semconv.ErrorTypeKey.String(kind))
		span.SetStatus(codes.Error, res.Err)
	}
	span.End(trace.WithTimestamp(res.Started.Add(res.Duration)))
}

// origin adds the origin of a delivery's event to ctx: what its metadata names as its parent, and else a trace that is made of its id.
func origin(ctx context.Context, j *job) context.Context {
	header := traceHeader(j.Message.Header)
	return propagation.TraceContext{}.Extract(context.WithValue(ctx, eventKey{}, &j.EventID), &header)
}

type eventKey struct{}

// SpanIDs makes the ids of spans (sdk/trace.IDGenerator). The trace of an event without a traceparent has an id made of the event's, so that its retries,
// whoever makes them and whenever, belong to it, and all of it is sampled or none. It is safe for concurrent use.
type SpanIDs struct{}

// NewIDs returns the ids of a trace and of its first span.
func (s SpanIDs) NewIDs(ctx context.Context) (id trace.TraceID, span trace.SpanID) {
	if event, ok := ctx.Value(eventKey{}).(*outbox.UUID); ok {
		hash := sha256.Sum256(event[:]) // the bits of ids are not all by chance, those of a trace have to be: samplers go by them
		copy(id[:], hash[:])
	}
	for !id.IsValid() {
		binary.NativeEndian.PutUint64(id[:8], rand.Uint64()) //nolint:gosec // ids need no secrecy
		binary.NativeEndian.PutUint64(id[8:], rand.Uint64()) //nolint:gosec // as above
	}
	return id, s.NewSpanID(ctx, id)
}

// NewSpanID returns the id of a further span.
func (SpanIDs) NewSpanID(context.Context, trace.TraceID) (id trace.SpanID) {
	for !id.IsValid() {
		binary.NativeEndian.PutUint64(id[:], rand.Uint64()) //nolint:gosec // ids need no secrecy
	}
	return id
}

// traceHeader has the headers of a message read and written by a propagator.
type traceHeader []delivery.HeaderField

// Get implements propagation.TextMapCarrier.
func (h *traceHeader) Get(name string) string {
	for i := range *h {
		if (*h)[i].Name == name {
			return (*h)[i].Value
		}
	}
	return ""
}

// Set implements propagation.TextMapCarrier.
func (h *traceHeader) Set(name, value string) {
	*h = append(*h, delivery.HeaderField{Name: name, Value: value})
}

// Keys implements propagation.TextMapCarrier.
func (h *traceHeader) Keys() []string {
	var names []string
	for i := range *h {
		names = append(names, (*h)[i].Name)
	}
	return names
}
