package relay

import (
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/sony/gobreaker/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/route"
)

// reconfigured has the bench follow a change.
func (b *bench) reconfigured(change func(*Config)) {
	next := *b.cfg
	change(&next)
	now := b.cfg.Reloaded(next)
	b.reconfigure(&now, now.EndpointDefaults())
}

// open makes a delivery for an endpoint whose row leaves everything open that it can.
func (b *bench) open(t *testing.T, name string) *job {
	t.Helper()
	j := b.job(name, 0)
	var err error
	j.endpoint, err = delivery.NewEndpoint(delivery.EndpointRow{ID: j.EndpointID, URL: "https://example.com", SecretToken: "a secret", MaxRetryAttempts: -1}, b.cfg.EndpointDefaults())
	require.NoError(t, err)
	return j
}

// startAll starts all that may start.
func (b *bench) startAll() (started []*job) {
	for j := b.nextJob(); j != nil; j = b.nextJob() {
		started = append(started, j)
	}
	return started
}

func TestLimitsFollowAtOnce(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	b.reconfigured(func(c *Config) { c.Delivery.EndpointConcurrency = 2 })
	for range 30 {
		b.admit(t.Context(), b.open(t, "one"))
	}
	require.Len(t, b.startAll(), 2)
	b.reconfigured(func(c *Config) { c.Delivery.EndpointConcurrency = 5 })
	require.Len(t, b.startAll(), 3, "without another delivery, and without an end of one")
	b.reconfigured(func(c *Config) { c.Delivery.EndpointConcurrency, c.Delivery.HostConcurrency = 8, 6 })
	require.Len(t, b.startAll(), 1)
	b.reconfigured(func(c *Config) { c.Delivery.HostConcurrency = 64 })
	require.Len(t, b.startAll(), 2, "what waited for the host has been asked again")
}

func TestRateFollowsAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(10_000)
		b.cfg.Window.Hold = 10 * time.Minute
		b.reconfigured(func(c *Config) { c.Delivery.EndpointRate = .01 })
		for range 6 {
			b.admit(t.Context(), b.open(t, "one"))
		}
		started := make(chan time.Time, 100)
		go func() {
			for j := b.take(); j != nil; j = b.take() {
				started <- time.Now()
				b.finish(j, verdict{})
			}
		}()
		synctest.Wait()
		require.Len(t, started, 1)
		time.Sleep(time.Second)
		b.reconfigured(func(c *Config) { c.Delivery.EndpointRate = 1 })
		time.Sleep(2*time.Second + time.Millisecond)
		synctest.Wait()
		require.Len(t, started, 3, "one a second, though the next one was to come in a hundred")
		b.reconfigured(func(c *Config) { c.Delivery.EndpointRate = 0 })
		synctest.Wait()
		require.Len(t, started, 6)
		b.close()
	})
}

func TestPlacesMoveWithTheRate(t *testing.T) {
	t.Parallel()
	now := time.Now()
	p := pace{rate: 1, next: now.Add(time.Second), slot: now.Add(100 * time.Second)}
	p.setRate(now, 10)
	assert.Equal(t, now.Add(100*time.Millisecond), p.next)
	assert.Equal(t, now.Add(10*time.Second), p.slot)
	p.setRate(now, 5)
	assert.Equal(t, now.Add(100*time.Millisecond), p.next, "no later than it was promised")
	assert.Equal(t, now.Add(20*time.Second), p.slot)
	p.setRate(now, 1e-300)
	assert.True(t, p.slot.After(now), "no overflow")
	p.setRate(now, 0)
	assert.Equal(t, pace{}, p)
}

func TestBreakersFollow(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1000)
		fail := func(name string, n int) {
			for range n {
				b.admit(t.Context(), b.open(t, name))
				j := b.nextJob()
				require.NotNil(t, j, name)
				b.finish(j, verdict{attempted: true, failure: errAttempt, again: true})
			}
		}
		state := func(name string) gobreaker.State { return b.laneOf(laneKey{"t", b.ids[name]}).breaker.State() }
		opened := 0
		b.breakerOpened = func(laneKey, time.Duration) { opened++ }
		fail("few", 3)
		fail("many", 5)
		require.Equal(t, gobreaker.StateOpen, state("many"))
		require.Equal(t, 1, opened)

		b.reconfigured(func(c *Config) { c.Breaker.Failures = 4 })
		require.Equal(t, 1, opened, "nothing was opened anew")
		fail("few", 1)
		require.Equal(t, gobreaker.StateOpen, state("few"), "the fourth in a row")

		// Another time that breakers are open takes new ones; what was open is so, and what was under way speaks to nobody.
		fail("under way", 3)
		b.admit(t.Context(), b.open(t, "under way"))
		under := b.nextJob()
		require.NotNil(t, under)
		b.reconfigured(func(c *Config) { c.Breaker.OpenFor = 5 * time.Second })
		require.Equal(t, gobreaker.StateOpen, state("few"))
		require.Equal(t, gobreaker.StateOpen, state("many"))
		require.Equal(t, 4, opened)
		b.finish(under, verdict{attempted: true, failure: errAttempt, again: true})
		require.Equal(t, gobreaker.StateClosed, state("under way"))
		require.Equal(t, 4, opened, "the breaker of before has opened, which is nobody's any more")
		fail("under way", 1)
		require.Equal(t, gobreaker.StateOpen, state("under way"), "the failure under way counts in a row all the same")
		require.Equal(t, 5, opened)
		time.Sleep(5*time.Second + time.Millisecond)
		require.Equal(t, gobreaker.StateHalfOpen, state("few"))
		probe := b.open(t, "few")
		b.admit(t.Context(), probe)
		require.Equal(t, probe, b.nextJob())
		b.finish(probe, verdict{attempted: true})
		require.Equal(t, gobreaker.StateClosed, state("few"))

		// One that probes is open again.
		b.admit(t.Context(), b.open(t, "many"))
		probe = b.nextJob()
		require.NotNil(t, probe)
		b.reconfigured(func(c *Config) { c.Breaker.HalfOpen = 3 })
		require.Equal(t, gobreaker.StateOpen, state("many"))
		b.finish(probe, verdict{attempted: true})
		require.Equal(t, gobreaker.StateOpen, state("many"))
		for _, l := range b.lanes {
			b.forget(l.key, l)
		}
		require.Zero(t, testutil.ToFloat64(b.metrics.breakersOpen))
		require.Zero(t, testutil.ToFloat64(b.metrics.breakersHalfOpen))
	})
}

// TestReloadedIsValid: whatever may change is no fault beside what stays.
func TestReloadedIsValid(t *testing.T) {
	t.Parallel()
	c := DefaultConfig()
	c.Database.URL = "postgres://relay@localhost/app"
	next := c
	next.Database.URL, next.Window.Deliveries, next.Delivery.Workers, next.Delivery.MaxConnections = "postgres://relay@elsewhere/app", 100_000, 5000, 5000
	next.Delivery.EndpointConcurrency, next.Record.Batch, next.Breaker.HalfOpen = 3000, 50_000, 2000
	next.Network.Proxy = "http://proxy"
	require.NoError(t, next.Validate())
	now := c.Reloaded(next)
	require.NoError(t, now.Validate())
	want := c
	want.Delivery.EndpointConcurrency, want.Record.Batch, want.Breaker.HalfOpen = 1024, 10_000, 1024
	assert.Equal(t, want, now)
}

// A round of deletions under way goes on with what is to be kept now.
func TestPurgerFollows(t *testing.T) {
	t.Parallel()
	keeps := Retention{Deliveries: time.Hour}
	p := purger{began: time.Now(), keeps: keeps, todo: purges(&keeps, []string{"a", "b"})}
	p.follow(keeps)
	assert.Len(t, p.todo, 8, "deliveries of each tenant; recoveries and health of each, and of none")
	p.follow(Retention{Deliveries: 90 * day})
	assert.Empty(t, p.todo)
	assert.True(t, p.began.IsZero(), "the next one begins at once")
}

// TestDefaultsChangeRouting: what an endpoint is may depend on the configuration, so another one counts as a change of routing, to the audit and to verification.
func TestDefaultsChangeRouting(t *testing.T) {
	t.Parallel()
	c := DefaultConfig()
	defaults := c.EndpointDefaults()
	e := &engine{}
	e.defaults.Store(&defaults)
	s := &session{engine: e, verify: make(chan struct{}, 1)}
	of := &tenant{schema: "acme", table: route.NewTenant("acme", defaults)}
	before := of.version()
	s.setDefaults(of)
	assert.NotEqual(t, before, of.version())
	assert.Len(t, s.verify, 1)
}

// TestRatesBeyondNumbers: a rate may be any number above zero.
func TestRatesBeyondNumbers(t *testing.T) {
	t.Parallel()
	now := time.Now()
	clock := func() time.Time { return now }
	for _, rate := range []float64{3e9, math.MaxInt64, math.MaxFloat64} {
		p := pace{rate: rate}
		assert.Equal(t, math.MaxInt, p.fits(time.Second), "%g", rate)
		assert.Equal(t, time.Second, p.later(now, time.Second), "%g", rate)
		p.started(clock)
		assert.Zero(t, p.wait(clock), "%g", rate)
	}
	for _, rate := range []float64{1e-11, math.SmallestNonzeroFloat64} {
		p := pace{rate: rate}
		assert.Equal(t, 1, p.fits(time.Minute), "%g", rate)
		for range 3 {
			p.started(clock)
			assert.Greater(t, p.wait(clock), 100*365*24*time.Hour, "%g", rate)
			assert.Greater(t, p.later(now, time.Second), 100*365*24*time.Hour, "%g", rate)
		}
	}
}
