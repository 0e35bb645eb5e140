package relay

import (
	"context"
	"errors"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Deliveries of one ordered key are claimed together, judged together by what their endpoint was then, and attempted one after the other, which takes a slow
// receiver minutes. What an operator does meanwhile must not wait for that. So runs that have been in memory for longer than window.hold are looked at again,
// one delivery for each lane. If it is not ours any more, or its endpoint or its tenant is not what it was, all that waits in the lane's runs goes back into
// the queue, in order, and the next claim judges anew.

// rejudge does that until ctx is done.
func (e *engine) rejudge(ctx context.Context) error {
	for {
		hold := e.cfg().Window.Hold
		t := time.NewTimer(max(hold/2, 100*time.Millisecond))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		for tenant, runs := range e.dispatcher.longRuns(hold) {
			if err := e.recall(ctx, tenant, runs); err != nil && ctx.Err() == nil {
				e.log.Warn("what is being sent in order could not be looked at again, trying again", "tenant", tenant, "error", err)
			}
		}
	}
}

// run is what is looked at of a lane.
type run struct {
	of       laneKey
	delivery outbox.UUID
	judged   digest
}

func (e *engine) recall(ctx context.Context, tenant string, runs []run) error {
	ids := make([]outbox.UUID, len(runs))
	for i := range runs {
		ids[i] = runs[i].delivery
	}
	standing, err := e.store.Standing(ctx, e.owner, tenant, ids)
	if _, broken := errors.AsType[*store.TenantError](err); err != nil && !broken { // a tenant that cannot be read is the claim's to deal with
		return err
	}
	for i := range runs {
		if row, ok := standing[runs[i].delivery]; !ok || hashRow(row) != runs[i].judged {
			e.dispatcher.recall(runs[i].of)
		}
	}
	return nil
}

// longRuns lists, by tenant, lanes with claimed deliveries that have waited behind others of their key for longer than hold.
func (d *dispatcher) longRuns(hold time.Duration) map[string][]run {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.now().Add(-hold)
	runs := make(map[string][]run)
	for key, l := range d.watched {
		for _, ch := range l.chains {
			if j := ch.firstClaimed(); j != nil && j.admitted.Before(old) {
				runs[key.tenant] = append(runs[key.tenant], run{key, j.ID, j.judged})
				break
			}
		}
	}
	return runs
}

// recall puts what waits in the runs of a lane back into the queue.
func (d *dispatcher) recall(of laneKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.lanes[of]
	if l == nil {
		return
	}
	for key, ch := range l.chains {
		if ch.firstClaimed() != nil {
			d.deferChain(l, key, ch, store.DeferHold, 0)
		}
	}
	d.busy(l)
}
