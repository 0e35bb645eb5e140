package relay

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// errAttempt is what a breaker is told of a failed attempt.
var errAttempt = errors.New("attempt failed")

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
	res := e.client.Attempt(ctx, j.endpoint, j.Message, j.Attempts+1)
	if !j.committed.IsZero() {
		e.metrics.answered(j.committed, res.Started.Add(res.Duration))
	}
	var failure error
	if !res.OK() && res.Class != delivery.ClassCanceled {
		failure = errAttempt
	}
	leased := e.dispatcher.finish(j, failure)
	j.Queued = j.Queued || leased
	e.recorder.add(j, decide(j, res))
}

// decide turns the result of an attempt into the outcome of its delivery. An attempt that we ended ourselves is not counted.
func decide(j *job, res delivery.Result) store.Outcome {
	o := store.Outcome{Delivery: &j.Delivery, Attempted: true, Result: res}
	if res.Class == delivery.ClassCanceled {
		o.Attempted, o.Status, o.Reason = false, store.Pending, deferDrain
		return o
	}
	j.Attempts++
	switch {
	case res.OK():
		o.Status = store.Success
	case res.Class == delivery.ClassGone:
		o.Status, o.Disable = store.Failed, true
	case !res.Class.Retryable() || j.Attempts > j.endpoint.MaxRetries:
		o.Status = store.Failed
	default:
		o.Status = store.Retrying
		o.Due = max(j.endpoint.Retry.Delay(j.Attempts, rand.Float64), min(res.RetryAfter, j.endpoint.Retry.Max))
	}
	return o
}

// deferJob makes a delivery a pending row. It is called under the dispatcher's lock.
func (e *engine) deferJob(j *job, reason string, due time.Duration) {
	e.metrics.deferred(reason)
	e.recorder.add(j, store.Outcome{Delivery: &j.Delivery, Status: store.Pending, Due: due, Reason: reason})
}

// leaseJob makes a delivery in flight a row that is leased to us, for the ledger not to wait for it. The attempt goes on, and its outcome finds
// the row. It is called under the dispatcher's lock, so that the lease is recorded before that outcome.
func (e *engine) leaseJob(j *job) {
	row := j.Delivery // as it is now: the outcome will find the original marked as queued
	e.recorder.add(&job{ledger: j.ledger, commit: j.commit}, store.Outcome{
		Delivery: &row, Status: store.Leased, Due: e.cfg.Queue.Lease, Reason: deferHold,
	})
	j.commit = noCommit
}

// sweep keeps receivers from holding back the confirmed LSN, until ctx is done.
func (e *engine) sweep(ctx context.Context) error {
	tick := time.NewTicker(max(e.cfg.Window.Hold/8, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			e.dispatcher.sweep(e.cfg.Window.Hold)
		}
	}
}
