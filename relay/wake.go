package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

const (
	// wakeEvery is how long the leader pauses between two rounds in which it looks for rows that are parked for no reason: somebody may have changed the tables by
	// hand. A round is one look where few are parked. In a large queue it goes through all of it, a part every second: wakePause is what must lie between two,
	// however often the leader is called.
	wakeEvery = 30 * time.Second
	wakePause = 500 * time.Millisecond
	// wakeAgain is for how long it begins a round every second once there is a reason: what was parked for it may be locked at the first look, or not be written
	// yet. These rounds do not pause between their parts but to let the other chores have their turn, after wakeTime.
	wakeAgain = 10 * time.Second
	wakeTime  = 250 * time.Millisecond
	// wakeWithin is the time over which the deliveries of an endpoint come back that takes them again.
	wakeWithin = time.Second
	// keysLooks is how often in a row it asks for blocked keys.
	keysLooks = 20
)

// A waker ends waits: of keys whose rows are gone, and of rows whose endpoint takes deliveries again.
type waker struct {
	place         outbox.UUID // of the next part of the round under way; zero: there is none
	began, looked time.Time   // the last round, the last of its parts
	reason        time.Time
	hurried       bool // the round is for a reason
}

func (w *waker) wake(ctx context.Context, s *session) error {
	var failed error // of some endpoints; it is no reason to leave out the others
	for _, key := range s.takeWoken() {
		t := s.tenant(key.tenant)
		if t == nil || t.is(store.StateSuspended) {
			continue // what waits is woken when it is resumed
		}
		if ep := t.endpoint(key.endpoint); ep != nil && (!ep.Active || ep.Paused) {
			continue // again, between two parts of it
		}
		more, err := s.wakeEndpoint(ctx, key)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("wake the deliveries of endpoint %s: %w", key.endpoint, err))
			s.mu.Lock()
			s.woken = append(s.woken, key)
			s.mu.Unlock()
		} else if more {
			s.takesAgain(key)
		}
	}
	if err := errors.Join(s.lookAtCrowds(ctx), s.freeKeys(ctx)); err != nil {
		return err
	}
	if err := w.wakeParked(ctx, s); err != nil {
		return fmt.Errorf("look for deliveries parked for no reason: %w", err)
	}
	return failed
}

// wakeParked goes on with the round under way, or begins one when it is time.
func (w *waker) wakeParked(ctx context.Context, s *session) error {
	began := time.Now()
	if !w.due(began, s.resumed.Swap(false)) {
		return nil
	}
	for {
		next, woken, err := s.store.WakeParkedHeads(ctx, w.place)
		w.reached(next, time.Now())
		if err != nil {
			return err // the next round is to begin anew
		}
		if woken > 0 {
			signal(s.claim)
		}
		switch {
		case w.place.IsZero() || !w.hurried:
			return nil
		case w.looked.Sub(began) > wakeTime:
			signal(s.attention)
			return nil
		}
	}
}

// reached ends the round at ids that were made after it was begun: a queue may grow faster than it is read.
func (w *waker) reached(next outbox.UUID, now time.Time) {
	if end := store.FirstID(w.began); bytes.Compare(next[:], end[:]) >= 0 {
		next = outbox.UUID{}
	}
	w.place, w.looked = next, now
}

// due tells whether the next part is to be looked at now. A reason that comes in the middle of a round has it hurry to its end, and another one follow that
// begins after the reason.
func (w *waker) due(now time.Time, reason bool) bool {
	if reason {
		w.reason, w.hurried = now, true
	}
	if !w.place.IsZero() {
		return w.hurried || now.Sub(w.looked) >= wakePause
	}
	w.hurried = w.began.Before(w.reason) || now.Sub(w.reason) <= wakeAgain
	if !w.hurried && now.Sub(w.looked) < wakeEvery {
		return false
	}
	w.began = now
	return true
}

// freeKeys looks for blocked keys that have no rows any more. Where most of those it has asked for are free, as after a recovery, it asks for the next.
func (s *session) freeKeys(ctx context.Context) error {
	for range keysLooks {
		keys, stamps := s.dispatcher.blockedKeys()
		if len(keys) == 0 {
			return nil
		}
		still, err := s.store.StillBlocked(ctx, keys)
		if err != nil {
			return fmt.Errorf("look for keys that wait no more: %w", err)
		}
		if freed := s.dispatcher.unblock(keys, stamps, still); len(keys) < maxBlockedKeys || freed < len(keys)/2 {
			return nil
		}
	}
	return nil
}

func (s *session) wakeEndpoint(ctx context.Context, key laneKey) (more bool, err error) {
	more, err = s.store.Wake(ctx, key.tenant, key.endpoint, wakeWithin)
	if err != nil {
		return false, err
	}
	signal(s.claim)
	return more, s.store.ForgetHealth(ctx, store.Endpoint{Tenant: key.tenant, ID: key.endpoint})
}

// takesAgain notes an endpoint that was inactive or paused and is not any more.
func (s *session) takesAgain(key laneKey) {
	s.mu.Lock()
	s.woken = append(s.woken, key)
	s.mu.Unlock()
	signal(s.attention)
}

func (s *session) takeWoken() []laneKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	woken := s.woken
	s.woken = nil
	return woken
}
