package relay

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// What a breaker is told of an attempt: it failed, or it says nothing about the receiver.
var (
	errAttempt   = errors.New("attempt failed")
	errNoVerdict = errors.New("attempt without a verdict")
)

// work attempts deliveries, one after the other, until the dispatcher closes. ctx ends the attempt under way.
func (e *engine) work(ctx context.Context) error {
	for {
		j := e.dispatcher.take()
		if j == nil {
			return nil
		}
		e.attempt(ctx, j)
	}
}

// attempt makes one attempt and hands its outcome on.
func (e *engine) attempt(ctx context.Context, j *job) {
	failpoint.Hit(failpoint.Sending)
	message, span := j.Message, trace.Span(nil)
	if j.span != nil {
		message, span = e.tracing.attempt(ctx, j)
	}
	res := e.client.Attempt(ctx, j.endpoint, message, j.Attempts+1)
	if span != nil {
		endAttempt(span, &res)
	}
	failpoint.Hit(failpoint.Answered)
	e.metrics.tried(j, &res)
	e.logAttempt(ctx, j, &res)
	v := judge(j, &res)
	o := decide(j, res)
	v.attempted, v.again = o.Attempted, o.Status == store.Retrying || o.Status == store.Pending
	e.dispatcher.finish(j, v, o)
}

// logAttempt writes the one line that an attempt has in the log. It is at debug whatever came of the attempt: a receiver that is down for a night must
// not fill a disk, and that its endpoint has changed is said at warn.
func (e *engine) logAttempt(ctx context.Context, j *job, res *delivery.Result) {
	if !e.log.Enabled(ctx, slog.LevelDebug) {
		return
	}
	attrs := append(make([]slog.Attr, 0, 20),
		slog.String("tenant", j.Tenant), slog.Any("endpoint", j.EndpointID), slog.Any("event", j.EventID), slog.Any("delivery", j.ID),
		slog.Int("attempt", j.Attempts+1), slog.String("class", string(res.Class)), slog.Int("status", res.Status),
		slog.Duration("waited", res.Started.Sub(j.admitted)), slog.Duration("took", res.Duration),
		slog.Int("bytes", len(j.Message.Body)), slog.Bool("queued", j.Queued),
	)
	if j.EventType != "" { // what comes from the retry queue does not know it
		attrs = append(attrs, slog.String("event_type", j.EventType))
	}
	if j.Replay > 0 {
		attrs = append(attrs, slog.Int("replay", int(j.Replay)))
	}
	if res.Connected > 0 {
		attrs = append(attrs, slog.Duration("connected_after", res.Connected), slog.Bool("reused", res.Reused))
	}
	if res.Answered > 0 {
		attrs = append(attrs, slog.Duration("answered_after", res.Answered))
	}
	if res.Err != "" {
		attrs = append(attrs, slog.String("error", res.Err))
	}
	if j.span != nil && j.span.SpanContext().IsSampled() {
		attrs = append(attrs, slog.String("trace_id", j.span.SpanContext().TraceID().String()))
	}
	e.log.LogAttrs(ctx, slog.LevelDebug, "attempt", attrs...)
}

// tellBreaker says that an endpoint's breaker has opened, or closed, after an attempt. One that opens again, as its probe has failed, has been open all
// along.
func (e *engine) tellBreaker(key laneKey, open bool, class delivery.Class, fault string) {
	if open {
		e.log.Warn("endpoint fails: it is left alone for a while", "tenant", key.tenant, "endpoint", key.endpoint, "for", e.cfg().Breaker.OpenFor,
			"class", class, "error", fault)
		return
	}
	e.log.Warn("endpoint answers again", "tenant", key.tenant, "endpoint", key.endpoint)
}

// judge tells what the result says about the receiver.
func judge(j *job, res *delivery.Result) verdict {
	var v verdict
	switch {
	case res.OK():
	case res.Class == delivery.ClassCanceled, res.Class == delivery.ClassLocal:
		v.failure = errNoVerdict
	default:
		v.failure = errAttempt
	}
	switch {
	case res.Status == http.StatusTooManyRequests, res.Status == http.StatusServiceUnavailable:
		v.overloaded = true
		v.pause = min(res.RetryAfter, j.endpoint.Retry.Max)
	case res.Class == delivery.ClassTimeout:
		v.overloaded = true
	}
	return v
}

// decide turns the result of an attempt into the outcome of its delivery. An attempt that we ended ourselves is not counted.
func decide(j *job, res delivery.Result) store.Outcome {
	o := store.Outcome{Delivery: &j.Delivery, Attempted: true, Result: res}
	switch res.Class {
	case delivery.ClassCanceled:
		o.Attempted, o.Status, o.Reason = false, store.Pending, store.DeferDrain
		return o
	case delivery.ClassLocal:
		o.Attempted, o.Status, o.Reason, o.Due = false, store.Pending, store.DeferLocal, spread(time.Second)
		return o
	default:
	}
	attempts := j.Attempts + 1 // counted in the job by leave, under the lock: a lease may be copying it
	if res.Directive == delivery.DirectiveDisable {
		o.Disable, o.Reason = true, "the receiver asked for it"
	}
	switch {
	case res.OK():
		o.Status = store.Success
	case res.Class == delivery.ClassGone:
		o.Status, o.Disable = store.Failed, true
	case res.Directive == delivery.DirectiveAbort, !res.Class.Retryable(), attempts > j.endpoint.MaxRetries:
		o.Status = store.Failed
	default:
		o.Status = store.Retrying
		o.Due = max(j.endpoint.Delay(attempts, rand.Float64), min(res.RetryAfter, j.endpoint.Retry.Max))
	}
	return o
}

// deferJob makes a delivery a pending row. It is called under the dispatcher's lock.
func (e *engine) deferJob(j *job, reason string, due time.Duration) {
	failpoint.Hit(failpoint.Deferred)
	e.metrics.deferred(reason)
	e.metrics.owe(j)
	o := store.Outcome{Delivery: &j.Delivery, Status: store.Pending, Due: due, Reason: reason}
	if due == parked {
		o.Due, o.Park = 0, true
	}
	e.recorder.add(j, o)
}

// leaseJob makes a delivery in flight a row that is leased to us, for the ledger not to wait for it. The attempt goes on, and its outcome finds
// the row. It is called under the dispatcher's lock, so that the lease is recorded before that outcome.
func (e *engine) leaseJob(j *job) {
	e.metrics.owe(j)
	row := j.Delivery // as it is now: the outcome will find the original marked as queued
	e.recorder.add(&job{ledger: j.ledger, commit: j.commit}, store.Outcome{
		Delivery: &row, Status: store.Leased, Due: e.cfg().Queue.Lease, Reason: store.DeferHold,
	})
	j.commit = noCommit
}

// sweep keeps receivers from holding back the confirmed LSN, until ctx is done.
func (e *engine) sweep(ctx context.Context) error {
	tick := time.NewTicker(max(e.cfg().Window.Hold/8, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			e.dispatcher.sweep(e.cfg().Window.Hold)
		}
	}
}
