package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Recovery is a request to queue what an endpoint missed.
type Recovery struct {
	Number int64
	Endpoint
	// Ready says that whatever was read from the log before the request is recorded: what has no delivery then was missed.
	Ready bool
	// Registered says that the tenant is one of this shard's, whether the leader has come to hear of that or not.
	Registered bool
}

// Recoveries lists the requests of the shard's tenants that are not done, oldest first; those of no tenant at all are the first shard's. The first call that
// sees one notes how far the log has to be recorded for it. A tenant that is suspended, or is having queued what it missed then, is left out: that has places
// of its own in the order.
func (s *Store) Recoveries(ctx context.Context, epoch int64) ([]Recovery, error) {
	rows, _ := s.pool.Query(ctx, `SELECT r.id, r.tenant, r.endpoint_id, r.upto_lsn IS NULL,
  coalesce(r.upto_lsn <= (SELECT p.lsn FROM outbox_relay.progress p WHERE p.slot = $1::text), false) AND NOT coalesce(t.moved_lsn IS NOT NULL AND `+open+`, false),
  t.schema IS NOT NULL
FROM outbox_relay.recoveries r LEFT JOIN outbox_relay.tenants t ON t.schema = r.tenant
WHERE r.done_at IS NULL AND coalesce(t.shard, 0) = $2::int4 AND (t.state = 'suspended' OR `+open+` AND t.backfill_place > '0/0' AND t.moved_lsn IS NULL) IS NOT TRUE
ORDER BY r.id`, s.slot, s.shard)
	fresh := false
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r Recovery, err error) {
		var first bool
		err = row.Scan(&r.Number, &r.Tenant, &r.ID, &first, &r.Ready, &r.Registered)
		fresh = fresh || first
		return r, err
	})
	if err != nil || !fresh {
		return list, wrap(err, "list recoveries")
	}
	// What was committed while the request was being made has been read by the log before it, perhaps to no end: it is asked for as well.
	_, err = s.pool.Exec(ctx, `UPDATE outbox_relay.recoveries r SET upto_lsn = pg_current_wal_insert_lsn(), upto = pg_current_snapshot()
WHERE r.upto_lsn IS NULL AND r.done_at IS NULL AND EXISTS (SELECT FROM outbox_relay.progress p WHERE p.slot = $1::text AND p.epoch = $2::int8)`, s.slot, epoch)
	return list, wrap(err, "begin recoveries")
}

func wrap(err error, doing string) error {
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

// RecoveryPage is a part of what an endpoint may have missed.
type RecoveryPage struct {
	Recovery
	Events []outbox.Event // that have no delivery to the endpoint, by id
	Rate   float64        // deliveries a second that become due; zero: all at once
	Due    time.Duration  // when the first of them is due
	Done   bool           // there are no more

	from, cursor string
	scanned      int
}

// Deliveries of another dispatcher count as well: nobody wants those again. One of ours that was cancelled is no delivery, but its row stands. Each kind has
// an index of its own, and is looked up event by event: of an EXISTS the planner may as well make a hash of all deliveries that the endpoint ever had.
//
// A transaction that this very statement's snapshot does not know yet cannot have written what it sees: the row was restored from a dump of another
// cluster, it is in no log of this one, and so it is looked at like any older event. So is one that came with such a dump though the transaction is known by now.
const recoveryPage = `
SELECT ` + EventColumns + `,
  coalesce((SELECT true FROM {tenant}.webhook_deliveries d WHERE d.relayed AND d.webhook_event_id = e.id AND d.webhook_endpoint_id = $2::uuid LIMIT 1),
    (SELECT true FROM {tenant}.webhook_deliveries d WHERE NOT d.relayed AND d.webhook_event_id = e.id AND d.webhook_endpoint_id = $2::uuid LIMIT 1), false) AS has
FROM {tenant}.webhook_events e
WHERE e.id > $1::uuid AND e.occurred_at >= $3::timestamptz
  AND (e.xid IS NULL OR pg_visible_in_snapshot(e.xid, $4::text::pg_snapshot) OR e.xid >= pg_snapshot_xmax(pg_current_snapshot())
    OR e.created_at < (SELECT ` + OwnSince + ` FROM outbox_relay.tenants t WHERE t.schema = $6::text))
ORDER BY e.id LIMIT $5::int4`

// RecoveryPage reads the next part of a recovery: of at most n events from since the time that was asked for it is seen whether they have a delivery. Older ones are
// passed over by the server and do not count. What is wrong with the tenant's own tables is a *TenantError, but for a lock
// that somebody holds: that passes.
func (s *Store) RecoveryPage(ctx context.Context, r Recovery, n int) (*RecoveryPage, error) {
	page, err := s.recoveryPage(ctx, r, n)
	switch {
	case isTenants(err) && code(err) != codeLockNotAvailable:
		return nil, &TenantError{Tenant: r.Tenant, Err: err}
	case err != nil:
		return nil, fmt.Errorf("read recovery %d of tenant %q: %w", r.Number, r.Tenant, err)
	}
	return page, nil
}

func (s *Store) recoveryPage(ctx context.Context, r Recovery, n int) (*RecoveryPage, error) {
	page := &RecoveryPage{Recovery: r}
	var (
		since time.Time
		upto  string
		due   int64
	)
	err := s.pool.QueryRow(ctx, `SELECT coalesce(r.cursor::text, '00000000-0000-0000-0000-000000000000'),
  least(greatest(r.since, `+firstTime+`), `+lastTime+`), r.upto::text, coalesce(r.rate, 0)::float8,
  coalesce(greatest(extract(epoch FROM r.paced_until - now()) * 1e6, 0), 0)::int8
FROM outbox_relay.recoveries r WHERE r.id = $1::int8 AND r.done_at IS NULL`, r.Number).Scan(&page.from, &since, &upto, &page.Rate, &due)
	if errors.Is(err, pgx.ErrNoRows) {
		page.Done = true
		return page, nil
	}
	if err != nil {
		return nil, err
	}
	page.Due, page.cursor = time.Duration(due)*time.Microsecond, page.from
	rows, err := s.pool.Query(ctx, forTenant(recoveryPage, r.Tenant), page.from, r.ID, since, upto, n, r.Tenant)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for size := 0; size < pageBytes && rows.Next(); page.scanned++ {
		var has bool
		e, err := ScanEvent(rows, &has)
		if err != nil {
			return nil, err
		}
		page.cursor = e.ID.String()
		if !has {
			size += len(e.Data) + len(e.Metadata)
			page.Events = append(page.Events, e)
		}
	}
	rows.Close()
	sent := rows.CommandTag().RowsAffected()
	page.Done = sent < int64(n) && int64(page.scanned) == sent
	return page, rows.Err()
}

// recordRecovery moves the cursor, if it still is where the page began.
const recordRecovery = `
UPDATE outbox_relay.recoveries r SET cursor = $3::uuid, scanned = r.scanned + $4::int8, queued = r.queued + $5::int8,
  paced_until = CASE WHEN r.rate IS NOT NULL THEN greatest(r.paced_until, now()) + ($5::int8 / r.rate) * interval '1 second' END,
  done_at = CASE WHEN $6::bool THEN now() END
WHERE r.id = $1::int8 AND coalesce(r.cursor, '00000000-0000-0000-0000-000000000000') = $2::uuid AND r.done_at IS NULL`

// RecordRecovery queues what a page has led to and moves the recovery on, in one transaction. Deliveries that have a row already are left as they
// are. ErrFenced: the epoch is over, nothing was written. A *TenantError says that the tenant has been suspended.
func (s *Store) RecordRecovery(ctx context.Context, epoch int64, page *RecoveryPage, outcomes []Outcome) error {
	if page.from == "" {
		return nil
	}
	return s.queuePage(ctx, epoch, outcomes,
		statement{sql: recordRecovery, args: []any{page.Number, page.from, page.cursor, page.scanned, len(outcomes), page.Done}})
}

// EndRecovery gives a recovery up. A leader whose epoch is over changes nothing.
func (s *Store) EndRecovery(ctx context.Context, epoch, number int64, reason string) error {
	_, err := s.pool.Exec(ctx, `UPDATE outbox_relay.recoveries r SET done_at = now(), error = $2::text WHERE r.id = $1::int8 AND r.done_at IS NULL
  AND EXISTS (SELECT FROM outbox_relay.progress p WHERE p.slot = $3::text AND p.epoch = $4::int8)`, number, text(reason), s.slot, epoch)
	if err != nil {
		return fmt.Errorf("end recovery %d: %w", number, err)
	}
	return nil
}
