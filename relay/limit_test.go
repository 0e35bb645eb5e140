package relay

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func TestRampBeginsLowAndGrowsWithSuccess(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	for range 500 {
		b.admit(t.Context(), b.job("one", 64))
	}
	rounds := []int{}
	for range 5 {
		var running []*job
		for j := b.nextJob(); j != nil; j = b.nextJob() {
			running = append(running, j)
		}
		rounds = append(rounds, len(running))
		for _, j := range running {
			b.finish(j, verdict{})
		}
	}
	require.Equal(t, []int{firstAllowed, 16, 32, 64, 64}, rounds, "each round of successes doubles it, up to the limit")
}

func TestOverloadHalvesTheRamp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := ramp{limit: 64, allowed: 64, threshold: 1 << 30}
		time.Sleep(time.Minute)
		for range 10 {
			r.overloaded(time.Now())
		}
		require.Equal(t, 32, r.allowance(), "once for all answers of a second")
		for range 32 {
			r.filled(32)
			r.succeeded()
		}
		require.Equal(t, 33, r.allowance(), "one more a round from there")
		for range 10 {
			time.Sleep(time.Second)
			r.overloaded(time.Now())
		}
		require.Equal(t, 1, r.allowance(), "never none")
	})
}

func TestRateIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(10_000)
		b.cfg.Window.Hold = time.Minute
		for range 1000 {
			j := b.job("one", 64)
			j.endpoint.Rate = 100
			b.admit(t.Context(), j)
		}
		started := make(chan time.Time, 1000)
		go func() {
			for j := b.take(); j != nil; j = b.take() {
				started <- time.Now()
				b.finish(j, verdict{})
			}
			close(started)
		}()
		begin := time.Now()
		time.Sleep(5*time.Second + time.Millisecond)
		b.close()
		n := 0
		for at := range started {
			n++
			require.LessOrEqual(t, n, int(at.Sub(begin).Seconds()*100)+4, "at most 20 ms early")
		}
		require.GreaterOrEqual(t, n, 499)
	})
}

func TestWhatExceedsTheRateComesBackAtTheRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(10_000)
		for range 400 {
			j := b.job("one", 64)
			j.endpoint.Rate = 100
			b.admit(t.Context(), j)
		}
		require.Len(t, b.dues, 100, "what starts within the hold of 3 s may wait in memory")
		require.InDelta(t, 3, b.dues[0].Seconds(), 0.2)
		require.InDelta(t, 4, b.dues[99].Seconds(), 0.2)
	})
}

func TestHostHasAConcurrencyOfItsOwn(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	b.cfg.Delivery.HostConcurrency = 3
	for _, name := range []string{"one", "two", "three"} {
		for range 3 {
			j := b.job(name, 10)
			j.Tenant, j.endpoint.Host = "tenant of "+name, "gateway:443"
			b.admit(t.Context(), j)
		}
	}
	var running []*job
	for j := b.nextJob(); j != nil; j = b.nextJob() {
		running = append(running, j)
	}
	require.Len(t, running, 3)
	served := map[string]int{}
	for len(running) > 0 {
		j := running[0]
		running = running[1:]
		served[b.names(j)]++
		b.finish(j, verdict{})
		if next := b.nextJob(); next != nil {
			running = append(running, next)
		}
		require.LessOrEqual(t, b.hosts["gateway:443"].running, 3)
	}
	require.Equal(t, map[string]int{"one": 3, "two": 3, "three": 3}, served)
}

func TestTenantsTakeTurns(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	for _, name := range []string{"a", "b", "c", "d"} {
		b.admit(t.Context(), b.job(name, 10))
		b.admit(t.Context(), b.job(name, 10))
	}
	small := b.job("small", 10)
	small.Tenant = "other"
	b.admit(t.Context(), small)
	b.nextJob()
	require.Same(t, small, b.nextJob(), "the second turn is the second tenant's, whatever the first has")
}

func TestHangingReceiversLeaveWorkersToOthers(t *testing.T) {
	t.Parallel()
	b := newBench(10_000)
	b.cfg.Delivery.Workers = 64
	for _, name := range []string{"h1", "h2", "h3", "h4", "h5", "h6", "h7", "h8", "h9"} {
		for range 20 {
			b.admit(t.Context(), b.job(name, 64))
		}
	}
	hanging := 0
	for b.nextJob() != nil {
		hanging++
	}
	require.Equal(t, 63, hanging, "three quarters, and from there each lane its ninth")
	good := b.job("good", 64)
	good.Tenant = "other"
	b.admit(t.Context(), good)
	require.Same(t, good, b.nextJob())
}

func TestPauseAskedByTheReceiver(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.admit(t.Context(), b.job("one", 1))
		b.admit(t.Context(), b.job("one", 1))
		b.finish(b.nextJob(), verdict{failure: errAttempt, overloaded: true, pause: 10 * time.Second})
		require.Nil(t, b.nextJob())
		b.admit(t.Context(), b.job("one", 1))
		require.Equal(t, []string{store.DeferThrottled, store.DeferThrottled}, b.deferrals)
		require.Equal(t, 0, b.caps()[store.Endpoint{Tenant: "t", ID: b.ids["one"]}])
		time.Sleep(10 * time.Second)
		b.admit(t.Context(), b.job("one", 1))
		require.NotNil(t, b.nextJob())
	})
}

func TestRecoveredReceiverIsProbedThenRamped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1000)
		for range 200 {
			b.admit(t.Context(), b.job("one", 64))
		}
		for range b.cfg.Breaker.Failures {
			b.finish(b.nextJob(), verdict{failure: errAttempt})
		}
		require.Nil(t, b.nextJob())
		time.Sleep(b.cfg.Breaker.OpenFor + time.Millisecond)
		for range 200 {
			b.admit(t.Context(), b.job("one", 64))
		}
		for _, want := range []int{1, 2, 4, 5, 6} {
			var running []*job
			for j := b.nextJob(); j != nil; j = b.nextJob() {
				running = append(running, j)
			}
			require.Len(t, running, want)
			for _, j := range running {
				b.finish(j, verdict{})
			}
		}
	})
}

func TestFailureRatioOpensTheBreaker(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	b.cfg.Breaker.FailureRatio, b.cfg.Breaker.MinAttempts = 0.5, 10
	opened := false
	b.breakerOpened = func(laneKey, time.Duration) { opened = true }
	for i := range 10 {
		require.False(t, opened, "after %d", i)
		b.admit(t.Context(), b.job("one", 1))
		v := verdict{}
		if i%2 == 1 {
			v.failure = errAttempt
		}
		b.finish(b.nextJob(), v)
	}
	require.True(t, opened)
}

func TestCanceledAttemptSaysNothing(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	for range 2 * b.cfg.Breaker.Failures {
		b.admit(t.Context(), b.job("one", 1))
		b.finish(b.nextJob(), verdict{failure: errNoVerdict})
	}
	require.Empty(t, b.deferrals)
}

// TestEndpointIsTurnedOnce: what is told of an endpoint is that it fails, however often its breaker opens again, and that it answers again.
func TestEndpointIsTurnedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1000)
		var told []bool
		b.turned = func(key laneKey, open bool, _ delivery.Class, _ string) {
			require.Equal(t, b.ids["one"], key.endpoint)
			told = append(told, open)
		}
		attempt := func(v verdict) {
			b.admit(t.Context(), b.job("one", 1))
			j := b.nextJob()
			require.NotNil(t, j)
			b.finish(j, v)
		}
		attempt(verdict{})
		for range b.cfg.Breaker.Failures {
			attempt(verdict{failure: errAttempt})
		}
		for range 5 { // probes that fail
			time.Sleep(b.cfg.Breaker.OpenFor + time.Millisecond)
			attempt(verdict{failure: errAttempt})
		}
		require.Equal(t, []bool{true}, told)
		time.Sleep(b.cfg.Breaker.OpenFor + time.Millisecond)
		attempt(verdict{failure: errNoVerdict})
		require.Equal(t, []bool{true}, told, "an attempt that says nothing")
		attempt(verdict{})
		attempt(verdict{})
		require.Equal(t, []bool{true, false}, told)

		b.keepShut(laneKey{"t", b.ids["one"]}, time.Minute) // as an earlier process has told
		time.Sleep(time.Minute)
		attempt(verdict{})
		require.Equal(t, []bool{true, false, false}, told)
	})
}

// TestBrokenEndpointIsRemembered: an endpoint that fails and then gets nothing for hours answers again, and that is told. After a day it is forgotten.
func TestBrokenEndpointIsRemembered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1000)
		var told []bool
		b.turned = func(_ laneKey, open bool, _ delivery.Class, _ string) { told = append(told, open) }
		attempt := func(v verdict) {
			b.admit(t.Context(), b.job("one", 1))
			j := b.nextJob()
			b.finish(j, v)
			b.release([]*job{j})
		}
		for range b.cfg.Breaker.Failures {
			attempt(verdict{failure: errAttempt})
		}
		quiet := func(d time.Duration) {
			b.committed = b.committed.Add(d) // others have events
			for range 2 {
				b.sweep(time.Hour)
				time.Sleep(d / 2)
			}
			b.sweep(time.Hour)
		}
		quiet(10 * time.Hour)
		attempt(verdict{})
		require.Equal(t, []bool{true, false}, told)

		for range b.cfg.Breaker.Failures {
			attempt(verdict{failure: errAttempt})
		}
		quiet(25 * time.Hour)
		require.Empty(t, b.lanes)
	})
}

// TestWorkersAreInUse: as many lanes as workers, each with work. Past three quarters of the workers a lane may have one attempt under way, and which of those that wait has
// none is found soon.
func TestWorkersAreInUse(t *testing.T) {
	t.Parallel()
	const workers, each = 400, 10
	b := newBench(workers * each)
	b.cfg.Delivery.Workers, b.cfg.Delivery.HostConcurrency = workers, workers
	lane := func(i int) *job { return b.job(fmt.Sprint(i%workers), 64) }
	for i := range workers * each * 3 / 4 { // shares count from here on
		b.admit(t.Context(), lane(i))
	}
	running := b.startAll()
	sum := 0
	const rounds = 10_000
	for range rounds {
		j := running[0] // all take as long
		b.finish(j, verdict{attempted: true})
		b.release([]*job{j})
		b.admit(t.Context(), b.job(b.names(j), 64))
		running = append(running[1:], b.startAll()...)
		sum += len(running)
	}
	require.Empty(t, b.deferrals)
	require.Greater(t, sum/rounds, workers*85/100)
}
