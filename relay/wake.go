package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/relay/store"
)

const (
	// wakeEvery is how often the leader looks for rows that are parked for no reason: somebody may have changed the tables by hand.
	wakeEvery = 30 * time.Second
	// wakeAgain is for how long it looks every second once there is a reason: what was parked for it may be locked at the first look, or not be written yet.
	wakeAgain = 10 * time.Second
	// wakeWithin is the time over which the deliveries of an endpoint come back that takes them again.
	wakeWithin = time.Second
	// keysLooks is how often in a row it asks for blocked keys.
	keysLooks = 20
)

// A waker ends waits: of keys whose rows are gone, and of rows whose endpoint takes deliveries again.
type waker struct{ looked, reason time.Time }

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
	if s.resumed.Swap(false) {
		w.reason = time.Now()
	}
	if time.Since(w.reason) > wakeAgain && time.Since(w.looked) < wakeEvery {
		return failed
	}
	w.looked = time.Now()
	more, err := s.store.WakeParkedHeads(ctx)
	if err != nil {
		return fmt.Errorf("look for deliveries parked for no reason: %w", err)
	}
	if more {
		s.resumed.Store(true)
		signal(s.attention)
	}
	signal(s.claim)
	return failed
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
