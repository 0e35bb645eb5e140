package store

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// pageBytes is about how much of payloads a page of a backfill holds.
const pageBytes = 8 << 20

// Page is a part of a backfill: events that were in a tenant's table before the log carried them.
type Page struct {
	Tenant string
	Events []outbox.Event  // by id
	Places []pglogrepl.LSN // where each stands in the order of the queue; zero: before all that the log brings
	Done   bool            // there are no more
	// Unreadable is an event that stands in place of all others: its text is longer than the server can send. Nil: there is none.
	Unreadable *UnreadableEvent

	from, upto string // the cursor it starts from and the border of the backfill it belongs to
}

// UnreadableEvent is one that can be stored, but not read.
type UnreadableEvent struct {
	ID  outbox.UUID
	Err error
}

// Cut leaves the first n events in the page, and the rest to the next one.
func (p *Page) Cut(n int) {
	p.Events, p.Places, p.Done = p.Events[:n], p.Places[:n], false
}

// waiting is the condition under which there is a backfill to be worked on.
const waiting = `t.state = 'active' AND t.backfill IS NOT NULL AND t.backfill_done_at IS NULL AND t.backfill_upto IS NOT NULL`

// Backfill names a request to queue earlier events of a tenant; two requests differ in their border.
type Backfill struct{ Tenant, Upto string }

// moveSettled is the condition that all of a moved tenant's events that the slot before was to bring are recorded, as far as that brought them. A slot that is not known any
// more has nothing to add.
const moveSettled = `NOT EXISTS (SELECT FROM outbox_relay.progress f WHERE f.slot = t.moved_from AND f.lsn < t.moved_lsn)`

// Backfills lists the backfills of active tenants of the shard that are not done, and that do not wait for the slot which the tenant was moved from.
func (s *Store) Backfills(ctx context.Context) ([]Backfill, error) {
	rows, _ := s.pool.Query(ctx, `SELECT t.schema, t.backfill_upto::text FROM outbox_relay.tenants t
WHERE t.shard = $1::int4 AND `+moveSettled+` AND `+waiting+` ORDER BY 1`, s.shard)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Backfill])
	return list, wrap(err, "list backfills")
}

// A time that cannot be written, as the infinities and the years beyond, is what the stream makes of it (wal.Tuple.Time): an event is the same whichever way
// it comes.
const (
	firstTime = `'0001-01-01 00:00:00.000001+00'::timestamptz`
	lastTime  = `'9999-12-31 23:59:59.999999+00'::timestamptz`
)

// EventColumns are those of an event e, for ScanEvent. An adopted table may have nulls where ours has none.
const EventColumns = `e.id, coalesce(e.event_type, '')::text, coalesce(e.event_name, '')::text, e.aggregate_id, coalesce(e.aggregate_type, '')::text,
  least(greatest(coalesce(e.aggregate_version, 1), -2147483648), 2147483647)::int4,
  coalesce(e.event_data, '{}')::text, coalesce(e.event_metadata, '{}')::text, e.correlation_id, e.causation_id, e.triggered_by_user_id, e.context_id,
  CASE WHEN e.occurred_at IS NULL THEN '0001-01-01 00:00:00+00' ELSE least(greatest(e.occurred_at, ` + firstTime + `), ` + lastTime + `) END`

// ScanEvent reads EventColumns, and more if the query selects more.
func ScanEvent(row pgx.CollectableRow, more ...any) (e outbox.Event, err error) {
	var data, metadata string
	err = row.Scan(append([]any{
		&e.ID, &e.Type, &e.Name, &e.AggregateID, &e.AggregateType, &e.AggregateVersion, &data, &metadata,
		&e.CorrelationID, &e.CausationID, &e.TriggeredByUserID, &e.ContextID, &e.OccurredAt,
	}, more...)...)
	e.OccurredAt, e.Data, e.Metadata = e.OccurredAt.UTC(), json.RawMessage(data), json.RawMessage(metadata)
	return e, err
}

// A row without xid is older than the column, so it was committed before every snapshot of ours. One with an xid that is still to come was brought by a
// logical restore.
const (
	backfillColumns = `
SELECT ` + EventColumns + `, coalesce(e.xid IS NULL AND $6::text IS NOT NULL OR pg_visible_in_snapshot(e.xid, $6::text::pg_snapshot), false)`
	backfillRows = `
FROM {tenant}.webhook_events e
WHERE e.id > $1::uuid AND (e.xid IS NULL OR pg_visible_in_snapshot(e.xid, $2::text::pg_snapshot) OR e.xid >= pg_snapshot_xmax(pg_current_snapshot())
    OR e.created_at < $7::timestamptz)
  AND (CASE $3::text WHEN 'unprocessed' THEN e.processed_at IS NULL WHEN 'since' THEN e.occurred_at >= $4::timestamptz ELSE true END
    OR NOT pg_visible_in_snapshot(e.xid, $6::text::pg_snapshot) AND (e.created_at < $7::timestamptz) IS NOT TRUE)`
)

// What was visible at the lower border is left out. Where little has come since, it is found by its index and sorted for each page. Where it is much, all of
// it would be read for each page: then a walk through the primary key has to find it, and a CASE hides it from a planner that has counted none of it yet.
const (
	backfillFrom = `
  AND e.xid >= pg_snapshot_xmin($8::text::pg_snapshot) AND NOT pg_visible_in_snapshot(e.xid, $8::text::pg_snapshot)
  AND (e.created_at < $7::timestamptz) IS NOT TRUE`
	backfillFromMany = `
  AND CASE WHEN e.xid >= pg_snapshot_xmin($8::text::pg_snapshot) THEN NOT pg_visible_in_snapshot(e.xid, $8::text::pg_snapshot) END
  AND (e.created_at < $7::timestamptz) IS NOT TRUE`

	// muchMissed is how many events are much.
	muchMissed    = 20_000
	hasMuchMissed = `
SELECT EXISTS (SELECT FROM {tenant}.webhook_events e WHERE e.xid >= pg_snapshot_xmin($1::text::pg_snapshot) ORDER BY e.xid OFFSET $2::int4 LIMIT 1)`
	leastMissed = `
SELECT m.id FROM (SELECT e.id FROM {tenant}.webhook_events e WHERE e.xid >= pg_snapshot_xmin($1::text::pg_snapshot) OFFSET 0) m ORDER BY 1 LIMIT 1`

	// firstCursor is that of a backfill that has not begun.
	firstCursor = "00000000-0000-0000-0000-000000000000"
)

const backfillOrder = ` ORDER BY e.id LIMIT $5::int4`

// BackfillPage reads the next part of a tenant's backfill, at most n events and a few MiB. A tenant without a backfill has an empty
// page that is done. An error of the tenant's own is a *TenantError.
func (s *Store) BackfillPage(ctx context.Context, tenant string, n int) (*Page, error) {
	page, err := s.backfillPage(ctx, tenant, n)
	if err != nil {
		return nil, tenantFault(err, tenant, "read backfill of tenant %q", tenant)
	}
	return page, nil
}

// noteForeign notes it where a schema came with rows of another cluster, which have its transaction ids: some of them are still to come here. It is not done by
// who adds a tenant, whose rights are not for what a tenant's policies may run.
func (s *Store) noteForeign(ctx context.Context, tenant string) (own *time.Time, err error) {
	const note = `
UPDATE outbox_relay.tenants t SET restored_at = t.since WHERE t.schema = $1::text AND t.restored_at IS NULL
  AND EXISTS (SELECT FROM {tenant}.webhook_events e WHERE e.xid >= pg_snapshot_xmax(t.backfill_upto) AND e.created_at < t.since - interval '1 hour')
RETURNING ` + OwnSince
	err = s.pool.QueryRow(ctx, forTenant(note, tenant), tenant).Scan(&own)
	return own, noRows(err)
}

// noRows is err, but for the error that there are none.
func noRows(err error) error {
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	return err
}

// since returns the condition that leaves out what was visible at the lower border of a page, and after which id there can be any.
func (s *Store) since(ctx context.Context, page *Page, lower string) (condition, after string, err error) {
	var much bool
	if err := s.pool.QueryRow(ctx, forTenant(hasMuchMissed, page.Tenant), lower, muchMissed).Scan(&much); err != nil || !much {
		return backfillFrom, page.from, err
	}
	if page.from != firstCursor {
		return backfillFromMany, page.from, nil
	}
	// What is new has the greatest ids, as a rule: the first page would walk past all that is older.
	var least outbox.UUID
	err = s.pool.QueryRow(ctx, forTenant(leastMissed, page.Tenant), lower).Scan(&least)
	if err != nil || least.IsZero() {
		return backfillFromMany, page.from, noRows(err)
	}
	for i := len(least) - 1; i >= 0; i-- { // the one before it
		if least[i]--; least[i] != 0xff {
			break
		}
	}
	return backfillFromMany, least.String(), nil
}

func (s *Store) backfillPage(ctx context.Context, tenant string, n int) (*Page, error) {
	var (
		page   = &Page{Tenant: tenant}
		mode   string
		since  *time.Time
		lower  *string
		border *string
		late   string
		early  string
		own    *time.Time
	)
	err := s.pool.QueryRow(ctx, `SELECT t.backfill, t.backfill_since, t.backfill_from::text, t.backfill_border::text, t.backfill_upto::text,
  coalesce(t.backfill_cursor::text, '`+firstCursor+`'), coalesce(t.backfill_place, '0/0')::text,
  coalesce(t.backfill_border_place, '0/0')::text, `+OwnSince+` FROM outbox_relay.tenants t WHERE t.schema = $1::text AND `+waiting, tenant).
		Scan(&mode, &since, &lower, &border, &page.upto, &page.from, &late, &early, &own)
	if errors.Is(err, pgx.ErrNoRows) {
		page.Done = true
		return page, nil
	}
	var places [2]pglogrepl.LSN
	for i, text := range []string{late, early} {
		if err == nil {
			places[i], err = pglogrepl.ParseLSN(text)
		}
	}
	if err == nil && own == nil && mode != "missed" && page.from == firstCursor {
		own, err = s.noteForeign(ctx, tenant)
	}
	if err != nil {
		return nil, err
	}
	sql, args := backfillRows, []any{page.from, page.upto, mode, since, n, border, own}
	if lower != nil {
		from, after, err := s.since(ctx, page, *lower)
		if err != nil {
			return nil, err
		}
		sql, args[0], args = sql+from, after, append(args, *lower)
	}
	if failpoint.Planted(failpoint.HealByID) {
		sql += ` AND e.id > coalesce((SELECT max(d.webhook_event_id::text)::uuid FROM {tenant}.webhook_deliveries d), $1::uuid)`
	}
	full, err := s.readPage(ctx, page, sql, args, places)
	page.Done = !full && len(page.Events) < n
	if code(err) != codeLimit {
		return page, err
	}
	page.Done = false
	if len(page.Events) > 0 {
		return page, nil // the one behind these
	}
	return page, s.readFirst(ctx, page, sql, args, places)
}

// readFirst reads the first row of a page alone: another one may be what could not be read.
func (s *Store) readFirst(ctx context.Context, page *Page, sql string, args []any, places [2]pglogrepl.LSN) error {
	const limit = 4 // of args
	args[limit] = 1
	var id outbox.UUID
	if err := s.pool.QueryRow(ctx, forTenant(`SELECT e.id`+sql+backfillOrder, page.Tenant), args...).Scan(&id); err != nil {
		return err
	}
	_, err := s.readPage(ctx, page, sql+` AND e.id = '`+id.String()+`'`, args, places)
	if code(err) == codeLimit {
		page.Unreadable, err = &UnreadableEvent{id, err}, nil
	}
	return err
}

// readPage adds to the page what the rest of a statement, sql, finds. full tells that it ended at the bytes a page may have.
func (s *Store) readPage(ctx context.Context, page *Page, sql string, args []any, places [2]pglogrepl.LSN) (full bool, err error) {
	rows, err := s.pool.Query(ctx, forTenant(backfillColumns+sql+backfillOrder, page.Tenant), args...)
	if err != nil {
		return false, err
	}
	defer rows.Close()
	size := 0
	for size < pageBytes && rows.Next() {
		var before bool // the border of an earlier mark
		e, err := ScanEvent(rows, &before)
		if err != nil {
			return false, err
		}
		size += len(e.Data) + len(e.Metadata)
		at := places[0]
		if before {
			at = places[1]
		}
		page.Events, page.Places = append(page.Events, e), append(page.Places, at)
	}
	rows.Close()
	return size >= pageBytes, rows.Err()
}

// recordPage moves the cursor, if the backfill is still the one that the page was read from.
const recordPage = `
UPDATE outbox_relay.tenants t SET backfill_cursor = $4::uuid, backfill_done_at = CASE WHEN $5::bool THEN now() END
WHERE t.schema = $1::text AND t.backfill_upto::text = $2::text
  AND coalesce(t.backfill_cursor, '` + firstCursor + `') = $3::uuid AND ` + waiting

// RecordBackfill queues what a page has led to and moves the backfill on, in one transaction. Deliveries that have a row already are
// left as they are, but for those that wait and are not in the queue: see takeUp. ErrFenced: the epoch is over, nothing was written. A *TenantError says that the tenant has been suspended. If the
// backfill has begun anew since the page was read, the outcomes are kept and the page will come again.
func (s *Store) RecordBackfill(ctx context.Context, epoch int64, page *Page, outcomes []Outcome) error {
	if page.upto == "" {
		return nil
	}
	cursor := page.from
	if n := len(page.Events); n > 0 {
		cursor = page.Events[n-1].ID.String()
	} else if page.Unreadable != nil {
		cursor = page.Unreadable.ID.String()
	}
	return s.queuePage(ctx, epoch, outcomes, statement{sql: recordPage, args: []any{page.Tenant, page.upto, page.from, cursor, page.Done}})
}

// queuePage queues what a page has led to, together with the statement that moves on to the next one.
func (s *Store) queuePage(ctx context.Context, epoch int64, outcomes []Outcome, next statement) error {
	broken, err := s.record(ctx, s.pool, outbox.UUID{}, &Progress{Epoch: epoch}, outcomes, &next)
	if err != nil {
		return err
	}
	for i := range broken {
		if broken[i].Suspended {
			return &broken[i]
		}
	}
	return nil
}
