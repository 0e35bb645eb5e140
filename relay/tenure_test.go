package relay

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestTenure(t *testing.T) {
	t.Parallel()
	start := time.Now()
	at := func(s int) time.Time { return start.Add(time.Duration(s) * time.Second) }
	tn := newTenure(start, time.Minute)
	require.True(t, tn.holds(at(39)))
	tn.heard(at(39))
	require.True(t, tn.holds(at(78)), "it has listened all the time")
	require.False(t, tn.holds(at(79)))
	tn.heard(at(100))
	require.False(t, tn.holds(at(100)), "what is heard now may have waited in the socket")
	require.False(t, tn.proved(at(30), at(100)), "a record from before the freeze says nothing of now")
	require.False(t, tn.holds(at(100)))
	require.True(t, tn.proved(at(100), at(101)))
	require.True(t, tn.holds(at(101)))
	require.False(t, tn.proved(at(101), at(102)), "it had not run out")
	tn.heard(at(90))
	require.True(t, tn.holds(at(140)), "it never becomes shorter")
	require.True(t, (*tenure)(nil).holds(at(1e6)))
}

// A leader that cannot be sure to be the only one starts nothing that came from the log; the retry queue, which has leases, goes on.
func TestNothingStartsAfterTheTenure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1000)
		b.ledger.tenure = newTenure(time.Now(), time.Minute)
		doubts := 0
		b.doubt = func() { doubts++ }
		taken := make(chan *job)
		for range 2 {
			go func() { taken <- b.take() }()
		}
		time.Sleep(41 * time.Second) // frozen, say
		b.admit(t.Context(), b.job("one", 10))
		queued := b.job("two", 10)
		queued.ledger, queued.mine = nil, time.Now().Add(time.Hour)
		b.offer([]offered{{job: queued}})
		synctest.Wait()
		require.Equal(t, queued, <-taken)
		require.Positive(t, doubts)
		select {
		case <-taken:
			require.Fail(t, "started by a leader of the past")
		default:
		}

		require.True(t, b.ledger.tenure.proved(time.Now(), time.Now()))
		b.sure()
		require.Equal(t, "one", b.names(<-taken))
	})
}
