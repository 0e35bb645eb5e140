package relay

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func testInspector(t *testing.T, mode SchemaMode) (*inspector, *route.Tenant, *bytes.Buffer) {
	t.Helper()
	cfg := DefaultConfig()
	cfg.Validation.PayloadSchema, cfg.Validation.MaxDepth = mode, 2
	table := route.NewTenant("acme", endpointDefaults())
	require.NoError(t, table.SetEventType(route.EventTypeRow{ID: outbox.UUID{1}, EventType: "a.b", Enabled: true, PayloadSchema: `{"type": "object"}`}))
	var log bytes.Buffer
	return newInspector(&cfg, newMetrics(prometheus.NewRegistry(), &cfg), slog.New(slog.NewTextHandler(&log, nil))), table, &log
}

// TestRefusalOfWhatNobodyKnows: an event that a filter was not held against to the end is not sent by chance, and is told with the reason.
func TestRefusalOfWhatNobodyKnows(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		all    refusal
		target route.Target
		want   refusal
	}{
		{},
		{target: route.Target{Undecided: true}, want: refusal{codeEvent, "not held against the filter of subscription 00000000-0000-0000-0000-000000000000 to the end"}},
		{target: route.Target{Undecided: true, Fault: "x"}, want: refusal{codeEvent, "the filter of subscription 00000000-0000-0000-0000-000000000000: panic: x"}},
		{all: refusal{codeSchema, "x"}, target: route.Target{Undecided: true}, want: refusal{codeSchema, "x"}},
	} {
		got := test.all.of(&test.target)
		assert.Equal(t, test.want.code, got.code)
		assert.Contains(t, got.reason, test.want.reason)
	}
	i, table, log := testInspector(t, SchemaOff)
	assert.Empty(t, i.look("acme", table, &outbox.Event{ID: outbox.UUID{1}, Type: "a.b", Data: []byte(`{}`)}, []route.Target{{Undecided: true}}), "it may be sent to others")
	assert.Contains(t, log.String(), "not held against the filter")
}

func TestInspectorOfEachMode(t *testing.T) {
	t.Parallel()
	for mode, want := range map[SchemaMode][3]string{
		SchemaOff: {"", "", "event_invalid"}, SchemaWarn: {"", "", "event_invalid"}, SchemaEnforce: {"", "schema_invalid", "event_invalid"},
	} {
		i, table, log := testInspector(t, mode)
		for n, data := range []string{`{}`, `[]`, `[[[]]]`} {
			assert.Equal(t, want[n], i.look("acme", table, &outbox.Event{ID: outbox.UUID{1}, Type: "a.b", Data: []byte(data)}, nil).code, "%s %s", mode, data)
		}
		assert.Empty(t, i.look("acme", table, &outbox.Event{ID: outbox.UUID{1}, Type: "no.schema", Data: []byte(`[]`)}, nil))
		if mode == SchemaOff {
			assert.NotContains(t, log.String(), codeSchema)
		} else {
			assert.Contains(t, log.String(), codeSchema)
		}
	}
}

// TestInspectorCostsNothing: an event far from the bounds, of a type without a schema, is let through without an allocation.
func TestInspectorCostsNothing(t *testing.T) { //nolint:paralleltest // AllocsPerRun counts the whole process
	e := &outbox.Event{ID: outbox.UUID{1}, Type: "no.schema", Data: []byte(`{"amount": 1}`), Metadata: []byte(`{}`)}
	for _, mode := range []SchemaMode{SchemaOff, SchemaEnforce} {
		i, table, _ := testInspector(t, mode)
		assert.Zero(t, testing.AllocsPerRun(100, func() { i.look("acme", table, e, []route.Target{{}}) }), mode)
	}
}

// TestInspectorSaysItOnceInAWhile: one line for each tenant and code, and every event is counted.
func TestInspectorSaysItOnceInAWhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		i, table, log := testInspector(t, SchemaWarn)
		look := func(tenant, data string) {
			i.look(tenant, table, &outbox.Event{ID: outbox.UUID{1}, Type: "a.b", Data: []byte(data)}, nil)
		}
		for range 5 {
			look("acme", `["planted"]`)
		}
		look("acme", `[[["planted"]]]`)
		look("other", `["planted"]`)
		assert.Equal(t, 3, strings.Count(log.String(), "an event is not valid"), log)
		<-time.After(complainAgain)
		look("acme", `["planted"]`)
		assert.Equal(t, 4, strings.Count(log.String(), "an event is not valid"), log)
		assert.Contains(t, log.String(), "unsaid=4")
		assert.NotContains(t, log.String(), "planted")
		assert.InDelta(t, 7, testutil.ToFloat64(i.metrics.invalidEvents[codeSchema]), 0)
		assert.InDelta(t, 1, testutil.ToFloat64(i.metrics.invalidEvents[codeEvent]), 0)
	})
}

// TestRejectedDeliveriesHaveRoom: what is a dead letter from the start waits for the database like what is deferred on arrival, and blocks no key.
func TestRejectedDeliveriesHaveRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(8) // a quarter of it is for these
		var ended []store.Outcome
		b.ended = func(_ *job, o store.Outcome) { ended = append(ended, o) }
		var jobs []*job
		for range 3 {
			j := b.job("one", 1)
			j.refused = refusal{codeEvent, "Data: …"}
			j.Order.Key = outbox.UUID{1}
			jobs = append(jobs, j)
		}
		b.reject(t.Context(), jobs[0])
		b.reject(t.Context(), jobs[1])
		done := false
		go func() {
			b.reject(t.Context(), jobs[2])
			done = true
		}()
		synctest.Wait()
		require.False(t, done, "a third one without room")
		b.release(jobs[:1])
		synctest.Wait()
		require.True(t, done)
		require.Len(t, ended, 3)
		assert.Equal(t, store.Outcome{Delivery: &jobs[2].Delivery, Status: store.Failed, Code: codeEvent, Reason: "Data: …"}, ended[2])
		assert.False(t, b.lanes[laneKey{"t", jobs[0].EndpointID}].isBlocked(jobs[0]))
		b.release(jobs[1:])
		assert.Zero(t, b.used())
		assert.Zero(t, b.bytes())
	})
}

// TestNewsOfWhatWasNeverSent: a dead letter without an attempt is not one whose attempts are exhausted.
func TestNewsOfWhatWasNeverSent(t *testing.T) {
	t.Parallel()
	n := newsOfDead(&store.Outcome{Delivery: &store.Delivery{}, Status: store.Failed, Code: codeSchema, Reason: "payload_schema: …"})
	assert.Equal(t, newsDead, n.Event.Type)
	assert.Contains(t, string(n.Event.Data), `"error_class":"schema_invalid"`)
	assert.Contains(t, string(n.Event.Data), `"attempts":0`)
}
