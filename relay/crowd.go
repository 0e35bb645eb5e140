package relay

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Blocked keys are told apart as long as they are not too many: a receiver that is away for a day leaves rows of each of its aggregates, and there may
// be millions of those. Then the lanes with most of them are crowded: every key of such a lane counts as blocked, so that what the stream brings for it
// becomes a row, in order all the same. When few keys are left in the queue they are told apart again.

const (
	// mostKeys is how many blocked keys are kept, of all lanes: some 16 MiB.
	mostKeys = 200_000
	// fewKeys is how many a crowded lane may have left to be one no more.
	fewKeys = 10_000
	// crowdsAtOnce is how many crowded lanes are looked up at once, crowdEvery how often each is.
	crowdsAtOnce = 100
	crowdEvery   = 10 * time.Second
)

// crowd says of a lane that all its keys count as blocked. Its map then has those of which something is not recorded yet, and while the database is
// asked, also those of which something was recorded meanwhile.
type crowd struct {
	asking bool
	again  time.Time // not before
}

// A crowdedLane is one that the database is asked about.
type crowdedLane struct {
	key   laneKey
	crowd *crowd
}

// crowd gives up telling apart the keys of the lanes that have most, until there is room for a while.
func (d *dispatcher) crowd() {
	if d.keys <= d.mostKeys {
		return
	}
	lanes := slices.SortedFunc(maps.Values(d.watched), func(a, b *lane) int { return cmp.Compare(len(b.blocked), len(a.blocked)) })
	for _, l := range lanes {
		if d.keys <= d.mostKeys/4*3 {
			return
		}
		d.crowdLane(l)
	}
}

func (d *dispatcher) crowdLane(l *lane) {
	if l.crowd != nil {
		return
	}
	l.crowd = &crowd{again: d.now().Add(crowdEvery)}
	d.keys -= len(l.blocked)
	l.forgetRecorded()
}

// forgetRecorded leaves to the crowd what the database knows.
func (l *lane) forgetRecorded() {
	maps.DeleteFunc(l.blocked, func(_ outbox.UUID, b *block) bool { return b.unrecorded == 0 })
}

// askCrowds lists crowded lanes that may be so no more, and how many keys each may have then. Whoever asks the database for them tells uncrowd, whatever
// it said.
func (d *dispatcher) askCrowds() (list []crowdedLane, each int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crowd()
	now := d.now()
	for key, l := range d.watched {
		if c := l.crowd; c != nil && !c.again.After(now) && len(list) < crowdsAtOnce {
			c.asking, c.again = true, now.Add(crowdEvery)
			list = append(list, crowdedLane{key, c})
		}
	}
	return list, min(fewKeys, max(d.mostKeys-d.keys, 0)/2/max(len(list), 1))
}

// uncrowd takes over the keys of lanes that have few. still: those that have more, or of which nothing is known.
func (d *dispatcher) uncrowd(asked []crowdedLane, keys []store.OrderedKey, still map[laneKey]bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range asked {
		l := d.lanes[a.key]
		if l == nil || l.crowd != a.crowd {
			continue // of another session
		}
		if l.crowd.asking = false; still[a.key] {
			l.forgetRecorded()
			continue
		}
		l.crowd = nil
		d.keys += len(l.blocked)
	}
	d.blockKeys(keys)
}

// blockOrdered takes over what the database knows of blocked keys of tenants.
func (s *session) blockOrdered(ctx context.Context, tenants []string) error {
	endpoints, err := s.store.OrderedEndpoints(ctx, tenants)
	if err != nil || len(endpoints) == 0 {
		return err
	}
	keys, more, err := s.store.Blocked(ctx, endpoints, max(mostKeys/len(endpoints), 1))
	if err != nil {
		return err
	}
	s.dispatcher.blockAll(more)
	s.dispatcher.block(keys)
	return nil
}

// blockAll makes lanes crowded.
func (d *dispatcher) blockAll(endpoints []store.Endpoint) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range endpoints {
		d.crowdLane(d.laneOf(laneKey{e.Tenant, e.ID}))
	}
}

// lookAtCrowds asks the database which crowded lanes are so no more.
func (s *session) lookAtCrowds(ctx context.Context) error {
	asked, each := s.dispatcher.askCrowds()
	if len(asked) == 0 {
		return nil
	}
	endpoints, still := make([]store.Endpoint, len(asked)), make(map[laneKey]bool, len(asked))
	for i, a := range asked {
		endpoints[i] = store.Endpoint{Tenant: a.key.tenant, ID: a.key.endpoint}
	}
	keys, more, err := s.store.Blocked(ctx, endpoints, each)
	if err != nil {
		more, err = endpoints, fmt.Errorf("look for lanes with few keys: %w", err)
	}
	for _, e := range more {
		still[laneKey{e.Tenant, e.ID}] = true
	}
	s.dispatcher.uncrowd(asked, keys, still)
	return err
}
