package relay

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// Two lanes whose queue was deferred while they waited for the host must not use up the turn of the one behind them.
func TestALaneBehindEmptyOnesIsNotForgotten(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	b.cfg.Delivery.HostConcurrency = 1
	running := b.job("first", 10)
	b.admit(t.Context(), running)
	require.Same(t, running, b.nextJob())
	for _, name := range []string{"second", "third", "fourth"} {
		b.admit(t.Context(), b.job(name, 10))
	}
	require.Nil(t, b.nextJob(), "the host takes one at a time")
	b.mu.Lock()
	for key, l := range b.lanes {
		if key.endpoint == b.ids["second"] || key.endpoint == b.ids["third"] {
			b.deferQueue(l, store.DeferHold, 0)
		}
	}
	b.mu.Unlock()
	b.finish(running, verdict{})
	j := b.nextJob()
	require.NotNil(t, j)
	require.Equal(t, "fourth", b.names(j))
}

// A session that ends takes along what it has not started, and leaves what was claimed behind it.
func TestAbandonKeepsWhatWasClaimed(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	streamed, claimed := b.keyed(1), b.claimed(1)
	b.admit(t.Context(), streamed)
	b.offer([]offered{{job: claimed}})
	require.Equal(t, 1, b.abandon(b.ledger))
	require.Same(t, claimed, b.nextJob())
	b.finish(claimed, verdict{})
	b.release([]*job{claimed})
	<-b.drain()
}

// TestCaps: a lane that has something is to have twice what it may attempt at once, or a run of an ordered key, and one that has nothing any number: others can
// attempt what it does not take.
func TestCaps(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	b.admit(t.Context(), b.job("dry", 4))
	b.finish(b.take(), verdict{})
	for range 3 {
		b.admit(t.Context(), b.job("some", 4))
	}
	for range 9 {
		b.admit(t.Context(), b.job("many", 4))
	}
	b.admit(t.Context(), b.keyed(1))
	b.admit(t.Context(), b.keyed(1))
	want := make(map[store.Endpoint]int)
	for name, n := range map[string]int{"some": 2*4 - 3, "many": 0, "one": runLength - 2} {
		want[store.Endpoint{Tenant: "t", ID: b.ids[name]}] = n
	}
	require.Equal(t, want, b.caps())
}

func TestALeaseThatRanOutIsNotAttempted(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		done := 0
		b.claimedDone = func() { done++ }
		for _, key := range []byte{1, 1, 2, 3} {
			b.offer([]offered{{job: b.claimed(key)}})
		}
		time.Sleep(40 * time.Minute)
		b.renewed(b.dispatcher.leases()[2:3], time.Now().Add(time.Hour))
		time.Sleep(40 * time.Minute) // stopped, or cut off
		var attempted []*job
		for j := b.nextJob(); j != nil; j = b.nextJob() {
			attempted = append(attempted, j)
		}
		require.Len(t, attempted, 1)
		require.True(t, attempted[0].mine.After(time.Now()))
		require.Equal(t, 3, done)
		b.finish(attempted[0], verdict{})
		b.release(attempted)
		n, left := b.claimRoom()
		require.Zero(t, n)
		require.EqualValues(t, b.cfg.Window.Bytes/2, left)
		<-b.drain()
	})
}

// A stream that waits for room gives signs of life meanwhile, or the server would end it.
func TestWaitingForRoomKeepsTheStreamAlive(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(16)
		b.admit(t.Context(), b.job("other", 1))
		j := b.job("one", 1)
		j.bytes = int64(b.cfg.Window.Bytes) * 2
		b.rooms[inDeferral] = room{n: 20, bytes: j.bytes} // what was deferred waits for the database
		beats := 0
		b.beat = func(context.Context) { beats++ }
		go func() {
			time.Sleep(10 * time.Second)
			b.mu.Lock()
			b.rooms[inDeferral] = room{}
			b.mu.Unlock()
			signal(b.room)
		}()
		b.admit(t.Context(), j)
		require.GreaterOrEqual(t, beats, 15)
	})
}

func TestAside(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		a := make(aside)
		locked := &store.TenantError{Tenant: "a", Err: errors.New("locked")}
		for _, wait := range []time.Duration{firstPatience, 2 * firstPatience, 4 * firstPatience, 8 * firstPatience, lastAside, lastAside} {
			a.note("a", locked)
			a.note("b", nil)
			require.False(t, a.has("b"))
			time.Sleep(wait - 1)
			require.True(t, a.has("a"))
			time.Sleep(time.Nanosecond)
			require.False(t, a.has("a"))
		}
		a.note("a", nil)
		a.note("a", locked)
		time.Sleep(firstPatience)
		require.False(t, a.has("a"), "it has been well since")
		a.note("a", locked)
		a.note("a", &store.TenantError{Tenant: "a", Suspended: true})
		require.False(t, a.has("a"), "who resumes it need not wait")
	})
}
