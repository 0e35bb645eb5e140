package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// later is the mark from which a tenant may have missed events: the last checkpoint, or its admission if that came after it.
const later = `CASE WHEN (pg_catalog.pg_snapshot_xmax(p.snapshot), pg_catalog.pg_snapshot_xmin(p.snapshot))
       > (pg_catalog.pg_snapshot_xmax(t.added_snapshot), pg_catalog.pg_snapshot_xmin(t.added_snapshot)) THEN p.snapshot ELSE t.added_snapshot END`

// open is the condition for a backfill that is not done.
const open = `t.backfill IS NOT NULL AND t.backfill_done_at IS NULL`

// markMissed begins a backfill of what a tenant has missed. One that is not done keeps its mode, and starts over with the wider border; what it was to queue
// keeps its place.
const markMissed = `
  backfill = CASE WHEN ` + open + ` THEN t.backfill ELSE 'missed' END,
  backfill_border = CASE WHEN ` + open + ` THEN coalesce(t.backfill_border, t.backfill_upto) END,
  backfill_border_place = CASE WHEN ` + open + ` THEN CASE WHEN t.backfill_border IS NULL THEN t.backfill_place ELSE t.backfill_border_place END END,
  backfill_from = CASE WHEN ` + open + ` THEN t.backfill_from ELSE ` + later + ` END,
  backfill_cursor = NULL, backfill_done_at = NULL`

// OwnSince is when the first rows of a tenant that this cluster wrote itself were made, at the earliest; null: all are its own. Rows of a restore bring transaction ids of the
// cluster before, which say nothing here, and sooner or later this one gives the same: without a look at the time they would seem to have been committed just then. It is that of
// created_at, which nobody dates back but who inserts from an archive, and that the log brings; an hour is for the clock of an application that sets it.
const OwnSince = `t.restored_at - interval '1 hour'`

// SlotState is what the database says of a slot and the progress in it.
type SlotState struct {
	Known bool  // there is a row of progress: the slot was made once
	Epoch int64 // of the last leader
	Sound bool  // the slot is there, and has not gone past what is recorded
	// Published says that the publications are there, and Remade that one is another than the slot has been read through. A slot may be older than
	// they are, and cannot be read past their making then, or leaves out what was being written meanwhile.
	Published, Remade bool
}

const slotState = `
SELECT pg_catalog.pg_is_in_recovery(), p.epoch, coalesce(r.restart_lsn IS NOT NULL AND r.wal_status <> 'lost' AND (p.lsn = '0/0' OR r.confirmed_flush_lsn <= p.lsn), false),
  0 <> ALL(b.oids), coalesce(b.oids <> p.publications, false) AND 0 <> ALL(b.oids)
FROM outbox_relay.progress p CROSS JOIN outbox_relay.publications() b (oids) LEFT JOIN pg_catalog.pg_replication_slots r ON r.slot_name = p.slot WHERE p.slot = $1::text`

// ErrStandby says that database.url leads to a standby, which knows nothing of the primary's slots.
var ErrStandby = errors.New("the server of database.url is a standby")

// SlotState reads it. Without the schema of the relay, nothing is known. ErrDenied: the role has no right to look. ErrStandby: not here.
func (s *Store) SlotState(ctx context.Context) (st SlotState, err error) {
	var standby bool
	err = s.pool.QueryRow(ctx, slotState, s.slot).Scan(&standby, &st.Epoch, &st.Sound, &st.Published, &st.Remade)
	if errors.Is(err, pgx.ErrNoRows) || code(err) == codeUndefinedTable {
		return SlotState{}, nil
	}
	st.Known = err == nil
	if standby {
		return SlotState{}, &hinted{ErrStandby, primaryHint}
	}
	if code(err) == codeDenied {
		role := pgx.Identifier{s.pool.Config().ConnConfig.User}.Sanitize()
		err = &hinted{fmt.Errorf("%w: %w", ErrDenied, err), "have an administrator run: GRANT outbox_relay_runner TO " + role + "; outbox-relay check says what else is missing"}
	}
	return st, wrap(err, "read the state of the slot")
}

// Publications reads the OIDs of the publications, in the order of their names. That of one that is missing is 0.
func (s *Store) Publications(ctx context.Context) (oids []uint32, err error) {
	err = s.pool.QueryRow(ctx, `SELECT outbox_relay.publications()`).Scan(&oids)
	return oids, wrap(err, "look at the publications")
}

// HealLock keeps other relays from healing the slot.
type HealLock struct{ tx pgx.Tx }

const (
	// The server ends a HealLock that was not kept for so long: its relay is frozen, or cut off without a word.
	healLockPatience = "60s"
	healKeepPatience = 20 * time.Second
)

// LockHeal takes the lock, which lasts until Unlock is called, or Keep has not been called for a minute. It does not wait: false means that another relay
// has it.
func (s *Store) LockHeal(ctx context.Context) (l *HealLock, locked bool, err error) {
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("lock healing: %w", explain(err))
	}
	l = &HealLock{tx}
	err = tx.QueryRow(ctx, `SELECT pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended($1::text, `+lockHeal+`))
FROM pg_catalog.set_config('idle_in_transaction_session_timeout', '`+healLockPatience+`', true)`, s.slot).Scan(&locked)
	if err != nil || !locked {
		l.Unlock(ctx)
	}
	return l, locked, wrap(explain(err), "lock healing")
}

// Keep shows the server that the relay is there. After an error the lock is lost. It must not be called together with another method.
func (l *HealLock) Keep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, healKeepPatience)
	defer cancel()
	_, err := l.tx.Exec(ctx, `SELECT 1`)
	return wrap(err, "keep the lock of healing")
}

// Unlock gives it up, also when ctx is over.
func (l *HealLock) Unlock(ctx context.Context) { _ = l.tx.Rollback(context.WithoutCancel(ctx)) }

// RestorePublications makes publications that are missing, with the tables of all tenants.
func (s *Store) RestorePublications(ctx context.Context) error {
	_, err := s.pool.Exec(ctx, `SELECT outbox_relay.restore_publications()`)
	return wrap(err, "restore publications")
}

// HealOptions say what a new slot begins with.
type HealOptions struct {
	Epoch    int64         // of the leader that heals
	Snapshot Snapshot      // what it does not show, the new slot brings
	LSN      pglogrepl.LSN // from which the new slot brings every commit
	SystemID string
	// Publications are their OIDs before the slot was made: one that is made anew later is a reason to heal again.
	Publications []uint32
	Tenants      []string // of the shard, whose events the slot carries; nil: all of these
	// Restored says that the tables come from another cluster. Transaction ids and positions in them mean nothing here, so what was missed is told by
	// time: everything from an hour before the last record on that has no delivery.
	Restored bool
}

// healPlace is where what was missed stands in the order of the queue: behind what the old slot has brought, and in front of what the new one brings.
const healPlace = `$4::text::pg_lsn - 1`

const (
	healTenants = `
UPDATE outbox_relay.tenants t SET backfill_upto = $2::text::pg_snapshot, backfill_place = ` + healPlace + `, ` + markMissed + `
FROM outbox_relay.progress p WHERE p.slot = $1::text AND ($3::text[] IS NULL OR t.schema = ANY($3::text[])) AND t.shard = $5::int4 AND t.state <> 'suspended'`

	// A snapshot that shows every transaction there can be. A move that was under way is over: its position means nothing any more.
	restoreTenants = `
UPDATE outbox_relay.tenants t SET added_snapshot = $2::text::pg_snapshot, restored_at = now(), moved_lsn = NULL, backfill_place = ` + healPlace + `, backfill_from = NULL, backfill_border = NULL, backfill_border_place = NULL, backfill_cursor = NULL, backfill_done_at = NULL,
  backfill_upto = CASE WHEN t.state <> 'suspended' THEN '9223372036854775807:9223372036854775807:'::pg_snapshot END,
  backfill = CASE WHEN ` + open + ` AND t.backfill = 'unprocessed' THEN 'unprocessed' ELSE 'since' END,
  backfill_since = CASE WHEN ` + open + ` AND t.backfill = 'since' THEN least(t.backfill_since, p.updated_at - interval '1 hour') ELSE p.updated_at - interval '1 hour' END
FROM outbox_relay.progress p WHERE p.slot = $1::text AND ($3::text[] IS NULL OR t.schema = ANY($3::text[])) AND t.shard = $5::int4`

	// Nor is this slot to bring, by the new log, what another shard's tenants had in the old one.
	restoreLeft = `UPDATE outbox_relay.tenants t SET moved_lsn = NULL WHERE t.moved_from = $1::text AND t.moved_lsn IS NOT NULL`

	// Places in the order of the queue stay what they are to each other, and come before all that the new log brings.
	restoreQueue = `
UPDATE outbox_relay.retry_queue q SET order_lsn = '0/0'::pg_lsn + r.place, order_n = 0
FROM (SELECT q.delivery_id, row_number() OVER (ORDER BY q.order_lsn, q.order_n, q.delivery_id) AS place FROM outbox_relay.retry_queue q
  WHERE q.order_key IS NOT NULL AND ($1::text[] IS NULL OR q.tenant = ANY($1::text[]))
    AND NOT EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.schema = q.tenant AND t.shard <> $2::int4)) r WHERE q.delivery_id = r.delivery_id`

	// The place that a recovery waits for is one of the old log.
	restoreRecoveries = `
UPDATE outbox_relay.recoveries r SET upto_lsn = NULL
WHERE r.done_at IS NULL AND ($1::text[] IS NULL OR r.tenant = ANY($1::text[]))
  AND NOT EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.schema = r.tenant AND t.shard <> $2::int4)`

	// The epoch is what makes it certain that nobody else has healed, or leads, meanwhile.
	healProgress = `
UPDATE outbox_relay.progress p SET lsn = $3::text::pg_lsn, high_lsn = $3::text::pg_lsn, snapshot = $4::text::pg_snapshot, updated_at = now(),
  system_identifier = coalesce(nullif($5::text, ''), p.system_identifier), publications = coalesce($6::oid[], p.publications)
WHERE p.slot = $1::text AND p.epoch = $2::int8`
)

// Heal marks what every tenant has missed and moves the progress to the new slot, in one transaction. ErrFenced: another leader has taken over, and
// nothing was written.
func (s *Store) Heal(ctx context.Context, o HealOptions) error {
	upto := o.Snapshot.String()
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if failpoint.Planted(failpoint.HealWithoutSwitch) {
			_, err := tx.Exec(ctx, healTenants, s.slot, upto, o.Tenants, o.LSN.String())
			return err
		}
		statement := healTenants
		if o.Restored {
			statement = restoreTenants
			if _, err := tx.Exec(ctx, restoreQueue, o.Tenants, s.shard); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, restoreLeft, s.slot); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, restoreRecoveries, o.Tenants, s.shard); err != nil {
				return err
			}
		}
		if failpoint.Planted(failpoint.HealWithoutMarks) {
			o.Tenants = []string{}
		}
		if _, err := tx.Exec(ctx, statement, s.slot, upto, o.Tenants, o.LSN.String(), s.shard); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, healProgress, s.slot, o.Epoch, o.LSN.String(), upto, o.SystemID, o.Publications)
		if err == nil && tag.RowsAffected() == 0 {
			err = ErrFenced
		}
		return err
	})
	if errors.Is(err, ErrFenced) {
		return ErrFenced
	}
	return wrap(err, "mark what was missed")
}

// Settled waits until every transaction that is open now has ended, and returns a snapshot that shows all of them: a commit may be in the log for a
// while, as long as a synchronous standby takes, before anybody sees it.
func (s *Store) Settled(ctx context.Context) (Snapshot, error) {
	first, _, err := s.Snapshot(ctx)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for err == nil {
		var now Snapshot
		if now, _, err = s.Snapshot(ctx); err == nil && now.xmin >= first.xmax {
			return now, nil
		}
		select {
		case <-ctx.Done():
			return Snapshot{}, ctx.Err()
		case <-tick.C:
		}
	}
	return Snapshot{}, err
}
