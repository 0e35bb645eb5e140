package relay

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/stretchr/testify/require"
)

func TestLedger(t *testing.T) {
	t.Parallel()

	t.Run("covers the contiguous prefix only", func(t *testing.T) {
		t.Parallel()
		l := newLedger(100, 100)
		a, b := l.begin(110, time.Time{}), 0
		l.add(a)
		l.add(a)
		l.end(a, 120)
		b = l.begin(130, time.Time{})
		l.add(b)
		l.end(b, 140)
		l.record(b)
		covered, high := l.position()
		require.Equal(t, pglogrepl.LSN(100), covered)
		require.Equal(t, pglogrepl.LSN(130), high)
		l.record(a)
		covered, _ = l.position()
		require.Equal(t, pglogrepl.LSN(100), covered)
		l.record(a)
		covered, _ = l.position()
		require.Equal(t, pglogrepl.LSN(140), covered)
	})

	t.Run("a transaction still being read is not covered", func(t *testing.T) {
		t.Parallel()
		l := newLedger(100, 0)
		a := l.begin(200, time.Time{})
		l.add(a)
		l.record(a)
		covered, _ := l.position()
		require.Equal(t, pglogrepl.LSN(100), covered)
		l.end(a, 210)
		covered, _ = l.position()
		require.Equal(t, pglogrepl.LSN(210), covered)
	})

	t.Run("commits without deliveries wait for those before them", func(t *testing.T) {
		t.Parallel()
		l := newLedger(100, 0)
		l.end(noCommit, 150)
		covered, _ := l.position()
		require.Equal(t, pglogrepl.LSN(150), covered)
		a := l.begin(200, time.Time{})
		l.add(a)
		l.end(a, 210)
		l.end(noCommit, 300)
		l.idle(400)
		covered, _ = l.position()
		require.Equal(t, pglogrepl.LSN(150), covered)
		l.record(a)
		covered, _ = l.position()
		require.Equal(t, pglogrepl.LSN(400), covered)
	})

	t.Run("what is abandoned is never covered", func(t *testing.T) {
		t.Parallel()
		l := newLedger(100, 0)
		a := l.begin(200, time.Time{})
		l.add(a)
		l.add(a)
		l.end(a, 210)
		sealed := l.seal()
		l.abandon(1)
		l.record(a)
		select {
		case <-sealed:
			t.Fatal("sealed before the record was written")
		default:
		}
		l.written(1)
		<-sealed
		covered, _ := l.position()
		require.Equal(t, pglogrepl.LSN(100), covered)
	})

	t.Run("what is covered takes no room", func(t *testing.T) {
		t.Parallel()
		for _, behind := range []int{0, 1, 600} { // commits that are open whenever another one is covered
			l := newLedger(0, 0)
			var entries []int
			for i := range 10_000 {
				lsn := pglogrepl.LSN(10 * (i + 1))
				n := l.begin(lsn, time.Time{})
				l.add(n)
				l.end(n, lsn+5)
				entries = append(entries, n)
				if i >= behind {
					l.record(entries[i-behind])
					covered, _ := l.position()
					require.Equal(t, lsn-pglogrepl.LSN(10*behind)+5, covered)
				}
			}
			require.LessOrEqual(t, cap(l.commits), 4096, "%d open", behind)
		}
	})
}

// TestLedgerAgainstModel settles at random and compares with a model that keeps every commit.
func TestLedgerAgainstModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(10) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		type model struct {
			end  pglogrepl.LSN
			open int
		}
		var commits []model
		var open []int // one entry a delivery: index of its commit
		var entries []int
		l := newLedger(0, 0)
		lsn := pglogrepl.LSN(0)
		for range 1500 {
			if rnd.IntN(3) > 0 && len(open) > 0 {
				i := rnd.IntN(len(open))
				c := open[i]
				open[i] = open[len(open)-1]
				open = open[:len(open)-1]
				commits[c].open--
				if rnd.IntN(2) == 0 {
					l.settle(entries[c])
				} else {
					l.record(entries[c])
					l.written(1)
				}
			} else {
				lsn += 10
				n := rnd.IntN(4)
				entry := noCommit
				if n > 0 {
					entry = l.begin(lsn, time.Time{})
				}
				for range n {
					l.add(entry)
					open = append(open, len(commits))
				}
				lsn += 5
				l.end(entry, lsn)
				commits = append(commits, model{end: lsn, open: n})
				entries = append(entries, entry)
			}
			want := pglogrepl.LSN(0)
			for _, c := range commits {
				if c.open > 0 {
					break
				}
				want = c.end
			}
			covered, _ := l.position()
			require.Equal(t, want, covered, "seed %d", seed)
			require.Equal(t, len(open), l.outstanding, "seed %d", seed)
		}
	}
}
