package relay

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// another lets time go by in which only another endpoint has events.
func (b *bench) another(t *testing.T, d time.Duration) {
	t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Second) {
		j := b.job("other", 1)
		j.committed = time.Now()
		b.admit(t.Context(), j)
		b.finish(b.nextJob(), verdict{attempted: true})
		b.release([]*job{j})
		b.sweep(b.cfg.Window.Hold)
	}
}

func TestAPauseOutlastsALaneWithoutWork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		j := b.job("one", 1)
		j.committed = time.Now()
		b.admit(t.Context(), j)
		b.finish(b.nextJob(), verdict{attempted: true, failure: errAttempt, overloaded: true, pause: time.Hour, again: true})
		b.release([]*job{j})
		b.another(t, 20*time.Minute)
		b.admit(t.Context(), b.job("one", 1))
		require.Equal(t, []string{store.DeferThrottled}, b.deferrals, "it has asked for an hour")
	})
}

func TestARateOutlastsALaneWithoutWork(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.cfg.Window.Hold = time.Minute
		slow := func() *job {
			j := b.job("one", 1)
			j.endpoint.Rate = 1.0 / 3600 // one an hour
			j.committed = time.Now()
			return j
		}
		j := slow()
		b.admit(t.Context(), j)
		b.finish(b.nextJob(), verdict{attempted: true})
		b.release([]*job{j})
		b.another(t, 20*time.Minute)
		b.admit(t.Context(), slow())
		require.Nil(t, b.nextJob(), "one an hour, and twenty minutes have passed")
	})
}

// TestABreakerOfBeforeShortensNoPause: leading anew, with the breakers that the database knows of, is no reason to ask a receiver that wants to be left alone.
func TestABreakerOfBeforeShortensNoPause(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.admit(t.Context(), b.job("one", 1))
		b.finish(b.nextJob(), verdict{attempted: true, failure: errAttempt, overloaded: true, pause: time.Hour, again: true})
		b.keepShut(laneKey{"t", b.ids["one"]}, time.Minute)
		time.Sleep(2 * time.Minute)
		b.admit(t.Context(), b.job("one", 1))
		require.Equal(t, []string{store.DeferThrottled}, b.deferrals, "it has asked for an hour")
	})
}
