package relay

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
)

// at makes a job for an endpoint at a host.
func (b *bench) at(endpoint, host string) *job {
	j := b.job(endpoint, 10)
	j.endpoint = &delivery.Endpoint{ID: j.EndpointID, Concurrency: 10, Host: host}
	return j
}

// TestMovedEndpointsLeaveTheirHost: a host hangs, and somebody gives its endpoints another one. What waited for a place at the old host waits no more.
func TestMovedEndpointsLeaveTheirHost(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	b.cfg.Delivery.HostConcurrency = 1
	b.admit(t.Context(), b.at("x", "old"))
	hangs := b.nextJob()
	require.NotNil(t, hangs)
	for i := range 4 {
		b.admit(t.Context(), b.at(fmt.Sprint("e", i), "old"))
	}
	require.Nil(t, b.nextJob(), "the old host has all it may have")
	for i := range 4 {
		b.lane(b.at(fmt.Sprint("e", i), "new"))
	}
	begun := map[string]bool{}
	for j := b.nextJob(); j != nil; j = b.nextJob() {
		begun[b.names(j)] = true
		b.finish(j, verdict{})
	}
	require.Len(t, begun, 4)

	// The attempt that hangs counts for its host, also after the host has lost its last endpoint.
	b.lane(b.at("x", "new"))
	b.admit(t.Context(), b.at("y", "old"))
	require.Nil(t, b.nextJob())
	b.finish(hangs, verdict{})
	last := b.nextJob()
	require.NotNil(t, last)
	b.lane(b.at("y", "new"))
	b.finish(last, verdict{})
	require.NotContains(t, b.hosts, "old", "nobody is left")
}

// TestOpenBreakersUseUpNoTurns has a host of which most endpoints fail. Those whose breaker has opened begin nothing when their turn comes, which is not to be at the
// expense of one that works.
func TestOpenBreakersUseUpNoTurns(t *testing.T) {
	t.Parallel()
	for _, concurrency := range []int{1, 4} {
		for bad := 2 * concurrency; bad < 12*concurrency; bad += concurrency {
			synctest.Test(t, func(t *testing.T) { oneHost(t, concurrency, bad) })
		}
	}
}

func oneHost(t *testing.T, concurrency, bad int) {
	t.Helper()
	b := newBench(10_000)
	b.cfg.Delivery.HostConcurrency = concurrency
	add := func(name string) {
		if l := b.lanes[laneKey{"t", b.ids[name]}]; l == nil || l.queue.n < 2 {
			b.admit(t.Context(), b.at(name, "gateway"))
		}
	}
	fill := func() {
		for i := range bad {
			add(fmt.Sprint("bad", i))
		}
		add("good")
	}
	fill()
	fill()
	var running []*job
	delivered := 0
	for range 1000 {
		for j := b.nextJob(); j != nil; j = b.nextJob() {
			running = append(running, j)
		}
		require.NotEmpty(t, running, "%d at a time, %d that fail: nothing begins, though there is room and work", concurrency, bad)
		j := running[0]
		running = running[1:]
		var v verdict
		if b.names(j) == "good" {
			delivered++
		} else {
			v.failure = errAttempt
		}
		b.finish(j, v)
		b.release(append(b.rows, j))
		b.rows = nil
		time.Sleep(20 * time.Millisecond)
		fill()
	}
	require.Greater(t, delivered, 100)
}

// TestMovedEndpointsLeaveTheirTurn: lanes that had got the old host's free place leave it to those that stay.
func TestMovedEndpointsLeaveTheirTurn(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	b.cfg.Delivery.HostConcurrency = 1
	b.admit(t.Context(), b.at("x", "old"))
	first := b.nextJob()
	for i := range 4 {
		b.admit(t.Context(), b.at(fmt.Sprint("e", i), "old"))
	}
	require.Nil(t, b.nextJob())
	b.finish(first, verdict{}) // two are ready now, and no worker has come yet
	for i := range 2 {
		b.lane(b.at(fmt.Sprint("e", i), "new"))
	}
	begun := 0
	for j := b.nextJob(); j != nil; j = b.nextJob() {
		begun++
		b.finish(j, verdict{})
	}
	require.Equal(t, 4, begun)
}

// TestDoubtUsesUpNoTurns: what the stream brought must not begin while it is not sure that this replica leads, and leaves its turn to what was claimed.
func TestDoubtUsesUpNoTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1000)
		b.cfg.Delivery.HostConcurrency = 1
		b.ledger.tenure = newTenure(time.Now(), time.Minute)
		b.admit(t.Context(), b.at("x", "h"))
		first := b.nextJob()
		for i := range 2 {
			b.admit(t.Context(), b.at(fmt.Sprint("e", i), "h"))
		}
		claimed := b.at("q", "h")
		claimed.ledger, claimed.mine = nil, time.Now().Add(time.Hour)
		b.offer([]offered{{job: claimed}})
		require.Nil(t, b.nextJob())
		time.Sleep(41 * time.Second)
		b.finish(first, verdict{})
		require.Same(t, claimed, b.nextJob())
	})
}
