package main

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

func TestOracleJudges(t *testing.T) {
	t.Parallel()
	began := time.Unix(1_700_000_000, 0)
	after := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	p := demoPair{endpoint: outbox.NewUUID(), event: outbox.NewUUID()}
	success := map[demoPair]string{p: "success"}
	commit := func(o *demoOracle) { o.committed(after(10), 1, []demoPair{p}) }
	take := func(o *demoOracle) { o.received(p, after(13), true, true) }
	refuse := func(o *demoOracle) { o.received(p, after(12), false, true) }
	for name, tc := range map[string]struct {
		happens  []func(*demoOracle)
		recorded map[demoPair]string
		dead     map[demoPair]bool
		settled  bool
		want     demoResult
		ok       bool
	}{
		"nothing": {settled: true, ok: true},
		"delivered": {
			happens: []func(*demoOracle){commit, take}, recorded: success, settled: true, ok: true,
			want: demoResult{events: 1, expected: 1, delivered: 1, recorded: 1, measured: 1, median: 3e6, slowest: 3e6, perSecond: 1 / .013},
		},
		"received before COMMIT has returned": {
			happens:  []func(*demoOracle){func(o *demoOracle) { o.received(p, after(5), true, true) }, commit},
			recorded: success, settled: true, ok: true,
			want: demoResult{events: 1, expected: 1, delivered: 1, recorded: 1, measured: 1, perSecond: 200},
		},
		"retried and sent twice": {
			happens: []func(*demoOracle){commit, refuse, take, take}, recorded: success, settled: true, ok: true,
			want: demoResult{
				events: 1, expected: 1, delivered: 1, recorded: 1, retried: 1, duplicates: 1, measured: 1, median: 3e6, slowest: 3e6, perSecond: 1 / .013,
			},
		},
		"by another than the healthy receiver": {
			happens:  []func(*demoOracle){commit, func(o *demoOracle) { o.received(p, after(13), true, false) }},
			recorded: success, settled: true, ok: true,
			want: demoResult{events: 1, expected: 1, delivered: 1, recorded: 1},
		},
		"dead letter": {
			happens: []func(*demoOracle){commit, refuse}, recorded: map[demoPair]string{p: "failed"}, dead: map[demoPair]bool{p: true}, settled: true, ok: true,
			want: demoResult{events: 1, expected: 1, dead: 1, recorded: 1},
		},
		"dead letter of something else": {
			happens: []func(*demoOracle){commit}, dead: map[demoPair]bool{{}: true},
			want: demoResult{events: 1, expected: 1, lost: 1},
		},
		"lost": {
			happens: []func(*demoOracle){commit, refuse}, recorded: map[demoPair]string{p: "retrying"},
			want: demoResult{events: 1, expected: 1, lost: 1, recorded: 1},
		},
		"ghost": {
			happens: []func(*demoOracle){func(o *demoOracle) { o.rolledBack(1) }, refuse}, settled: true,
			want: demoResult{rolled: 1, ghosts: 1},
		},
		"recorded without a request": {
			recorded: success, settled: true,
			want: demoResult{ghosts: 1, recorded: 1},
		},
		"delivered, and not recorded": {
			happens: []func(*demoOracle){commit, take}, recorded: map[demoPair]string{p: "retrying"}, settled: true,
			want: demoResult{events: 1, expected: 1, delivered: 1, recorded: 1, unrecorded: 1, measured: 1, median: 3e6, slowest: 3e6, perSecond: 1 / .013},
		},
		"dead letter, and not recorded": {
			happens: []func(*demoOracle){commit}, dead: map[demoPair]bool{p: true}, settled: true,
			want: demoResult{events: 1, expected: 1, dead: 1, unrecorded: 1},
		},
		"forgery": {
			happens: []func(*demoOracle){(*demoOracle).forged}, settled: true,
			want: demoResult{forgeries: 1},
		},
	} {
		o := newDemoOracle()
		o.begin(began)
		for _, happen := range tc.happens {
			happen(o)
		}
		assert.Equal(t, tc.settled, o.settled(tc.dead), name)
		got := o.judge(tc.recorded, tc.dead)
		assert.InDelta(t, tc.want.perSecond, got.perSecond, .001, name)
		got.perSecond = tc.want.perSecond
		assert.Equal(t, &tc.want, got, name)
		assert.Equal(t, tc.ok, got.err() == nil, name)
	}
}

func TestBrokenPromiseIsNamed(t *testing.T) {
	t.Parallel()
	r := demoResult{lost: 1, ghosts: 2, forgeries: 3, unrecorded: 4}
	assert.EqualError(t, r.err(), "1 lost, 2 ghosts, 3 bad signatures, 4 unrecorded: none of these may be")
}

func TestPercentile(t *testing.T) {
	t.Parallel()
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1))
	}
	for _, tc := range []struct {
		sorted []time.Duration
		p      float64
		want   time.Duration
	}{
		{nil, 50, 0},
		{hundred[:1], 0, 1},
		{hundred[:1], 99, 1},
		{hundred[:2], 50, 1},
		{hundred[:3], 50, 2},
		{hundred, 50, 50},
		{hundred, 99, 99},
		{hundred, 99.5, 100},
		{hundred, 100, 100},
	} {
		assert.Equal(t, tc.want, percentile(tc.sorted, tc.p), "p%v of %d", tc.p, len(tc.sorted))
	}
}

// TestDemoPlan: every subscription is there for something, and every receiver gets its share.
func TestDemoPlan(t *testing.T) {
	t.Parallel()
	endpoints, err := demoEndpoints(newDemoReceivers(1, newDemoOracle()))
	require.NoError(t, err)
	rnd := rand.New(rand.NewPCG(1, 2))
	matched := make(map[*demoSubscription]int)
	wanted := make(map[string]int)
	const n = 15_000
	for range n {
		e, tenant := newDemoEvent(rnd), demoTenants()[rnd.IntN(3)]
		row, err := e.row()
		require.NoError(t, err)
		require.NoError(t, row.Validate())
		for _, ep := range endpoints {
			if ep.wants(tenant, e) {
				wanted[ep.receiver.name]++
			}
			for i := range ep.subscriptions {
				if s := &ep.subscriptions[i]; s.matches(e) {
					matched[s]++
				}
			}
		}
	}
	for _, ep := range endpoints {
		for i, s := range ep.subscriptions {
			assert.Positive(t, matched[&ep.subscriptions[i]], s.pattern)
		}
	}
	assert.Greater(t, wanted["healthy"], n/3)
	assert.Greater(t, wanted["flaky"], n/10)
	assert.InDelta(t, n/150, wanted["dead"], n/300, "each takes seconds of retries")
}
