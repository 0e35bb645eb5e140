package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// later is the mark from which a tenant may have missed events: the last checkpoint, or its admission if that came after it.
const later = `CASE WHEN (pg_catalog.pg_snapshot_xmax(p.snapshot), pg_catalog.pg_snapshot_xmin(p.snapshot))
       > (pg_catalog.pg_snapshot_xmax(t.added_snapshot), pg_catalog.pg_snapshot_xmin(t.added_snapshot)) THEN p.snapshot ELSE t.added_snapshot END`

// open is the condition for a backfill that is not done.
const open = `t.backfill IS NOT NULL AND t.backfill_done_at IS NULL`

// markMissed begins a backfill of what a tenant has missed. One that is not done keeps its mode and starts over with the wider border.
const markMissed = `
  backfill = CASE WHEN ` + open + ` THEN t.backfill ELSE 'missed' END,
  backfill_border = CASE WHEN ` + open + ` THEN coalesce(t.backfill_border, t.backfill_upto) END,
  backfill_from = CASE WHEN ` + open + ` THEN t.backfill_from ELSE ` + later + ` END,
  backfill_cursor = NULL, backfill_done_at = NULL`

// Known tells whether the slot has a row of progress: whether it was made once.
func (s *Store) Known(ctx context.Context) (known bool, err error) {
	err = s.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM outbox_relay.progress p WHERE p.slot = $1::text)`, s.slot).Scan(&known)
	if code(err) == codeUndefinedTable { // nor the schema
		return false, nil
	}
	return known, wrap(err, "look for progress")
}

// LockHeal keeps other relays from healing the slot until unlock is called. It does not wait: false means that another one is at it.
func (s *Store) LockHeal(ctx context.Context) (unlock func(), locked bool, err error) {
	tx, err := s.pool.Begin(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("lock healing: %w", err)
	}
	unlock = func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }
	err = tx.QueryRow(ctx, `SELECT pg_catalog.pg_try_advisory_xact_lock(pg_catalog.hashtextextended($1::text, 8245937120485516402))`, s.slot).Scan(&locked)
	if err != nil || !locked {
		unlock()
	}
	return unlock, locked, wrap(err, "lock healing")
}

// RestorePublications makes publications that are missing, with the tables of all tenants.
func (s *Store) RestorePublications(ctx context.Context) error {
	_, err := s.pool.Exec(ctx, `SELECT outbox_relay.restore_publications()`)
	return wrap(err, "restore publications")
}

// HealOptions say what a new slot begins with.
type HealOptions struct {
	Epoch    int64         // of the leader that heals
	Snapshot string        // the name under which the new slot exported its snapshot
	LSN      pglogrepl.LSN // from which the new slot brings every commit
	SystemID string
	Tenants  []string // whose events the slot carries; nil: all
	// Restored says that the tables come from another cluster. Transaction ids and positions in them mean nothing here, so what was missed is told by
	// time: everything from an hour before the last record on that has no delivery.
	Restored bool
}

const (
	healTenants = `
UPDATE outbox_relay.tenants t SET backfill_upto = $2::text::pg_snapshot, ` + markMissed + `
FROM outbox_relay.progress p WHERE p.slot = $1::text AND ($3::text[] IS NULL OR t.schema = ANY($3::text[])) AND t.state <> 'suspended'`

	// A snapshot that shows every transaction there can be.
	restoreTenants = `
UPDATE outbox_relay.tenants t SET added_snapshot = $2::text::pg_snapshot, backfill_from = NULL, backfill_border = NULL, backfill_cursor = NULL, backfill_done_at = NULL,
  backfill_upto = CASE WHEN t.state <> 'suspended' THEN '9223372036854775807:9223372036854775807:'::pg_snapshot END,
  backfill = CASE WHEN ` + open + ` AND t.backfill = 'unprocessed' THEN 'unprocessed' ELSE 'since' END,
  backfill_since = CASE WHEN ` + open + ` AND t.backfill = 'since' THEN least(t.backfill_since, p.updated_at - interval '1 hour') ELSE p.updated_at - interval '1 hour' END
FROM outbox_relay.progress p WHERE p.slot = $1::text AND ($3::text[] IS NULL OR t.schema = ANY($3::text[]))`

	// Places in the order of the queue stay what they are to each other, and come before all that the new log brings.
	restoreQueue = `
UPDATE outbox_relay.retry_queue q SET order_lsn = '0/0'::pg_lsn + r.place, order_n = 0
FROM (SELECT q.delivery_id, row_number() OVER (ORDER BY q.order_lsn, q.order_n, q.delivery_id) AS place FROM outbox_relay.retry_queue q
  WHERE q.order_key IS NOT NULL AND ($1::text[] IS NULL OR q.tenant = ANY($1::text[]))) r WHERE q.delivery_id = r.delivery_id`

	// The epoch is what makes it certain that nobody else has healed, or leads, meanwhile.
	healProgress = `
UPDATE outbox_relay.progress p SET lsn = $3::text::pg_lsn, high_lsn = $3::text::pg_lsn, snapshot = $4::text::pg_snapshot, updated_at = now(),
  system_identifier = coalesce(nullif($5::text, ''), p.system_identifier)
WHERE p.slot = $1::text AND p.epoch = $2::int8`
)

// Heal marks what every tenant has missed and moves the progress to the new slot, in one transaction. ErrFenced: another leader has taken over, and
// nothing was written.
func (s *Store) Heal(ctx context.Context, o HealOptions) error {
	upto, err := s.exported(ctx, o.Snapshot)
	if err != nil {
		return err
	}
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		statement := healTenants
		if o.Restored {
			statement = restoreTenants
			if _, err := tx.Exec(ctx, restoreQueue, o.Tenants); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, statement, s.slot, upto, o.Tenants); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, healProgress, s.slot, o.Epoch, o.LSN.String(), upto, o.SystemID)
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

// exported reads an exported snapshot.
func (s *Store) exported(ctx context.Context, name string) (snapshot string, err error) {
	quoted := "'" + name + "'" // hexadecimal digits and dashes: the server made it
	err = pgx.BeginTxFunc(ctx, s.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SET TRANSACTION SNAPSHOT "+quoted); err != nil {
			return err
		}
		return tx.QueryRow(ctx, readSnapshot).Scan(&snapshot)
	})
	return snapshot, wrap(err, "read the snapshot of the new slot")
}
