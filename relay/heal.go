package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// Healing. What the slot can not bring any more is in the tables of events, and the database knows which of it is recorded:
//
//	─────────── handled ──────────┤ S ├──────── lost with the slot ────────┤ the new slot brings it ────►
//	                                  └─────────── is queued ──────────────────────┤ U ├
//
// S is the last saved snapshot: whatever it shows was recorded before it was saved (checkpoint). U is a snapshot taken after the new slot was made, and
// after all transactions had ended that were open then: whatever it does not show, the new slot will bring. So what is visible in U and not in S is
// queued, idempotently, by the same machinery that queues a tenant's earlier events. It works in the background while the stream already goes on, and
// begins when that has recorded what both bring (session.mayFill). Order is kept: what the stream brings of an ordered endpoint waits until it is done.
//
// A crash on the way does no harm. The slot is made first, and the marks of all tenants and the position are written in one transaction: until then the
// slot is ahead of the recorded position, which is a reason to heal again. Two relays do not heal at the same time: store.LockHeal.

// errSlotAhead says that commits between the recorded position and the slot were never seen: somebody made the slot anew, moved it, or read from it.
var errSlotAhead = errors.New("the slot is ahead of what was recorded")

// heals tells the faults of a session that healing mends.
func heals(err error) bool {
	for _, kind := range []error{wal.ErrSlotMissing, wal.ErrSlotLost, wal.ErrPublicationMissing, wal.ErrPublicationRemade, errSlotAhead, store.ErrRestored} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// barrier is a transaction that the server has not been able to send. It would not be at any later time either, and nothing that is behind it would ever come.
type barrier struct {
	at    wal.LSN
	times int // that a session has ended there
}

// barrierTries is how many sessions have to end at the same transaction before the slot is renewed past it.
const barrierTries = 3

// blocks tells whether a session has ended at the barrier, by err, once too often. What else ends sessions in between, such as another relay that tries, says
// nothing about it.
func (b *barrier) blocks(err error, log *slog.Logger) bool {
	met, ok := errors.AsType[*wal.StreamError](err)
	if !ok || !errors.Is(met.Kind, wal.ErrRowTooLarge) {
		return false
	}
	if met.At != b.at {
		*b = barrier{at: met.At}
	}
	if b.times++; b.times < barrierTries {
		return false
	}
	log.Error("the server cannot send a row of the log, nor anything behind it: the slot is renewed past it", "position", met.At.String(), "transaction", met.XID,
		"times", b.times, "error", err, "hint", met.Hint())
	return true
}

// heal makes a new slot and marks what every tenant has missed. cause is why. A nil error means that leading can be tried again at once.
func (e *engine) heal(ctx context.Context, cause error) error {
	if state, err := e.store.SlotState(ctx); err != nil || !state.Known {
		if copied := e.admit(ctx); errors.Is(copied, store.ErrInstance) {
			return copied // rather than to have it made on a copy
		}
		if err != nil { // cause would end the relay; a database that cannot be asked, as amid a failover, may know of the slot
			return fmt.Errorf("%s: %w", cause.Error(), err)
		}
		return cause // what is missing was never made
	}
	lock, locked, err := e.store.LockHeal(ctx)
	if err != nil {
		return err
	}
	if !locked {
		return errHealing
	}
	defer lock.Unlock(ctx)
	// Another relay may have healed while we found out, or led since. But a slot that was made before its publications, or stands before a row that the
	// server cannot send, looks sound to everybody but its last leader.
	state, err := e.store.SlotState(ctx)
	if err != nil {
		return err
	}
	published := errors.Is(cause, wal.ErrPublicationMissing) || errors.Is(cause, wal.ErrPublicationRemade)
	if old := (published || errors.Is(cause, wal.ErrRowTooLarge)) && state.Epoch == e.lastEpoch; state.Sound && state.Published && !state.Remade && !old {
		return fmt.Errorf("another relay has healed: %w", wal.ErrSlotActive)
	}
	e.status.set(false, "healing: %v", cause)
	e.log.Error("healing: events may have been missed", "slot", e.cfg().Database.Slot, "cause", cause)
	if published {
		if err := e.store.RestorePublications(ctx); err != nil {
			return err
		}
	}
	healing, stop := e.watchHeal(ctx, lock, cause)
	err = e.renew(healing, cause)
	stop()
	if lost := context.Cause(healing); err != nil && ctx.Err() == nil && lost != nil && !errors.Is(lost, context.Canceled) {
		return lost
	}
	return err
}

// renew makes the slot anew, under the lock of healing, and marks what was missed.
func (e *engine) renew(ctx context.Context, cause error) error {
	o, err := e.leadHealing(ctx)
	if err != nil {
		return fmt.Errorf("take leadership to heal slot %q: %w", e.cfg().Database.Slot, err)
	}
	e.lastEpoch = o.Epoch // if the rest does not succeed, it is still ours to do
	failpoint.Hit(failpoint.HealLed)
	if o.Publications, err = e.store.Publications(ctx); err != nil {
		return err
	}
	if o.LSN, err = wal.Renew(ctx, e.streamOptions()); err != nil {
		return err
	}
	failpoint.Hit(failpoint.HealRenewed)
	if o.Snapshot, err = e.store.Settled(ctx); err != nil {
		return err
	}
	failpoint.Hit(failpoint.HealSettled)
	// After the slot was made: whoever is moved to this shard from now on comes with what the new slot brings.
	if o.Tenants, err = e.servedTenants(ctx); err != nil {
		return err
	}
	if err := e.store.Heal(ctx, o); err != nil {
		return err
	}
	failpoint.Hit(failpoint.HealMarked)
	e.metrics.heals.Inc()
	e.log.Warn("healed: a new slot is in place, and what was missed is being queued", "slot", e.cfg().Database.Slot, "position", o.LSN.String(),
		"restored", o.Restored, "cause", cause, "check", "outbox-relay audit, and whatever dropped or outran the slot")
	return nil
}

// leadHealing takes leadership, unless this is a copy of the database: that must not call anybody. The options say whether it is the same instance on
// another cluster.
func (e *engine) leadHealing(ctx context.Context) (o store.HealOptions, err error) {
	if o.SystemID, err = wal.Identify(ctx, e.streamOptions()); err != nil {
		return o, err
	}
	by := store.LeadOptions{InstanceID: e.cfg().Database.InstanceID, SystemID: o.SystemID}
	progress, err := e.store.Lead(ctx, by)
	if o.Restored = errors.Is(err, store.ErrRestored); o.Restored {
		by.SystemID, by.Restored = "", true // the new one is written together with what was missed
		progress, err = e.store.Lead(ctx, by)
	}
	o.Epoch = progress.Epoch
	return o, err
}

// watchPublications ends the session when a publication is another one of the same name. The log goes on with it without a word, but has left out what
// was written by transactions that were open while it was made. One that is missing is the stream's to notice.
func (s *session) watchPublications(ctx context.Context) error {
	now, err := s.store.Publications(ctx)
	if err == nil && remade(s.stream.Publications(), now) {
		s.end(remadeError())
	}
	return err
}

// remade tells whether a publication of now is another one than it was. 0 is none.
func remade(before, now []uint32) bool {
	for i, oid := range before {
		if now[i] != 0 && now[i] != oid {
			return true
		}
	}
	return false
}

func remadeError() error {
	return &wal.StreamError{Op: "check publications", Kind: wal.ErrPublicationRemade}
}

// streamOptions are those of the stream.
func (e *engine) streamOptions() wal.Options {
	return wal.Options{
		URL: e.cfg().Database.StreamURL(), Refresh: e.cfg().Database.StreamDSN, Slot: e.cfg().Database.Slot, Publications: []string{eventsPublication, registryPublication},
		ConnectTimeout: e.cfg().Database.ConnectTimeout, Log: e.log,
	}
}
