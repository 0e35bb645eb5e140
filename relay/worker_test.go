package relay

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func attempted() *job {
	return &job{Delivery: store.Delivery{
		ID: outbox.UUID{1}, Tenant: "acme", EventID: outbox.UUID{2}, EndpointID: outbox.UUID{3}, URL: "https://host/planted", Attempts: 2,
		Message: &delivery.Message{Body: []byte("planted")},
	}}
}

func TestLineOfAnAttempt(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	e := &engine{log: slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	j := attempted()
	j.admitted = time.Now()
	j.Queued, j.EventType, j.Replay = true, "order.created", 1
	res := delivery.Result{
		Class: delivery.Class5xx, Status: 502, Err: "answered 502", Body: []byte("planted"), Signature: "planted",
		Started: j.admitted.Add(time.Second), Duration: 3 * time.Millisecond, Connected: time.Millisecond, Answered: 2 * time.Millisecond, Reused: true,
	}
	e.logAttempt(t.Context(), j, &res)
	assert.NotContains(t, out.String(), "planted")
	var line map[string]any
	require.NoError(t, json.Unmarshal(out.Bytes(), &line))
	delete(line, "time")
	assert.Equal(t, map[string]any{
		"level": "DEBUG", "msg": "attempt", "tenant": "acme", "endpoint": outbox.UUID{3}.String(), "event": outbox.UUID{2}.String(),
		"delivery": outbox.UUID{1}.String(), "attempt": 3.0, "class": "http_5xx", "status": 502.0, "waited": 1e9, "took": 3e6, "bytes": 7.0, "queued": true, "event_type": "order.created",
		"replay": 1.0, "connected_after": 1e6, "answered_after": 2e6, "reused": true, "error": "answered 502",
	}, line)

	out.Reset()
	j.span = trace.SpanFromContext(trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{10}, SpanID: trace.SpanID{1}, TraceFlags: trace.FlagsSampled,
	})))
	e.logAttempt(t.Context(), j, &res)
	assert.Contains(t, out.String(), `"trace_id":"0a000000000000000000000000000000"`)

	out.Reset()
	e.logAttempt(t.Context(), attempted(), &delivery.Result{Class: delivery.ClassSuccess, Status: 200})
	assert.Contains(t, out.String(), `"level":"DEBUG","msg":"attempt"`)
	assert.NotContains(t, out.String(), "error")
}

func TestLineOfAnAttemptCostsNothing(t *testing.T) { //nolint:paralleltest // AllocsPerRun counts the whole process
	e := &engine{log: slog.New(slog.NewJSONHandler(nil, nil))}
	j, res := attempted(), &delivery.Result{Class: delivery.Class5xx, Err: "answered 502"}
	assert.Zero(t, testing.AllocsPerRun(100, func() { e.logAttempt(t.Context(), j, res) }))
}

// TestWhatComesOfAnAnswer: what each is for its delivery, its endpoint and its receiver, as the README has it.
func TestWhatComesOfAnAnswer(t *testing.T) {
	t.Parallel()
	failed := verdict{failure: errAttempt}
	busy := func(pause time.Duration) verdict { return verdict{failure: errAttempt, overloaded: true, pause: pause} }
	retried := store.Outcome{Attempted: true, Status: store.Retrying}
	dead := store.Outcome{Attempted: true, Status: store.Failed}
	const asked = "the receiver asked for it"
	for name, c := range map[string]struct {
		res      delivery.Result
		attempts int
		verdict  verdict
		outcome  store.Outcome
	}{
		"2xx":              {res: delivery.Result{Class: delivery.ClassSuccess, Status: 204}, outcome: store.Outcome{Attempted: true, Status: store.Success}},
		"2xx and no more":  {res: delivery.Result{Class: delivery.ClassSuccess, Status: 200, Directive: delivery.DirectiveDisable}, outcome: store.Outcome{Attempted: true, Status: store.Success, Disable: true, Reason: asked}},
		"410":              {res: delivery.Result{Class: delivery.ClassGone, Status: 410}, verdict: failed, outcome: store.Outcome{Attempted: true, Status: store.Failed, Disable: true}},
		"429":              {res: delivery.Result{Class: delivery.Class429, Status: 429, RetryAfter: 10 * time.Second}, verdict: busy(10 * time.Second), outcome: store.Outcome{Attempted: true, Status: store.Retrying, Due: 10 * time.Second}},
		"503 for an hour":  {res: delivery.Result{Class: delivery.Class5xx, Status: 503, RetryAfter: time.Hour}, verdict: busy(time.Minute), outcome: store.Outcome{Attempted: true, Status: store.Retrying, Due: time.Minute}},
		"timeout":          {res: delivery.Result{Class: delivery.ClassTimeout}, verdict: busy(0), outcome: retried},
		"500":              {res: delivery.Result{Class: delivery.Class5xx, Status: 500}, verdict: failed, outcome: retried},
		"500 at the last":  {res: delivery.Result{Class: delivery.Class5xx, Status: 500}, attempts: 3, verdict: failed, outcome: dead},
		"500 and abort":    {res: delivery.Result{Class: delivery.Class5xx, Status: 500, Directive: delivery.DirectiveAbort}, verdict: failed, outcome: dead},
		"500 and no more":  {res: delivery.Result{Class: delivery.Class5xx, Status: 500, Directive: delivery.DirectiveDisable}, verdict: failed, outcome: store.Outcome{Attempted: true, Status: store.Retrying, Disable: true, Reason: asked}},
		"not allowed":      {res: delivery.Result{Class: delivery.ClassDenied}, verdict: failed, outcome: dead},
		"no descriptor":    {res: delivery.Result{Class: delivery.ClassLocal}, verdict: verdict{failure: errNoVerdict}, outcome: store.Outcome{Status: store.Pending, Reason: store.DeferLocal, Due: time.Second}},
		"ended by the end": {res: delivery.Result{Class: delivery.ClassCanceled}, verdict: verdict{failure: errNoVerdict}, outcome: store.Outcome{Status: store.Pending, Reason: store.DeferDrain}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			j := attempted()
			j.endpoint = &delivery.Endpoint{MaxRetries: 3, Retry: delivery.Backoff{Max: time.Minute}}
			if c.attempts > 0 {
				j.Attempts = c.attempts
			}
			assert.Equal(t, c.verdict, judge(j, &c.res))
			o := decide(j, c.res)
			o.Due = o.Due.Truncate(time.Second) // but for what is spread
			c.outcome.Delivery, c.outcome.Result = &j.Delivery, c.res
			assert.Equal(t, c.outcome, o)
		})
	}
}
