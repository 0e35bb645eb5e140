package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// While a slot is being made no relay leads, which may last: the server waits for every transaction that was writing when it was begun. What it waits for
// is told, by the relay that heals and by those that wait for it: the healing one may be frozen or gone.
//
// The server process of a relay that is gone is not ended by those that are there. Theirs would wait for the same transactions, and once these are over
// it ends by itself, and leaves a slot that is a reason to heal again.

// errHealing says that another relay is healing.
var errHealing = errors.New("another relay is healing")

const (
	// makingLook is how often is asked what the making of a slot waits for, and how long it may take without a word.
	makingLook = 5 * time.Second
	makingTell = time.Minute
	// leaderlessPatience is for how long a relay that waits for another one to heal counts as ready.
	leaderlessPatience = 30 * time.Second
)

// leaderless is a time in which another relay should lead, and none does; the zero value is that there is none.
type leaderless struct {
	since, looked time.Time
	making        *store.Making // nil: not known
	teller        teller
}

// awaits tells whether err is that a slot has to be made first, by somebody else.
func awaits(err error) bool {
	return errors.Is(err, errHealing) || errors.Is(err, wal.ErrSlotUnfinished)
}

// look says what is waited for. cause is why this relay does not lead.
func (l *leaderless) look(ctx context.Context, e *engine, cause error) {
	now, slot := time.Now(), e.cfg().Database.Slot
	if l.since.IsZero() {
		l.since = now
		e.log.Info("standing by, and no relay leads", "slot", slot, "reason", cause)
	}
	if now.Sub(l.looked) >= makingLook {
		l.looked = now
		l.making, _ = e.store.Making(ctx) // without it the cause says enough
		if now.Sub(l.since) >= makingLook && l.making != nil && l.teller.due(now, makingTell) {
			e.log.Warn("no relay leads until the slot is made", "slot", slot, "state", l.making.String(), "hint", l.making.Remedy())
		}
	}
	why := cause.Error()
	if l.making != nil {
		why = l.making.String()
	}
	if now.Sub(l.since) < leaderlessPatience {
		e.status.set(true, "standing by: no relay leads slot %q: %s", slot, why)
	} else {
		e.status.set(false, "no relay leads slot %q: %s", slot, why)
	}
}

// watchHeal keeps the lock of healing, and tells what healing waits for, until stop is called. The context is over when the lock is lost.
func (e *engine) watchHeal(ctx context.Context, lock *store.HealLock, cause error) (healing context.Context, stop func()) {
	healing, end := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(makingLook)
		defer tick.Stop()
		var teller teller
		for {
			select {
			case <-healing.Done():
				return
			case <-tick.C:
			}
			if err := lock.Keep(ctx); err != nil {
				end(fmt.Errorf("healing is broken off: %w", err))
				return
			}
			making, err := e.store.Making(healing)
			if err != nil || making == nil {
				continue // the server of the relay's database is asked; whoever heals will meet the error
			}
			e.status.set(false, "healing: %v; %s", cause, making)
			if teller.due(time.Now(), makingTell) {
				e.log.Warn("healing goes on, and no relay leads until the slot is made", "slot", e.cfg().Database.Slot, "state", making.String(), "hint", making.Remedy())
			}
		}
	}()
	return healing, func() {
		end(nil)
		<-done
	}
}
