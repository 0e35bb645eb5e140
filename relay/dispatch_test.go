package relay

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// bench is a dispatcher whose decisions are noted instead of recorded.
type bench struct {
	*dispatcher
	deferrals []string
	dues      []time.Duration
	rows      []*job // deferred or leased, in that order
	leases    []*job
	ledger    *ledger
	ids       map[string]outbox.UUID
}

func newBench(window int) *bench {
	cfg := DefaultConfig()
	cfg.Window.Deliveries = window
	b := &bench{dispatcher: newDispatcher(&cfg, newMetrics(prometheus.NewRegistry(), &cfg)), ledger: newLedger(0, 0), ids: make(map[string]outbox.UUID)}
	b.deferred = func(j *job, reason string, due time.Duration) {
		b.deferrals = append(b.deferrals, reason)
		b.rows = append(b.rows, j)
		b.dues = append(b.dues, due)
	}
	b.ended = func(j *job, o store.Outcome) {
		if o.Status != store.Success {
			b.rows = append(b.rows, j)
		}
	}
	b.lease = func(j *job) {
		b.leases = append(b.leases, j)
		b.rows = append(b.rows, j)
	}
	return b
}

// finish ends the attempt of a job. It tells whether the retry queue had taken it over.
func (b *bench) finish(j *job, v verdict) (leased bool) {
	o := store.Outcome{Status: store.Success}
	if v.again {
		o.Status = store.Retrying
	}
	b.dispatcher.finish(j, v, o)
	return j.leased
}

// job makes a delivery of the stream for a named endpoint.
func (b *bench) job(endpoint string, concurrency int) *job {
	id, ok := b.ids[endpoint]
	if !ok {
		id = outbox.NewUUID()
		b.ids[endpoint] = id
	}
	return &job{
		Delivery: store.Delivery{ID: outbox.NewUUID(), Tenant: "t", EndpointID: id}, endpoint: &delivery.Endpoint{Concurrency: concurrency},
		ledger: b.ledger, commit: noCommit, bytes: 1,
	}
}

func (b *bench) names(j *job) string {
	for name, id := range b.ids {
		if id == j.EndpointID {
			return name
		}
	}
	return ""
}

func TestLanesTakeTurns(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	for range 5 {
		b.admit(t.Context(), b.job("busy", 10))
	}
	b.admit(t.Context(), b.job("other", 10))
	var order []string
	for range 4 {
		order = append(order, b.names(b.take()))
	}
	require.Equal(t, []string{"busy", "other", "busy", "busy"}, order)
}

func TestLaneKeepsItsConcurrency(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1000)
		for range 3 {
			b.admit(t.Context(), b.job("one", 2))
		}
		first, _ := b.take(), b.take()
		var third *job
		go func() { third = b.take() }()
		synctest.Wait()
		require.Nil(t, third, "a third attempt beside two")
		b.finish(first, verdict{})
		synctest.Wait()
		require.NotNil(t, third)
	})
}

func TestLaneBeyondItsShareUsesTheReserveWhileAnotherStarves(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	b.admit(t.Context(), b.job("small", 1))
	b.finish(b.take(), verdict{}) // the small lane has nothing to do, though its outcome waits to be recorded
	var big []*job
	more := func(n int) {
		for range n {
			big = append(big, b.job("big", 1))
			b.admit(t.Context(), big[len(big)-1])
		}
	}
	more(74)
	require.Zero(t, b.rooms[inReserve].n, "there is room for everybody")
	more(reserveFactor * 100)
	require.Equal(t, reserveFactor*100, b.rooms[inReserve].n, "50 of 100 are its share once three quarters are in use")
	require.Empty(t, b.deferrals)
	more(1)
	require.Equal(t, []string{store.DeferShare}, b.deferrals)
	for range 20 {
		b.admit(t.Context(), b.job("small", 1))
	}
	require.Len(t, b.deferrals, 1, "what is left is for those below their share")
	b.release(big)
	require.Zero(t, b.rooms[inReserve].n)
	require.Equal(t, 21, b.used())
}

// TestATenantHasItsPartOfTheBytes: a few large bodies of one tenant leave room for another's, however few deliveries they are.
func TestATenantHasItsPartOfTheBytes(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	admit := func(tenant string, bytes int64) {
		j := b.job(tenant, 1)
		j.Tenant, j.bytes = tenant, bytes
		b.admit(t.Context(), j)
	}
	all := int64(b.cfg.Window.Bytes)
	admit("small", 1)
	b.finish(b.take(), verdict{})
	for range 3 {
		admit("large", all/4)
	}
	require.Empty(t, b.deferrals, "there is room for everybody")
	admit("large", 1)
	require.Equal(t, []string{store.DeferShare}, b.deferrals)
	admit("small", all/8)
	require.Len(t, b.deferrals, 1, "what is left is for who has less than its part")
}

// TestAStarvingLaneLetsTheStreamGoOn: the stream waits while both lanes have work, and not once one has none.
func TestAStarvingLaneLetsTheStreamGoOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.admit(t.Context(), b.job("small", 1))
		j := b.take()
		for range 74 {
			b.admit(t.Context(), b.job("big", 1))
		}
		go b.admit(t.Context(), b.job("big", 1))
		synctest.Wait()
		require.Zero(t, b.rooms[inReserve].n)
		b.finish(j, verdict{})
		synctest.Wait()
		require.Equal(t, 1, b.rooms[inReserve].n)
	})
}

// TestALaneThatRefusesDoesNotStarve: where a lane is idle because its breaker is open, the stream waits for the others instead of filling the reserve
// and making rows.
func TestALaneThatRefusesDoesNotStarve(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.admit(t.Context(), b.job("moody", 1))
		b.finish(b.take(), verdict{})
		require.Equal(t, 1, b.starving)
		b.lanes[laneKey{"t", b.ids["moody"]}].until = time.Now().Add(time.Minute)
		b.admit(t.Context(), b.job("moody", 1))
		require.Equal(t, []string{store.DeferThrottled}, b.deferrals)
		require.Zero(t, b.starving)
		for range 74 {
			b.admit(t.Context(), b.job("big", 1))
		}
		go b.admit(t.Context(), b.job("big", 1))
		synctest.Wait()
		require.Zero(t, b.rooms[inReserve].n)
		time.Sleep(time.Minute + time.Second) // moody takes deliveries again
		synctest.Wait()
		require.Equal(t, []string{store.DeferThrottled, store.DeferWindow}, b.deferrals, "a wait has its end")
		b.admit(t.Context(), b.job("moody", 1))
		j := b.take()
		for ; b.names(j) != "moody"; j = b.take() {
			b.finish(j, verdict{})
		}
		b.finish(j, verdict{})
		b.admit(t.Context(), b.job("big", 1))
		require.Equal(t, 1, b.rooms[inReserve].n)
	})
}

// TestTheReserveHoldsWhatTheLaneComesTo: what a slow lane would have to give up again is not let in. How slow it is shows where it had work all the time.
func TestTheReserveHoldsWhatTheLaneComesTo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.admit(t.Context(), b.job("small", 1))
		b.finish(b.take(), verdict{})
		for range 80 {
			b.admit(t.Context(), b.job("big", 1))
		}
		second := func() {
			for range 10 {
				b.finish(b.take(), verdict{})
			}
			time.Sleep(time.Second)
			b.sweep(b.cfg.Window.Hold)
			b.admit(t.Context(), b.job("big", 1))
		}
		second()
		require.Empty(t, b.deferrals, "it may have been handed its work just now")
		second()
		require.Equal(t, []string{store.DeferShare}, b.deferrals, "61 wait already, where 10 a second are come to")
	})
}

// TestSweepLeavesWhatWaitsForTheDatabase: rows would be no help to a database that is behind.
func TestSweepLeavesWhatWaitsForTheDatabase(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(8)
		var jobs []*job
		for range 8 {
			jobs = append(jobs, b.job("one", 10))
			b.admit(t.Context(), jobs[len(jobs)-1])
			b.finish(b.take(), verdict{})
		}
		late, hangs := b.job("one", 10), b.job("hangs", 1)
		late.ledger, late.mine = nil, time.Now().Add(time.Hour)
		b.offer([]offered{{job: late}})
		go b.take() // finds that it has to wait
		synctest.Wait()
		time.Sleep(3 * time.Second)
		b.sweep(2 * time.Second)
		require.Empty(t, b.deferrals)
		b.release(jobs) // what waits begins
		synctest.Wait()
		b.admit(t.Context(), hangs)
		time.Sleep(3 * time.Second)
		b.sweep(2 * time.Second)
		require.Equal(t, []string{store.DeferHold}, b.deferrals, "a lane that has begun nothing")
		require.Same(t, hangs, b.rows[0])
	})
}

// TestWhatWaitsToBeRecordedIsNotAttemptedAgain: a lease runs out while the database is away, and the first that claims the delivery after that may be
// the one that has its outcome.
func TestWhatWaitsToBeRecordedIsNotAttemptedAgain(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	claim := func() *job {
		j := b.job("one", 10)
		j.ID, j.ledger, j.mine = outbox.UUID{1}, nil, b.now().Add(time.Hour)
		b.offer([]offered{{job: j}})
		return j
	}
	first := claim()
	require.Same(t, first, b.take())
	b.finish(first, verdict{})
	again := claim()
	require.Zero(t, again.lane.queue.n)
	require.Equal(t, 1, b.dispatcher.claimed)
	require.Equal(t, again.mine, first.mine)
	b.release([]*job{first})
	require.Same(t, claim(), b.take(), "another round")
	require.Equal(t, 1, b.dispatcher.claimed)
}

// TestNothingStartsWhileTooMuchIsUnrecorded: the database sets the pace, and a crash repeats a window at most.
func TestNothingStartsWhileTooMuchIsUnrecorded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(8)
		var jobs []*job
		for range 8 {
			b.admit(t.Context(), b.job("one", 10))
		}
		for range 8 {
			jobs = append(jobs, b.take())
			b.finish(jobs[len(jobs)-1], verdict{})
		}
		claimed := b.claimed(1)
		b.offer([]offered{{job: claimed}})
		var next *job
		go func() { next = b.take() }()
		synctest.Wait()
		require.Nil(t, next, "an attempt beside eight unrecorded ones")
		b.release(jobs[:1])
		synctest.Wait()
		require.NotNil(t, next)
	})
}

func TestLaneAloneWaitsForRoom(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(16)
		for range 16 {
			b.admit(t.Context(), b.job("only", 1))
		}
		admitted := false
		go func() {
			b.admit(t.Context(), b.job("only", 1))
			admitted = true
		}()
		synctest.Wait()
		require.False(t, admitted)
		j := b.take()
		b.finish(j, verdict{})
		b.release([]*job{j})
		synctest.Wait()
		require.True(t, admitted)
		require.Empty(t, b.deferrals)
	})
}

func TestNoWaitIsForEver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(16)
		for range 17 {
			b.admit(t.Context(), b.job("only", 1))
		}
		require.Equal(t, []string{store.DeferWindow}, b.deferrals)
	})
}

func TestSweepHandsOver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.admit(t.Context(), b.job("slow", 1))
		b.admit(t.Context(), b.job("slow", 1))
		running := b.take()
		time.Sleep(3 * time.Second)
		quick := b.job("quick", 1)
		b.admit(t.Context(), quick)
		b.admit(t.Context(), b.job("slow", 1)) // has not waited yet
		b.finish(b.take(), verdict{})
		b.release([]*job{quick}) // the database keeps up
		b.sweep(2 * time.Second)
		require.Equal(t, []string{store.DeferHold}, b.deferrals, "what waits is deferred, though its lane has begun something meanwhile")
		b.sweep(2 * time.Second)
		require.Equal(t, idsOf([]*job{running}), idsOf(b.leases), "what runs is leased, once")
		require.Len(t, b.deferrals, 1)
		again := b.job("slow", 1)
		again.ID, again.ledger, again.mine = running.ID, nil, b.now().Add(time.Hour)
		b.offer([]offered{{job: again}})
		require.Zero(t, b.dispatcher.claimed, "the lease has run out before the attempt")
		require.True(t, b.finish(running, verdict{}))
		require.True(t, running.Queued, "its outcome finds a row")
	})
}

func TestWorkersAreBounded(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	b.cfg.Delivery.Workers = 4
	spawned := 0
	b.spawn = func() { spawned++ }
	for i := range 10 {
		b.admit(t.Context(), b.job(fmt.Sprint(i), 1))
	}
	require.Equal(t, 4, spawned)
}

func TestOpenBreakerDefers(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	b.cfg.Breaker.Failures = 1
	b.admit(t.Context(), b.job("dead", 1))
	b.admit(t.Context(), b.job("dead", 1))
	b.finish(b.take(), verdict{failure: errAttempt})
	b.admit(t.Context(), b.job("alive", 1))
	require.Equal(t, "alive", b.names(b.take()))
	b.admit(t.Context(), b.job("dead", 1))
	require.Equal(t, []string{store.DeferBreaker, store.DeferBreaker}, b.deferrals)
	require.Greater(t, min(b.dues[0], b.dues[1]), b.cfg.Breaker.OpenFor-time.Second, "not before it lets something through")
}

func TestDrainDefersTheRest(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	running, waiting, late, claimed := b.job("one", 1), b.job("one", 1), b.job("one", 1), b.claimed(0)
	b.admit(t.Context(), running)
	b.admit(t.Context(), waiting)
	require.Same(t, running, b.take())
	drained := b.drain()
	b.admit(context.Background(), late)
	b.offer([]offered{{job: claimed}})
	require.Equal(t, []string{store.DeferDrain, store.DeferDrain, store.DeferDrain}, b.deferrals)
	b.finish(running, verdict{})
	b.release([]*job{running, waiting, late, claimed})
	select {
	case <-drained:
	default:
		require.Fail(t, "not drained")
	}
}

// TestAllWorkersComeBack: lanes that became ready while the database was behind are worked on by as many as there are, however little it takes at first.
func TestAllWorkersComeBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const window, lanes = 50, 200
		b := newBench(window)
		var begun atomic.Int32
		answer := make(chan struct{})
		b.spawn = func() {
			go func() {
				for j := b.take(); j != nil; j = b.take() {
					begun.Add(1)
					<-answer
				}
			}()
		}
		var first []*job
		for i := range window {
			j := b.job(fmt.Sprint("first ", i), 1)
			first = append(first, j)
			b.admit(t.Context(), j)
			synctest.Wait()
			b.finish(j, verdict{})
		}
		for range window {
			answer <- struct{}{}
		}
		begun.Store(0)
		for i := range lanes {
			j := b.job(fmt.Sprint("lane ", i), 1)
			j.ledger, j.mine = nil, b.now().Add(time.Hour)
			b.offer([]offered{{job: j}})
		}
		synctest.Wait()
		require.Zero(t, begun.Load(), "as much as may be waits to be recorded")
		b.release(first[:1])
		b.release(first[1:])
		synctest.Wait()
		require.EqualValues(t, lanes, begun.Load())
		close(answer)
		b.close()
	})
}

// TestReclaimedBeforeRelease: the outcome of a claimed delivery is durable, its row due and claimed anew, before the dispatcher hears of that. The row is leased to
// us, so nobody else would attempt it. Where the outcome is not durable yet, the claim says nothing new.
func TestReclaimedBeforeRelease(t *testing.T) {
	t.Parallel()
	for _, durable := range []bool{true, false} {
		b := newBench(100)
		claim := func(attempts int) *job {
			j := b.job("one", 10)
			j.ID, j.ledger, j.Attempts, j.mine = outbox.UUID{1}, nil, attempts, b.now().Add(time.Hour)
			b.offer([]offered{{job: j}})
			return j
		}
		first := claim(1)
		require.Same(t, first, b.nextJob())
		b.finish(first, verdict{attempted: true, failure: errAttempt, again: true})
		claim(1)
		var want *job
		if durable {
			want = claim(2)
		}
		require.Nil(t, b.nextJob())
		b.release([]*job{first})
		require.Same(t, want, b.nextJob())
		_, _, claimed, _ := b.load()
		if durable {
			b.finish(want, verdict{})
			b.release([]*job{want})
			_, _, claimed, _ = b.load()
		}
		require.Zero(t, claimed)
		require.Empty(t, b.held)
	}
}
