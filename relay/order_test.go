package relay

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// keyed makes a delivery of the stream for the endpoint "one" with a key.
func (b *bench) keyed(key byte) *job {
	j := b.job("one", 10)
	j.Order = store.Place{Key: outbox.UUID{key}}
	return j
}

// claimed makes the same as it comes from the retry queue.
func (b *bench) claimed(key byte) *job {
	j := b.keyed(key)
	j.ledger, j.mine = nil, b.now().Add(time.Hour)
	return j
}

func TestOneOfAKeyAtATime(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	first, second, other := b.keyed(1), b.keyed(1), b.keyed(2)
	for _, j := range []*job{first, second, other} {
		b.admit(t.Context(), j)
	}
	require.Same(t, first, b.nextJob())
	require.Same(t, other, b.nextJob(), "another key need not wait")
	require.Nil(t, b.nextJob(), "the second waits for the first")
	b.finish(first, verdict{})
	require.Same(t, second, b.nextJob())
	require.Empty(t, b.rows)
}

func TestWhatWaitsBehindAFailureBecomesRows(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	first, second, third, later := b.keyed(1), b.keyed(1), b.keyed(1), b.keyed(1)
	for _, j := range []*job{first, second, third} {
		b.admit(t.Context(), j)
	}
	require.Same(t, first, b.nextJob())
	b.finish(first, verdict{failure: errAttempt, again: true})
	b.admit(t.Context(), later)
	require.Equal(t, idsOf([]*job{first, second, third, later}), idsOf(b.rows), "the failed one is recorded before them")
	require.Equal(t, []string{store.DeferOrder, store.DeferOrder, store.DeferOrder}, b.deferrals)

	keys, _ := b.blockedKeys()
	require.Empty(t, keys, "nothing of the key is recorded yet")
	b.release([]*job{first, second, third})
	keys, _ = b.blockedKeys()
	require.Empty(t, keys)
	b.release([]*job{later})
	keys, stamps := b.blockedKeys()
	require.Len(t, keys, 1)

	again := b.keyed(1)
	b.admit(t.Context(), again)
	b.unblock(keys, stamps, []bool{false})
	b.admit(t.Context(), b.keyed(1))
	require.Len(t, b.rows, 6, "the key was blocked anew while the database was asked")
	b.release(b.rows[4:])
	keys, stamps = b.blockedKeys()
	b.unblock(keys, stamps, []bool{true})
	b.admit(t.Context(), b.keyed(1))
	require.Len(t, b.rows, 7, "the database has rows of it")
	b.release(b.rows[6:])
	keys, stamps = b.blockedKeys()
	b.unblock(keys, stamps, []bool{false})
	free := b.keyed(1)
	b.admit(t.Context(), free)
	require.Same(t, free, b.nextJob())
}

func TestADeferralTakesItsKeyAlong(t *testing.T) {
	t.Parallel()
	b := newBench(16)
	var jobs []*job
	for range 16 + reserveFactor*16 + 1 {
		j := b.keyed(1)
		jobs = append(jobs, j)
		switch len(jobs) {
		case 16:
			require.Same(t, jobs[0], b.nextJob())
		case 17:
			b.starving = 1 // another lane wants its share
		}
		b.admit(t.Context(), j)
	}
	require.Equal(t, jobs, b.rows, "what runs is leased, what waits is deferred, in order")
	require.Equal(t, jobs[:1], b.leases)
	require.True(t, b.finish(jobs[0], verdict{}))
	require.Nil(t, b.nextJob())
}

func TestARunOfClaimsGoesBackAtTheFirstFailure(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	run := []*job{b.claimed(1), b.claimed(1), b.claimed(1)}
	b.offer([]offered{{job: run[0]}, {job: run[1]}, {job: run[2]}})
	require.Len(t, b.dispatcher.leases(), 3)
	require.Same(t, run[0], b.nextJob())
	b.finish(run[0], verdict{})
	require.Same(t, run[1], b.nextJob())
	b.finish(run[1], verdict{failure: errAttempt, again: true})
	require.Equal(t, idsOf(run[1:]), idsOf(b.rows))
	require.Empty(t, b.lanes[run[0].lane.key].blocked, "who only works the queue blocks nothing")
	b.admit(t.Context(), b.keyed(1))
	require.NotNil(t, b.nextJob())
}

// What the stream brings of a blocked key becomes a row. What was claimed of it has its rows already, with places before that one.
func TestAnArrivalDoesNotSendClaimsBack(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	run := []*job{b.claimed(1), b.claimed(1), b.claimed(1)}
	b.offer([]offered{{job: run[0]}, {job: run[1]}, {job: run[2]}})
	b.block([]store.OrderedKey{{Tenant: "t", Endpoint: b.ids["one"], Key: outbox.UUID{1}}})
	later := b.keyed(1)
	b.admit(t.Context(), later)
	require.Equal(t, idsOf([]*job{later}), idsOf(b.rows))
	for _, j := range run {
		require.Same(t, j, b.nextJob())
		b.finish(j, verdict{})
	}
}

// The same where the stream had come first and an operator's replay second.
func TestABlockedKeyKeepsItsClaims(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	streamed, claimed, later := b.keyed(1), b.claimed(1), b.keyed(1)
	b.admit(t.Context(), streamed)
	b.offer([]offered{{job: claimed}})
	b.admit(t.Context(), later)
	b.mu.Lock()
	b.blockKey(streamed.lane, outbox.UUID{1})
	b.mu.Unlock()
	require.Equal(t, idsOf([]*job{streamed, later}), idsOf(b.rows))
	require.Same(t, claimed, b.nextJob())
	require.Nil(t, b.nextJob())
	require.Zero(t, streamed.lane.behind)
}

func TestARunOfClaimsGoesBackWithItsFirst(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	run := []*job{b.claimed(1), b.claimed(1), b.claimed(2)}
	b.offer([]offered{{run[0], store.DeferPaused, parked}, {job: run[1]}, {job: run[2]}})
	require.Equal(t, idsOf(run[:2]), idsOf(b.rows), "else the second would overtake the first")
	require.Same(t, run[2], b.nextJob())
	require.Nil(t, b.nextJob())
}

// The same where the first is still in memory, with an outcome that its lease did not wait for.
func TestAClaimGoesBackBehindAnOutcome(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	first, again, second := b.claimed(1), b.claimed(1), b.claimed(1)
	b.offer([]offered{{job: first}})
	require.Same(t, first, b.nextJob())
	b.finish(first, verdict{failure: errAttempt, again: true})
	again.ID = first.ID
	b.offer([]offered{{job: again}, {job: second}})
	require.Equal(t, idsOf([]*job{first, second}), idsOf(b.rows))
	require.Nil(t, b.nextJob())
}

func TestADeadLetterLetsTheNextGo(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	first, second := b.keyed(1), b.keyed(1)
	b.admit(t.Context(), first)
	b.admit(t.Context(), second)
	require.Same(t, first, b.nextJob())
	b.finish(first, verdict{failure: errAttempt})
	require.Same(t, second, b.nextJob())
}

func TestSweepKeepsTheOrderOfRows(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		running, second, third, queued := b.keyed(1), b.keyed(1), b.keyed(1), b.keyed(2)
		for _, j := range []*job{running, second, third} {
			b.admit(t.Context(), j)
		}
		require.Same(t, running, b.nextJob())
		b.admit(t.Context(), queued)
		time.Sleep(3 * time.Second)
		b.sweep(2 * time.Second)
		b.sweep(2 * time.Second)
		var ofFirst []*job
		for _, j := range b.rows {
			if j != queued {
				ofFirst = append(ofFirst, j)
			}
		}
		require.Len(t, b.rows, 4)
		require.Equal(t, idsOf([]*job{running, second, third}), idsOf(ofFirst))
		require.Equal(t, idsOf([]*job{running}), idsOf(b.leases))
		require.True(t, b.finish(running, verdict{}))
		b.admit(t.Context(), b.keyed(1))
		require.Len(t, b.rows, 5, "the rows are still there")
	})
}

// What the stream brought behind a claim holds back the log as well. The claim has its row, with a place before it.
func TestSweepTakesWhatWaitsBehindAClaim(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		claims, streamed := []*job{b.claimed(1), b.claimed(1)}, b.keyed(1)
		b.offer([]offered{{job: claims[0]}, {job: claims[1]}})
		b.admit(t.Context(), streamed)
		require.Same(t, claims[0], b.nextJob())
		time.Sleep(3 * time.Second)
		b.sweep(2 * time.Second)
		require.Equal(t, idsOf([]*job{streamed}), idsOf(b.rows))
		b.finish(claims[0], verdict{})
		require.Same(t, claims[1], b.nextJob())
	})
}

// What waits of claims is looked at after a while, one of each lane, whether its key has begun or not. Called back, it leaves what the stream has brought.
func TestLongRunsAreCalledBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		claim := b.claimed(1)
		b.offer([]offered{{job: claim}, {job: b.claimed(2)}})
		require.Empty(t, b.longRuns(2*time.Second))
		time.Sleep(3 * time.Second)
		streamed := b.keyed(3)
		b.admit(t.Context(), streamed)
		require.Len(t, b.longRuns(2 * time.Second)["t"], 1)
		b.recall(claim.lane.key)
		require.Equal(t, []string{store.DeferHold, store.DeferHold}, b.deferrals)
		require.Same(t, streamed, b.nextJob())
		require.Empty(t, b.longRuns(2*time.Second))
	})
}

func TestDrainKeepsTheOrderOfRows(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	running, second := b.keyed(1), b.keyed(1)
	b.admit(t.Context(), running)
	b.admit(t.Context(), second)
	require.Same(t, running, b.nextJob())
	drained := b.drain()
	require.Equal(t, idsOf([]*job{running, second}), idsOf(b.rows), "leased, then deferred")
	b.finish(running, verdict{})
	b.release([]*job{running, second})
	<-drained
}

func TestAbandonLeavesNothingOfAKey(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	running, second, other := b.keyed(1), b.keyed(1), b.keyed(2)
	for _, j := range []*job{running, second} {
		b.admit(t.Context(), j)
	}
	require.Same(t, running, b.nextJob())
	b.admit(t.Context(), other)
	require.Equal(t, 2, b.abandon(b.ledger))
	b.finish(running, verdict{})
	b.release([]*job{running})
	stream, _, _, inFlight := b.load()
	require.Zero(t, stream+inFlight)
	require.Empty(t, b.lanes[running.lane.key].chains)
}

// idsOf is for comparisons: the difference of two jobs, as testify tells it, leads through the whole dispatcher, and has it panic.
func idsOf(jobs []*job) []outbox.UUID {
	ids := make([]outbox.UUID, 0, len(jobs))
	for _, j := range jobs {
		ids = append(ids, j.ID)
	}
	return ids
}
