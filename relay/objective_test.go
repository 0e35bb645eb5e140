package relay

import (
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func TestIDTellsOfItsCommit(t *testing.T) {
	t.Parallel()
	seen := make(map[outbox.UUID]bool)
	for range 1000 {
		at := time.UnixMilli(rand.Int64N(1 << 47))
		id := committedID(at.Add(999 * time.Microsecond))
		assert.Equal(t, at, committedAt(id))
		assert.Equal(t, byte(7), id[6]>>4)
		assert.Equal(t, byte(2), id[8]>>6)
		assert.True(t, committedAt(uncommittedID()).IsZero())
		seen[id] = true
	}
	assert.Len(t, seen, 1000)
}

// gathered is what a registry has by name, with the values of labels in their order behind it.
func gathered(t *testing.T, reg *prometheus.Registry) map[string]*dto.Metric {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	all := make(map[string]*dto.Metric)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, pair := range m.GetLabel() {
				name += " " + pair.GetValue()
			}
			all[name] = m
		}
	}
	return all
}

func measured(perTenant, perEndpoint int) (*metrics, *prometheus.Registry) {
	cfg := DefaultConfig()
	cfg.Metrics = Metrics{PerTenant: perTenant, PerEndpoint: perEndpoint}
	reg := prometheus.NewRegistry()
	return newMetrics(reg, &cfg), reg
}

// TestObjective goes through what may happen to a delivery of the log, and when that counts.
func TestObjective(t *testing.T) {
	t.Parallel()
	committed := time.Now().Add(-time.Hour)
	fresh := func() *job {
		return &job{Delivery: store.Delivery{ID: committedID(committed), Tenant: "acme", EndpointID: outbox.UUID{1}}, committed: committed}
	}
	claimed := func(change func(*store.Delivery)) *job {
		c := store.Claimed{Delivery: fresh().Delivery}
		c.Message = &delivery.Message{}
		change(&c.Delivery)
		cfg := DefaultConfig()
		defaults := cfg.EndpointDefaults()
		e := new(engine)
		e.config.Store(&cfg)
		e.defaults.Store(&defaults)
		return e.claimed(t.Context(), &c).job
	}
	answer := func(began, took time.Duration, class delivery.Class, status int) *delivery.Result {
		return &delivery.Result{Class: class, Status: status, Started: committed.Add(began), Duration: took}
	}
	for name, tc := range map[string]struct {
		happens                func(m *metrics)
		total, met, unanswered float64
	}{
		"answered in time":                 {func(m *metrics) { m.tried(fresh(), answer(0, 5*time.Second, delivery.ClassSuccess, 200)) }, 1, 1, 0},
		"whatever the answer":              {func(m *metrics) { m.tried(fresh(), answer(0, time.Second, delivery.Class5xx, 500)) }, 1, 1, 0},
		"answered late":                    {func(m *metrics) { m.tried(fresh(), answer(time.Second, 5*time.Second, delivery.ClassSuccess, 200)) }, 1, 0, 1},
		"not answered":                     {func(m *metrics) { m.tried(fresh(), answer(0, time.Millisecond, delivery.ClassConnect, 0)) }, 1, 0, 1},
		"begun late":                       {func(m *metrics) { m.tried(fresh(), answer(6*time.Second, time.Second, delivery.ClassSuccess, 200)) }, 1, 0, 0},
		"deferred":                         {func(m *metrics) { m.owe(fresh()) }, 1, 0, 0},
		"ended by ourselves, and deferred": {func(m *metrics) { j := fresh(); m.tried(j, answer(0, 0, delivery.ClassCanceled, 0)); m.owe(j) }, 1, 0, 0},
		"leased, and answered in time": {func(m *metrics) {
			j := fresh()
			m.owe(j)
			m.tried(j, answer(0, 4*time.Second, delivery.ClassSuccess, 200))
		}, 1, 1, 0},
		"deferred, claimed, and in time": {func(m *metrics) {
			m.owe(fresh())
			m.tried(claimed(func(*store.Delivery) {}), answer(1e9, 1e9, delivery.ClassSuccess, 200))
		}, 1, 1, 0},
		"claimed, deferred again": {func(m *metrics) { m.owe(claimed(func(*store.Delivery) {})) }, 0, 0, 0},
		"a second attempt": {func(m *metrics) {
			m.tried(claimed(func(d *store.Delivery) { d.Attempts = 1 }), answer(0, 0, delivery.ClassSuccess, 200))
		}, 0, 0, 0},
		"a replay": {func(m *metrics) {
			m.tried(claimed(func(d *store.Delivery) { d.Replay = 1 }), answer(0, 0, delivery.ClassSuccess, 200))
		}, 0, 0, 0},
		"what the log has not brought": {func(m *metrics) {
			m.tried(claimed(func(d *store.Delivery) { d.ID = uncommittedID() }), answer(0, 0, delivery.ClassSuccess, 200))
		}, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, reg := measured(1, 1)
			tc.happens(m)
			all := gathered(t, reg)
			if tc.total == 0 {
				assert.Zero(t, all["outbox_relay_commit_to_answer_seconds"].GetHistogram().GetSampleCount(), "the latency of what does not count")
			}
			of := " " + outbox.UUID{1}.String() + " acme"
			for _, series := range []string{"objective_%s_total", "tenant_objective_%s_total acme", "endpoint_objective_%s_total" + of} {
				for kind, want := range map[string]float64{"deliveries": tc.total, "met": tc.met, "unanswered": tc.unanswered} {
					one := all["outbox_relay_"+fmt.Sprintf(series, kind)]
					assert.InDelta(t, want, one.GetCounter().GetValue(), 0, "%s %s", series, kind)
				}
			}
		})
	}
}

// TestSharesAreBounded: the first ones have series of their own, all others have theirs together, and who is gone makes room.
func TestSharesAreBounded(t *testing.T) {
	t.Parallel()
	m, reg := measured(0, 2)
	count := func(tenant string, id byte, n int) {
		for range n {
			m.outcome(&store.Outcome{Delivery: &store.Delivery{Tenant: tenant, EndpointID: outbox.UUID{id}}, Status: store.Success})
		}
	}
	delivered := func() map[string]float64 {
		got := make(map[string]float64)
		for name, one := range gathered(t, reg) {
			if rest, ok := strings.CutPrefix(name, "outbox_relay_endpoint_deliveries_total "); ok && one.GetCounter().GetValue() > 0 {
				got[rest] = one.GetCounter().GetValue()
			}
		}
		return got
	}
	label := func(id byte, tenant string) string { return outbox.UUID{id}.String() + " success " + tenant }
	count("a", 1, 1)
	count("other", 9, 2)
	count("b", 1, 3)
	count("a", 2, 4)
	count("c", 3, 5)
	assert.Equal(t, map[string]float64{label(1, "a"): 1, label(1, "b"): 3, "other success other": 11}, delivered())
	series := len(gathered(t, reg))

	m.shares[0].drop([]laneKey{{"a", outbox.UUID{1}}})
	assert.Equal(t, map[string]float64{label(1, "b"): 3, "other success other": 11}, delivered())
	count("c", 3, 1)
	count("d", 4, 1)
	assert.Equal(t, map[string]float64{label(1, "b"): 3, label(3, "c"): 1, "other success other": 12}, delivered())
	assert.Len(t, gathered(t, reg), series)
	for name := range gathered(t, reg) {
		assert.NotContains(t, name, "tenant_", "a series that nobody has asked for")
	}
}

// TestLatenciesAreNative: a server that takes native histograms gets one, with so many buckets and no more, whatever receivers do.
func TestLatenciesAreNative(t *testing.T) {
	t.Parallel()
	m, reg := measured(0, 0)
	for i := range 100_000 {
		m.latency.Observe(math.Exp(float64(i)/2000 - 25)) // from a hundredth of a nanosecond to years
	}
	h := gathered(t, reg)["outbox_relay_commit_to_answer_seconds"].GetHistogram()
	buckets := 0
	for _, span := range h.GetPositiveSpan() {
		buckets += int(span.GetLength())
	}
	assert.Positive(t, buckets)
	assert.LessOrEqual(t, buckets, 200)
	assert.Len(t, h.GetBucket(), len(latencyBuckets))
}

// TestMetricsCostNoMemory: what is counted of a delivery that succeeds at once makes no garbage.
func TestMetricsCostNoMemory(t *testing.T) { //nolint:paralleltest // AllocsPerRun counts the whole process
	m, _ := measured(0, 0)
	j := &job{Delivery: store.Delivery{Tenant: "acme"}, committed: time.Now(), ledger: newLedger(0, 0)}
	o, res := &store.Outcome{Delivery: &j.Delivery, Status: store.Success}, &delivery.Result{Class: delivery.ClassSuccess, Status: 200, Started: j.committed, Duration: time.Millisecond}
	one := func() {
		m.event(j.committed, 1)
		m.dispatches.Inc()
		j.owed.Store(false)
		m.tried(j, res)
		m.outcome(o)
		m.recorded(j, time.Now())
	}
	one() // a bucket of a native histogram is made when it is first needed
	assert.Less(t, testing.AllocsPerRun(1000, one), 1.0)
}
