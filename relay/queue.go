package relay

import (
	"context"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// runLength is how many deliveries of one ordered key are claimed together.
const runLength = 100

// claimDue works the retry queue until ctx is done: it claims what is due and what can start soon, and offers it to the lanes.
func (e *engine) claimDue(ctx context.Context) error {
	complained := false
	wait := e.cfg.Queue.Poll
	told := false
	for {
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-e.claim:
			t.Stop()
		case <-t.C:
		}
		var full bool
		var err error
		if !told {
			err = e.heedBreakers(ctx)
			told = err == nil
		}
		if told {
			full, err = e.claimBatch(ctx)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if !complained {
				e.log.Warn("claiming due deliveries does not succeed, trying again", "error", err)
			}
			complained, wait = true, min(max(2*wait, 100*time.Millisecond), 10*time.Second)
			continue
		}
		complained, wait = false, e.cfg.Queue.Poll
		if full {
			wait = time.Millisecond
		}
	}
}

// heedBreakers learns which breakers an earlier process, or another replica, has open: a restart is no reason to try a dead host again.
func (e *engine) heedBreakers(ctx context.Context) error {
	list, err := e.store.Troubled(ctx)
	for i := range list {
		if t := &list[i]; t.OpenFor > 0 {
			e.dispatcher.keepShut(laneKey{t.Tenant, t.ID}, t.OpenFor)
		}
	}
	return err
}

// claimBatch claims one batch, no more than fits. It returns true if there may be more due.
func (e *engine) claimBatch(ctx context.Context) (full bool, err error) {
	n := e.cfg.Queue.Batch
	e.claimLater.Store(true) // before the look, so that no room made after it goes unnoticed
	if _, _, claimed, _ := e.dispatcher.load(); claimed > n {
		return false, nil // one batch is attempted while the next one is claimed, no more
	}
	caps := e.dispatcher.caps()
	rows, more, err := e.store.Claim(ctx, e.owner, store.ClaimOptions{N: n, Lease: e.cfg.Queue.Lease, Caps: caps, Run: runLength})
	if err != nil {
		return false, fmt.Errorf("claim due deliveries: %w", err)
	}
	if len(caps) == 0 {
		e.claimLater.Store(false) // what is due was not kept out: there is nothing to wait for
	}
	list := make([]offered, len(rows))
	for i := range rows {
		list[i] = e.claimed(&rows[i])
	}
	e.dispatcher.offer(list)
	e.metrics.claimed(len(rows))
	return more && len(rows) > 0, nil
}

// claimed makes a job of a claimed delivery, or says why its endpoint cannot take it.
func (e *engine) claimed(c *store.Claimed) offered {
	j := &job{Delivery: c.Delivery, commit: noCommit}
	ep, err := delivery.NewEndpoint(c.Endpoint, e.defaults)
	switch {
	case err != nil:
		return offered{j, deferInvalid, spread(pausedFor)}
	case !ep.Active:
		return offered{j, deferInactive, parked}
	case ep.Paused:
		return offered{j, deferPaused, parked}
	}
	if c.Event != nil { // the row does not keep what was sent, for it had been delivered
		m := delivery.Encode(nil, ep.Format, c.Event, e.cfg.Delivery.Source)
		j.Message = &m
	}
	j.endpoint, j.URL, j.Method = ep, ep.URL, ep.Method
	return offered{job: j}
}

// claimedDone is called when claimed deliveries have left memory: if claiming had to stop for want of room, it goes on.
func (e *engine) claimedDone() {
	if e.claimLater.CompareAndSwap(true, false) {
		signal(e.claim)
	}
}

// renewLeases keeps what this process has claimed from being claimed by another, until ctx is done.
func (e *engine) renewLeases(ctx context.Context) error {
	tick := time.NewTicker(e.cfg.Queue.Lease / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		ids := e.dispatcher.leases()
		if len(ids) == 0 {
			continue
		}
		if err := e.store.Renew(ctx, e.owner, ids, e.cfg.Queue.Lease); err != nil && ctx.Err() == nil {
			e.log.Warn("leases could not be renewed; another replica may attempt these deliveries too", "deliveries", len(ids), "error", err)
		}
	}
}
