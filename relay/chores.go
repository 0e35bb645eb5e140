package relay

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// attend does the leader's background work until ctx is done: what waits in order or for its endpoint, endpoints that only fail, rows that have been
// kept for long enough; the snapshot that a lost slot is healed from; whether the stream has stalled, and what it goes by has been replaced; and, beside that,
// what may take long: backfills, recoveries and verifications.
//
// They take turns: at the same moment each would need a connection of its own, and four servers that have just been started keep two processors busy for
// long enough to make deliveries wait. Each at a moment of its own would wake an idle process, which costs more than the work.
func (s *session) attend(ctx context.Context) {
	snapshot := checkpoint{saved: s.handled, read: math.MaxUint64} // the first one is not to wait
	var waker waker
	steward := steward{waiting: make(map[string]*patience)}
	var purger purger
	var stall stallWatch
	unfilled, unrecovered := make(aside), make(aside)
	chores := []chore{
		{asked: s.attention, do: func() error { return errors.Join(waker.wake(ctx, s), steward.look(ctx, s), purger.advance(ctx, s)) }},
		{do: func() error { return snapshot.advance(ctx, s) }},
		{do: func() error { return errors.Join(stall.look(ctx, s), s.watchPublications(ctx)) }},
		{asked: s.backfill, do: func() error { return s.fill(ctx, unfilled) }},
		{do: func() error { return s.recoverMissed(ctx, unrecovered) }},
	}
	if s.cfg().Verification.on() {
		v := newVerifier(s)
		defer v.group.Wait()
		chores = append(chores, chore{asked: s.verify, do: func() error { return v.look(ctx) }})
	}
	s.takeTurns(ctx, chores)
}

// takeTurns does chores until ctx is done, one after the other, every second. What takes long is not waited for: the next one begins choreGap later.
func (s *session) takeTurns(ctx context.Context, chores []chore) {
	var group sync.WaitGroup
	defer group.Wait()
	for i := range chores {
		c := &chores[i]
		c.turn, c.done = make(chan struct{}, 1), make(chan struct{}, 1)
		group.Go(func() { s.each(ctx, c) })
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
		for i := range chores {
			chores[i].give(ctx)
		}
	}
}

// chore is a part of the background work: done every second, and when it is asked for.
type chore struct {
	asked <-chan struct{} // nil: never
	do    func() error
	turn  chan struct{}
	done  chan struct{} // it has been done, in turn or not
}

// choreGap is longer than their queries take on a connection that is new.
const choreGap = 20 * time.Millisecond

// give has the chore done, and waits for that, choreGap at most.
func (c *chore) give(ctx context.Context) {
	select {
	case <-c.done: // before
	default:
	}
	signal(c.turn)
	gap := time.NewTimer(choreGap)
	defer gap.Stop()
	select {
	case <-ctx.Done():
	case <-c.done:
	case <-gap.C:
	}
}

// each does a chore in its turn, and when it is asked for, until ctx is done.
func (s *session) each(ctx context.Context, c *chore) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.turn:
		case <-c.asked:
		}
		err := c.do()
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.Is(err, store.ErrFenced):
			s.end(err)
		default:
			s.log.Warn("the leader's background work does not succeed, trying again", "error", err)
		}
		signal(c.done)
	}
}
