package relay

import (
	"context"
	"errors"
	"fmt"

	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// Healing. What the slot can not bring any more is in the tables of events, and the database knows which of it is recorded:
//
//	──────────── handled ───────────┤ S ├──────── lost with the slot ────────┤ U ├──── the new slot brings it ────►
//
// S is the last saved snapshot: whatever it shows was recorded before it was saved (checkpoint). U is the snapshot that the new slot exports: whatever
// it does not show, the new slot will bring. So what is visible in U and not in S is queued, idempotently, by the same machinery that queues a tenant's
// earlier events; it works in the background while the stream already goes on. Order is kept: what the stream brings of an ordered endpoint waits
// until that is done.
//
// A crash on the way does no harm. The slot is made first, and the marks of all tenants and the position are written in one transaction: until then the
// slot is ahead of the recorded position, which is a reason to heal again. Two relays do not heal at the same time: store.LockHeal.

// errSlotAhead says that commits between the recorded position and the slot were never seen: somebody made the slot anew, moved it, or read from it.
var errSlotAhead = errors.New("the slot is ahead of what was recorded")

// heals tells the faults of a session that healing mends.
func heals(err error) bool {
	for _, kind := range []error{wal.ErrSlotMissing, wal.ErrSlotLost, wal.ErrPublicationMissing, errSlotAhead, store.ErrRestored} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// heal makes a new slot and marks what every tenant has missed. cause is why. A nil error means that leading can be tried again at once.
func (e *engine) heal(ctx context.Context, cause error) error {
	known, err := e.store.Known(ctx)
	if err != nil {
		return err
	}
	if !known { // no relay has ever led here: what is missing was never made
		return cause
	}
	unlock, locked, err := e.store.LockHeal(ctx)
	if err != nil {
		return err
	}
	if !locked {
		return fmt.Errorf("another relay is healing: %w", wal.ErrSlotActive)
	}
	defer unlock()
	e.status.set(false, "healing: %v", cause)
	e.log.Error("healing: events may have been missed", "slot", e.cfg.Database.Slot, "cause", cause)
	if errors.Is(cause, wal.ErrPublicationMissing) {
		if err := e.store.RestorePublications(ctx); err != nil {
			return err
		}
	}
	o, err := e.leadHealing(ctx)
	if err != nil {
		return fmt.Errorf("take leadership to heal slot %q: %w", e.cfg.Database.Slot, err)
	}
	if o.Tenants, err = e.servedTenants(ctx); err != nil {
		return err
	}
	slot, err := wal.Renew(ctx, e.streamOptions())
	if err != nil {
		return err
	}
	o.Snapshot, o.LSN = slot.Snapshot, slot.LSN
	err = e.store.Heal(ctx, o)
	if err := errors.Join(err, slot.Close(ctx)); err != nil {
		return err
	}
	e.metrics.heals.Inc()
	e.log.Warn("healed: a new slot is in place, and what was missed is being queued", "slot", e.cfg.Database.Slot, "position", slot.LSN,
		"restored", o.Restored, "cause", cause, "check", "outbox-relay audit, and whatever dropped or outran the slot")
	return nil
}

// leadHealing takes leadership, unless this is a copy of the database: that must not call anybody. The options say whether it is the same instance on
// another cluster.
func (e *engine) leadHealing(ctx context.Context) (o store.HealOptions, err error) {
	if o.SystemID, err = wal.Identify(ctx, e.streamOptions()); err != nil {
		return o, err
	}
	by := store.LeadOptions{InstanceID: e.cfg.Database.InstanceID, SystemID: o.SystemID}
	progress, err := e.store.Lead(ctx, by)
	if o.Restored = errors.Is(err, store.ErrRestored); o.Restored {
		by.SystemID, by.Restored = "", true // the new one is written together with what was missed
		progress, err = e.store.Lead(ctx, by)
	}
	o.Epoch = progress.Epoch
	return o, err
}

// streamOptions are those of the stream.
func (e *engine) streamOptions() wal.Options {
	return wal.Options{
		URL: e.cfg.Database.StreamURL(), Slot: e.cfg.Database.Slot, Publications: []string{EventsPublication, RegistryPublication},
		ConnectTimeout: e.cfg.Database.ConnectTimeout, Log: e.log,
	}
}
