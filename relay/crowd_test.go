package relay

import (
	"context"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func (b *bench) blockNumbered(endpoint string, keys ...byte) {
	for _, key := range keys {
		b.block([]store.OrderedKey{{Tenant: "t", Endpoint: b.job(endpoint, 10).EndpointID, Key: outbox.UUID{key}}})
	}
}

func TestTooManyKeysCrowdTheirLane(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.mostKeys = 5
		b.blockNumbered("one", 1, 2, 3, 4, 5)
		b.blockNumbered("two", 1)
		asked, _ := b.askCrowds()
		require.Empty(t, asked, "its keys were many a moment ago")
		require.Equal(t, 1, b.keys)
		one, two := b.keyed(9), b.job("two", 10)
		two.Order.Key = outbox.UUID{9}
		b.admit(t.Context(), one)
		b.admit(t.Context(), two)
		require.Equal(t, idsOf([]*job{one}), idsOf(b.rows), "any key of a crowded lane may have rows")
		require.Same(t, two, b.nextJob())
		b.release([]*job{one})
		require.Empty(t, one.lane.blocked, "the database knows of it")
		keys, _ := b.blockedKeys()
		require.Len(t, keys, 1, "of the lane that is not crowded")

		time.Sleep(crowdEvery)
		asked, each := b.askCrowds()
		require.Equal(t, laneKey{"t", b.ids["one"]}, asked[0].key)
		require.Equal(t, 2, each, "half of the room")
		again, _ := b.askCrowds()
		require.Empty(t, again)
		b.blockNumbered("one", 1)
		b.uncrowd(asked, nil, map[laneKey]bool{asked[0].key: true})
		require.NotNil(t, one.lane.crowd, "it has too many still")
		require.Empty(t, one.lane.blocked, "and the database knows of all")

		time.Sleep(crowdEvery)
		asked, _ = b.askCrowds()
		meanwhile := b.keyed(7)
		b.admit(t.Context(), meanwhile)
		b.release([]*job{meanwhile}) // its row was written when the database had been read
		b.uncrowd(asked, []store.OrderedKey{{Tenant: "t", Endpoint: b.ids["one"], Key: outbox.UUID{1}}}, nil)
		require.Nil(t, one.lane.crowd)
		require.Equal(t, 3, b.keys)
		b.rows = nil
		list := []*job{b.keyed(1), b.keyed(7), b.keyed(9)}
		for _, j := range list {
			b.admit(t.Context(), j)
		}
		require.Equal(t, list[:2], b.rows)
		require.Same(t, list[2], b.nextJob())
	})
}

func TestACrowdedLaneIsKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.mostKeys = 0
		b.blockNumbered("one", 1)
		_, _ = b.askCrowds()
		time.Sleep(2 * forgetAfter)
		b.sweep(time.Hour)
		require.Len(t, b.lanes, 1)
		asked, each := b.askCrowds()
		require.Zero(t, each)
		b.uncrowd(asked, nil, nil)
		time.Sleep(tidyEvery)
		b.sweep(time.Hour)
		require.Empty(t, b.lanes)
		b.blockNumbered("one", 1)
		_, _ = b.askCrowds()
		time.Sleep(crowdEvery)
		asked, _ = b.askCrowds()
		b.abandon(b.ledger)
		require.Zero(t, b.keys)
		b.blockNumbered("one", 1)
		_, _ = b.askCrowds()
		b.uncrowd(asked, nil, nil)
		require.NotNil(t, b.lanes[asked[0].key].crowd, "of another session")
	})
}

// What was said before a lane became crowded is not of it any more; what is said while the database is asked is not forgotten.
func TestACrowdAmongAnswers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(100)
		b.mostKeys = 1
		b.blockNumbered("one", 1, 2)
		keys, stamps := b.blockedKeys()
		_, _ = b.askCrowds()
		require.Zero(t, b.unblock(keys, stamps, make([]bool, 2)))
		require.Zero(t, b.keys)

		time.Sleep(crowdEvery)
		asked, _ := b.askCrowds()
		b.blockNumbered("one", 3)
		b.uncrowd(asked, nil, nil)
		require.Equal(t, 1, b.keys)
		require.True(t, b.lanes[asked[0].key].isBlocked(b.keyed(3)))
	})
}

// TestOrderInACrowd has few keys in many states, with lanes that are crowded and so no more all the time: nothing is sent while something of its key is in the
// queue, and in the end everything is free again.
func TestOrderInACrowd(t *testing.T) {
	t.Parallel()
	for seed := range 200 {
		synctest.Test(t, func(t *testing.T) { orderInACrowd(t, rand.New(rand.NewPCG(uint64(seed), 1))) })
	}
}

func orderInACrowd(t *testing.T, rnd *rand.Rand) {
	t.Helper()
	b := newBench(1000)
	b.mostKeys = 3
	queue := make(map[outbox.UUID]int) // rows by key, those that are about to be written too
	var running, unrecorded []*job
	var asked []crowdedLane
	var said []store.OrderedKey
	still := make(map[laneKey]bool)
	free := func() {
		keys, stamps := b.blockedKeys()
		still := make([]bool, len(keys))
		for i, k := range keys {
			still[i] = queue[k.Key] > 0
		}
		b.unblock(keys, stamps, still)
	}
	for range 400 {
		time.Sleep(time.Second)
		switch rnd.IntN(8) {
		case 0, 1, 2:
			b.admit(t.Context(), b.keyed(byte(1+rnd.IntN(8))))
		case 3:
			for j := b.nextJob(); j != nil; j = b.nextJob() {
				require.Zero(t, queue[j.Order.Key], "an earlier one has a row")
				running = append(running, j)
			}
		case 4:
			for _, j := range running {
				if failed := rnd.IntN(2) == 0; failed {
					b.finish(j, verdict{failure: errAttempt, again: true})
				} else {
					b.finish(j, verdict{})
					unrecorded = append(unrecorded, j)
				}
			}
			running = nil
		case 5: // recorded
			b.release(unrecorded)
			unrecorded = nil
		case 6: // the queue is worked off, for the most part
			for key := range queue {
				if rnd.IntN(4) > 0 {
					delete(queue, key)
				}
			}
			free()
		case 7:
			if asked == nil {
				var each int
				asked, each = b.askCrowds()
				said, still = nil, map[laneKey]bool{}
				for key := range queue {
					said = append(said, store.OrderedKey{Tenant: "t", Endpoint: b.ids["one"], Key: key})
				}
				if len(said) > each && len(asked) > 0 {
					said, still[asked[0].key] = nil, true
				}
				continue
			}
			b.uncrowd(asked, said, still)
			asked = nil
		}
		for _, j := range b.rows {
			queue[j.Order.Key]++
			if !j.running { // its attempt is not over: it was leased
				unrecorded = append(unrecorded, j)
			}
		}
		b.rows = nil
	}
	if asked != nil {
		b.uncrowd(asked, said, still)
	}
	for _, j := range running {
		b.finish(j, verdict{})
	}
	b.release(append(unrecorded, running...))
	clear(queue)
	free()
	time.Sleep(crowdEvery)
	asked, _ = b.askCrowds()
	b.uncrowd(asked, nil, nil)
	free()
	require.Zero(t, b.keys)
	for key := range byte(9) {
		require.False(t, b.lanes[laneKey{"t", b.ids["one"]}].isBlocked(b.keyed(key)))
	}
}

// TestCrowdsAreOfTheDatabase: a session that begins learns from the queue which keys are blocked, were it those of a single endpoint, and which lanes have too many
// to be told apart. Those are so no more once few are left, and as long as nobody can tell, they are.
func TestCrowdsAreOfTheDatabase(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	few, many, alone := laneKey{"acme", outbox.NewUUID()}, laneKey{"acme", outbox.NewUUID()}, laneKey{"other", outbox.NewUUID()}
	const lanes = 200
	s.queue(few, 2, "gen_random_uuid()", "now()")
	s.queue(many, mostKeys/lanes+1, "gen_random_uuid()", "now()")
	s.queue(alone, 1, "gen_random_uuid()", "now()")
	for range lanes - 2 {
		s.queue(laneKey{"acme", outbox.NewUUID()}, 1, "gen_random_uuid()", "now()")
	}
	require.NoError(t, s.blockOrdered(ctx, []string{"acme"}))
	require.Len(t, s.dispatcher.lanes, lanes)
	require.Equal(t, lanes, s.dispatcher.keys, "of those with few")
	require.Len(t, s.dispatcher.lanes[few].blocked, 2)
	require.NoError(t, s.blockOrdered(ctx, []string{"other"}))
	require.Len(t, s.dispatcher.lanes[alone].blocked, 1)
	crowded := s.dispatcher.lanes[many]
	require.NotNil(t, crowded.crowd)

	s.exec(`DELETE FROM outbox_relay.retry_queue WHERE endpoint_id = $1 AND order_n > 1`, many.endpoint)
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	crowded.crowd.again = time.Time{}
	require.ErrorIs(t, s.lookAtCrowds(canceled), context.Canceled)
	require.NotNil(t, crowded.crowd)
	crowded.crowd.again = time.Time{}
	require.NoError(t, s.lookAtCrowds(ctx))
	require.Nil(t, crowded.crowd)
	require.Len(t, crowded.blocked, 1)
}
