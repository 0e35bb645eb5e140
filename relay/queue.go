package relay

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// runLength is how many deliveries of one ordered key are claimed together.
const runLength = 100

// lookAgain is how long a delivery sleeps whose endpoint cannot be used, before it is looked at again.
const lookAgain = time.Minute

// claimDue works the retry queue until ctx is done: it claims what is due and what can start soon, and offers it to the lanes.
func (e *engine) claimDue(ctx context.Context) error {
	complained := false
	wait := e.cfg().Queue.Poll
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
		if !e.admitted.Load() {
			err = e.admit(ctx)
		}
		if err == nil && !told {
			err = e.heedBreakers(ctx)
			told = err == nil
		}
		if err == nil {
			full, err = e.claimBatch(ctx)
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if !complained {
				e.log.Warn("claiming due deliveries does not succeed, trying again", withHint(err, "")...)
			}
			complained, wait = true, min(max(2*wait, 100*time.Millisecond), 10*time.Second)
			continue
		}
		complained, wait = false, e.cfg().Queue.Poll
		if full {
			wait = time.Millisecond
		}
	}
}

// admit makes sure, before the first claim, that the queue is this deployment's own and not a copy of it. Leading proves as much, but a replica that
// stands by never does.
func (e *engine) admit(ctx context.Context) error {
	system, err := wal.Identify(ctx, e.streamOptions())
	if err == nil {
		err = e.store.Admit(ctx, store.LeadOptions{InstanceID: e.cfg().Database.InstanceID, SystemID: system})
	}
	e.admitted.Store(err == nil)
	return err
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
	n := e.cfg().Queue.Batch
	e.claimLater.Store(true) // before the look, so that no room made after it goes unnoticed
	claimed, room := e.dispatcher.claimRoom()
	if claimed > n || room <= 0 {
		return false, nil // one batch is attempted while the next one is claimed, no more
	}
	caps := e.dispatcher.caps()
	until := time.Now().Add(e.cfg().Queue.Lease)
	try, cancel := context.WithTimeout(ctx, e.cfg().Queue.Lease) // one that takes longer has claimed for nobody
	defer cancel()
	served, err := e.servedTenants(try)
	if err != nil {
		return false, err
	}
	rows, more, err := e.store.Claim(try, e.owner, store.ClaimOptions{
		N: n, Lease: e.cfg().Queue.Lease, Caps: caps, Run: runLength, Tenants: served, Bytes: room,
	})
	if err != nil {
		return false, fmt.Errorf("claim due deliveries: %w", err)
	}
	if len(rows) > 0 {
		failpoint.Hit(failpoint.Claimed)
	}
	if len(caps) == 0 {
		e.claimLater.Store(false) // what is due was not kept out: there is nothing to wait for
	}
	list := make([]offered, len(rows))
	judged := make(map[laneKey]digest) // one statement has read an endpoint once
	for i := range rows {
		list[i] = e.claimed(ctx, &rows[i])
		list[i].mine = until
		if c := &rows[i]; list[i].ordered() {
			key := laneKey{c.Tenant, c.EndpointID}
			if _, known := judged[key]; !known {
				judged[key] = hashRow(c.Endpoint)
			}
			list[i].judged = judged[key]
		}
	}
	e.dispatcher.offer(list)
	e.metrics.claimed(len(rows))
	return more, nil
}

// servedTenants lists the tenants of the shard whose deliveries this replica may attempt; nil: all there are. It is asked anew each time, for every replica claims, and only
// the leader hears of new tenants.
func (e *engine) servedTenants(ctx context.Context) ([]string, error) {
	if len(e.cfg().Tenants.Include) == 0 && e.cfg().Database.Shards == 1 {
		return nil, nil
	}
	names, err := e.store.Tenants(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(names, func(name string) bool { return !e.cfg().Tenants.Includes(name) }), nil
}

// claimed makes a job of a claimed delivery, or says why its endpoint cannot take it.
func (e *engine) claimed(ctx context.Context, c *store.Claimed) offered {
	j := &job{Delivery: c.Delivery, commit: noCommit, committed: committedAt(c.ID)}
	j.owed.Store(true) // whoever deferred it has counted it
	defaults := *e.defaults.Load()
	defaults.Tenant = c.Tenant
	ep, err := delivery.NewEndpoint(c.Endpoint, defaults)
	if c.Event != nil { // the row does not keep what was sent, for it had been delivered
		format := delivery.FormatStandard
		if err == nil {
			format = ep.Format
		}
		m := delivery.Encode(nil, format, c.Event, e.cfg().Delivery.Source)
		j.Message = &m
	}
	switch {
	case err != nil:
		return offered{j, store.DeferInvalid, spread(lookAgain)}
	case !ep.Active:
		return offered{j, store.DeferInactive, parked}
	case ep.Paused:
		return offered{j, store.DeferPaused, parked}
	case c.VerifiedOnly && !ep.Verified:
		return offered{j, store.DeferUnverified, spread(lookAgain)}
	}
	j.bytes = jobOverhead + int64(len(j.Message.Body))
	j.endpoint, j.URL, j.Method = ep, ep.URL, ep.Method
	if e.tracing != nil {
		e.tracing.delivery(ctx, j)
	}
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
	tick := time.NewTicker(e.cfg().Queue.Lease / 3)
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
		until := time.Now().Add(e.cfg().Queue.Lease)
		try, cancel := context.WithTimeout(ctx, e.cfg().Queue.Lease/3)
		renewed, err := e.store.Renew(try, e.owner, ids, e.cfg().Queue.Lease)
		cancel()
		if err == nil {
			e.dispatcher.renewed(renewed, until)
		} else if ctx.Err() == nil {
			e.log.Warn("leases could not be renewed; another replica may take these deliveries over", "deliveries", len(ids), "error", err)
		}
	}
}
