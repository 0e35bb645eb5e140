package relay

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sony/gobreaker/v2"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestWhatIsNotWatchedIsQuiet does with some lanes whatever can be done with them, in random order: none in which there is anything is overlooked, and once there is
// nothing in any, none is watched, and later none is kept.
func TestWhatIsNotWatchedIsQuiet(t *testing.T) {
	t.Parallel()
	for seed := range 50 {
		synctest.Test(t, func(t *testing.T) {
			q := &quiet{T: t, bench: newBench(1000), rnd: rand.New(rand.NewPCG(uint64(seed), 1))}
			q.mostKeys = 3
			for range 500 {
				time.Sleep(time.Duration(q.rnd.Int64N(int64(3 * time.Second))))
				q.step()
				q.look()
			}
			q.leave()
		})
	}
}

// TestAWaitEndsInAWatchedLane: what the stream brings waits for room without the lock. A sweep of that time finds nothing in its lane, and after minutes forgets it.
func TestAWaitEndsInAWatchedLane(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		wait func(*quiet, *job)
		room int
		long time.Duration // between two beats, at which it is regained
	}{
		"for the window":          {func(q *quiet, j *job) { q.admit(q.Context(), j) }, inWindow, beatEvery / 2},
		"for the deferral":        {func(q *quiet, j *job) { q.postpone(q.Context(), j, store.DeferOrder, 0) }, inDeferral, beatEvery / 2},
		"until it is forgotten":   {func(q *quiet, j *job) { q.postpone(q.Context(), j, store.DeferOrder, 0) }, inDeferral, 2*forgetAfter + beatEvery/2},
		"and is given up at last": {func(q *quiet, j *job) { q.reject(q.Context(), j) }, inDeferral, 2*forgetAfter + beatEvery/2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				q := &quiet{T: t, bench: newBench(1)}
				first := q.job("other", 1)
				first.committed = time.Now()
				c.wait(q, first)
				j := q.keyed(1)
				j.committed = time.Now().Add(-2 * activeFor)
				go c.wait(q, j)
				synctest.Wait()
				require.Equal(t, 1, q.rooms[c.room].n)
				time.Sleep(c.long)
				q.sweep(time.Hour)
				require.NotContains(t, q.watched, j.lane.key)
				q.release([]*job{first})
				synctest.Wait()
				require.Equal(t, 1, q.rooms[c.room].n)
				require.Same(t, j.lane, q.lanes[j.lane.key])
				require.Same(t, j.lane, q.watched[j.lane.key])
			})
		})
	}
}

// TestActiveAndQuiet: a lane that had an event lately keeps its share of the window however long nothing else is committed, and is not looked at for that.
func TestActiveAndQuiet(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := &quiet{T: t, bench: newBench(10)}
		event := func(name string) {
			j := q.job(name, 1)
			j.committed = time.Now()
			q.admit(t.Context(), j)
			q.finish(q.nextJob(), verdict{attempted: true})
			q.release([]*job{j})
		}
		event("one")
		for range 3 {
			time.Sleep(forgetAfter)
			q.sweep(time.Hour)
		}
		require.Empty(t, q.watched)
		require.Equal(t, 1, q.activeParties)
		require.Len(t, q.active, 1)
		require.Same(t, q.active[0], q.lanes[q.active[0].key])
		event("other")
		q.sweep(time.Hour)
		require.Len(t, q.active, 1)
		require.Equal(t, q.ids["other"], q.active[0].key.endpoint)
	})
}

type quiet struct {
	*testing.T
	*bench

	rnd                 *rand.Rand
	running, unrecorded []*job
}

func (q *quiet) name() string { return fmt.Sprint("e", q.rnd.IntN(6)) }

// some makes a delivery. Those of one endpoint have an order, those of another a rate, those of a third the default one.
func (q *quiet) some() *job {
	name := q.name()
	j := q.job(name, 2)
	if name == "e2" {
		j = q.open(q.T, name)
	}
	j.committed = time.Now()
	switch name {
	case "e0":
		j.Order = store.Place{Key: outbox.UUID{byte(q.rnd.IntN(8))}}
	case "e1":
		j.endpoint.Rate = float64(q.rnd.IntN(2))
	}
	return j
}

func (q *quiet) step() {
	ctx := q.Context()
	switch q.rnd.IntN(13) {
	case 0, 1, 2:
		q.admit(ctx, q.some())
	case 3:
		j := q.some()
		j.ledger, j.mine = nil, time.Now().Add(time.Minute)
		q.offer([]offered{{job: j}})
	case 4:
		q.running = append(q.running, q.start()...)
	case 5, 6:
		for _, j := range q.running {
			v := []verdict{
				{attempted: true}, {attempted: true}, {}, {attempted: true, failure: errAttempt, again: true}, {attempted: true, failure: errAttempt, overloaded: true, pause: time.Minute},
			}[q.rnd.IntN(5)]
			if q.finish(j, v); !v.again {
				q.unrecorded = append(q.unrecorded, j)
			}
		}
		q.running = nil
	case 7:
		q.claimAgain()
	case 8:
		q.recorded()
	case 9:
		q.sweep(q.cfg.Window.Hold)
	case 10:
		switch q.rnd.IntN(8) {
		case 0:
			q.abandon(q.ledger)
			q.ledger = newLedger(0, 0) // the next session's
		case 1:
			q.keepShut(laneKey{"t", q.some().EndpointID}, time.Minute)
		case 2:
			q.blockAll([]store.Endpoint{{Tenant: "t", ID: q.some().EndpointID}})
		case 3:
			q.recall(laneKey{"t", q.some().EndpointID})
		case 4:
			q.reconfigured(func(c *Config) { c.Breaker.HalfOpen = 1 + q.rnd.IntN(3) })
		case 5:
			q.reconfigured(func(c *Config) { c.Delivery.EndpointRate = float64(q.rnd.IntN(2)) })
		default:
			time.Sleep(activeFor)
		}
	case 11:
		q.free()
	case 12:
		time.Sleep(time.Duration(q.rnd.Int64N(int64(time.Minute))))
	}
}

// claimAgain has the retry queue offer what is about to be recorded.
func (q *quiet) claimAgain() {
	for _, j := range q.unrecorded {
		if j.ledger == nil && j.counted && j.reclaimed == nil && q.held[j.ID] == j {
			q.offer([]offered{{job: &job{Delivery: j.Delivery, endpoint: j.endpoint, commit: noCommit, bytes: 1, mine: time.Now().Add(time.Hour)}}})
		}
	}
}

// recorded makes durable what has ended, or has become a row.
func (q *quiet) recorded() {
	q.release(q.unrecorded)
	q.unrecorded = nil
}

// free is told that no key has a row any more.
func (q *quiet) free() {
	keys, stamps := q.blockedKeys()
	q.unblock(keys, stamps, make([]bool, len(keys)))
	asked, _ := q.askCrowds()
	q.uncrowd(asked, nil, nil)
}

func (q *quiet) look() {
	for _, j := range q.rows {
		if !j.running { // or its attempt goes on: it was leased
			q.unrecorded = append(q.unrecorded, j)
		}
	}
	q.rows = nil
	caps, watched := q.caps(), q.lookAt(q.lanes)
	require.Equal(q, q.caps(), caps)
	q.lookAt(watched)
	q.mu.Lock()
	defer q.mu.Unlock()
	for key, l := range q.lanes {
		require.Equal(q, l.watched, q.watched[key] == l)
		anything := l.crowd != nil || l.running+l.queue.n+len(l.chains)+len(l.blocked) > 0
		require.True(q, l.watched || !anything, "%s is overlooked: %+v", key.endpoint, l)
	}
	for key, l := range q.watched {
		require.Same(q, l, q.lanes[key])
	}
	active, parties := 0, make(map[*party]int)
	for _, l := range q.lanes {
		if l.active {
			active++
			parties[l.party]++
		}
	}
	require.Len(q, q.active, active)
	require.Len(q, parties, q.activeParties)
	for _, l := range q.active {
		require.Same(q, l, q.lanes[l.key])
		require.True(q, l.active)
		require.Equal(q, parties[l.party], l.party.active)
		require.LessOrEqual(q, q.calmed.Sub(l.committed), activeFor)
	}
}

// lookAt makes them all that is looked at, and returns what was.
func (q *quiet) lookAt(lanes map[laneKey]*lane) map[laneKey]*lane {
	q.mu.Lock()
	defer q.mu.Unlock()
	was := q.watched
	q.watched = lanes
	return was
}

// start starts what may start, beside the timers of those that have a rate.
func (q *quiet) start() []*job {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.startAll()
}

// leave lets everything end.
func (q *quiet) leave() {
	for range 40 {
		q.running = append(q.running, q.start()...)
		for _, j := range q.running {
			q.finish(j, verdict{attempted: true})
		}
		q.unrecorded, q.running = append(q.unrecorded, q.running...), nil
		q.recorded()
		time.Sleep(crowdEvery)
		q.free()
		later := q.job("later", 1)
		later.committed = time.Now()
		q.admit(q.Context(), later) // of others there was nothing for long
		q.sweep(q.cfg.Window.Hold)
		q.look()
	}
	for key, l := range q.watched {
		require.True(q, q.ids["later"] == key.endpoint || l.rate > 0 || l.state != gobreaker.StateClosed, "%s is watched for nothing: %+v", key.endpoint, l)
	}
	time.Sleep(forgetBrokenAfter + tidyEvery)
	q.sweep(q.cfg.Window.Hold)
	q.look()
	for key, l := range q.lanes {
		require.Equal(q, q.ids["later"], key.endpoint, "%+v", l)
	}
}
