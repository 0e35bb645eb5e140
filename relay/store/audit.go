package store

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Range chooses events of a tenant whose handling is over: everything that To shows was recorded before To was saved.
type Range struct {
	Tenant       string
	From, To     Snapshot  // those that To shows and neither From nor the tenant's admission does
	Since, Until time.Time // and of these, those that occurred in between; zero: no bound
}

// Unaccounted is an event with the endpoints that have a delivery of it.
type Unaccounted struct {
	outbox.Event
	Delivered []outbox.UUID
}

// Handled returns the last saved snapshot: what it shows is recorded. The zero value: none has been saved yet.
func (s *Store) Handled(ctx context.Context) (Snapshot, error) {
	var text *string
	err := s.pool.QueryRow(ctx, `SELECT p.snapshot::text FROM outbox_relay.progress p WHERE p.slot = $1::text`, s.slot).Scan(&text)
	if err != nil || text == nil {
		return Snapshot{}, wrap(err, "read the saved snapshot")
	}
	return ParseSnapshot(*text)
}

// inRange is for the parameters of rangeArgs. The comparison of numbers is for the index.
const inRange = `
FROM {tenant}.webhook_events e
WHERE e.xid >= pg_snapshot_xmin($1::text::pg_snapshot) AND NOT pg_visible_in_snapshot(e.xid, $1::text::pg_snapshot)
  AND pg_visible_in_snapshot(e.xid, $2::text::pg_snapshot)
  AND ($3::timestamptz IS NULL OR e.occurred_at >= $3::timestamptz) AND ($4::timestamptz IS NULL OR e.occurred_at < $4::timestamptz)
  AND (e.created_at < $5::timestamptz) IS NOT TRUE`

const noDelivery = `
  AND NOT EXISTS (SELECT FROM {tenant}.webhook_deliveries d WHERE d.relayed AND d.webhook_event_id = e.id)`

func (s *Store) rangeArgs(ctx context.Context, r *Range, more ...any) ([]any, error) {
	var from string
	var own *time.Time
	err := s.pool.QueryRow(ctx, `SELECT (`+later+`)::text, `+OwnSince+`
FROM outbox_relay.tenants t, (SELECT nullif($2::text, '')::pg_snapshot AS snapshot) p WHERE t.schema = $1::text`,
		r.Tenant, r.From.String()).Scan(&from, &own)
	if err != nil {
		return nil, fmt.Errorf("read the admission of tenant %q: %w", r.Tenant, err)
	}
	bound := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	return append([]any{from, r.To.String(), bound(r.Since), bound(r.Until), own}, more...), nil
}

// eventfulBatch is how many tenants Eventful asks about in one statement.
const eventfulBatch = 100

// Eventful returns those of the tenants that have events which to shows and from does not, without those that are to have queued what they missed: the
// recorder may have suspended them a moment ago, which the log has still to tell. It costs a thousand quiet tenants ten statements. A tenant whose table cannot
// be read is among them, as are those that were asked about together with it.
func (s *Store) Eventful(ctx context.Context, tenants []string, from, to Snapshot) ([]string, error) {
	settled, _ := s.pool.Query(ctx, `SELECT t.schema FROM unnest($1::text[]) WITH ORDINALITY u (schema, n) JOIN outbox_relay.tenants t USING (schema)
WHERE t.state = 'active' AND (`+open+`) IS NOT TRUE ORDER BY u.n`, tenants)
	tenants, err := pgx.CollectRows(settled, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("look for tenants with new events: %w", err)
	}
	if from.String() == "" {
		return tenants, nil
	}
	var found []string
	for batch := range slices.Chunk(tenants, eventfulBatch) {
		var sql strings.Builder
		for i, tenant := range batch {
			if i > 0 {
				sql.WriteString(" UNION ALL ")
			}
			fmt.Fprintf(&sql, "(SELECT %d", i)
			sql.WriteString(forTenant(inRange, tenant))
			sql.WriteString(" LIMIT 1)")
		}
		rows, _ := s.pool.Query(ctx, sql.String(), from.String(), to.String(), (*time.Time)(nil), (*time.Time)(nil), (*time.Time)(nil))
		places, err := pgx.CollectRows(rows, pgx.RowTo[int])
		switch {
		case isTenants(err):
			found = append(found, batch...)
		case err != nil:
			return nil, wrap(err, "look for events to audit")
		}
		for _, i := range places {
			found = append(found, batch[i])
		}
	}
	return found, nil
}

// CountEvents counts the events of a range.
func (s *Store) CountEvents(ctx context.Context, r Range) (n int64, err error) {
	args, err := s.rangeArgs(ctx, &r)
	if err != nil {
		return 0, err
	}
	err = s.pool.QueryRow(ctx, forTenant(`SELECT count(*)`+inRange, r.Tenant), args...).Scan(&n)
	return n, tenantFault(err, r.Tenant, "audit events")
}

// UnaccountedTypes lists the types of the events of a range that have no delivery at all: most of them match nothing. all lists those of the others as well.
func (s *Store) UnaccountedTypes(ctx context.Context, r Range, all bool) ([]string, error) {
	args, err := s.rangeArgs(ctx, &r)
	if err != nil {
		return nil, err
	}
	sql := `SELECT DISTINCT coalesce(e.event_type, '')::text` + inRange
	if !all {
		sql += noDelivery
	}
	rows, _ := s.pool.Query(ctx, forTenant(sql, r.Tenant), args...)
	types, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return types, tenantFault(err, r.Tenant, "audit events")
}

// UnaccountedPage reads events of a range that have one of the types and no delivery, or with all whatever they have: n and a few MiB at most, after
// the given id. done tells that there are no more.
func (s *Store) UnaccountedPage(ctx context.Context, r Range, types []string, all bool, after outbox.UUID, n int) (events []Unaccounted, done bool, err error) {
	args, err := s.rangeArgs(ctx, &r, types, after, n)
	if err != nil {
		return nil, false, err
	}
	sql := `SELECT ` + EventColumns + `,
  ARRAY(SELECT d.webhook_endpoint_id FROM {tenant}.webhook_deliveries d WHERE d.relayed AND d.webhook_event_id = e.id)` + inRange
	if !all {
		sql += noDelivery
	}
	rows, err := s.pool.Query(ctx, forTenant(sql+` AND e.event_type = ANY($6::text[]) AND e.id > coalesce($7::uuid, '00000000-0000-0000-0000-000000000000') ORDER BY e.id LIMIT $8::int4`, r.Tenant), args...)
	if err != nil {
		return nil, false, tenantFault(err, r.Tenant, "audit events")
	}
	defer rows.Close()
	size := 0
	for size < pageBytes && rows.Next() {
		var u Unaccounted
		if u.Event, err = ScanEvent(rows, &u.Delivered); err != nil {
			return nil, false, tenantFault(err, r.Tenant, "audit events")
		}
		size += len(u.Data) + len(u.Metadata)
		events = append(events, u)
	}
	rows.Close()
	return events, size < pageBytes && len(events) < n, tenantFault(rows.Err(), r.Tenant, "audit events")
}

// Queue makes pending rows of outcomes, unless they have a row already. A leader gives its epoch: ErrFenced says that it is over. Others give none.
func (s *Store) Queue(ctx context.Context, epoch int64, outcomes []Outcome) error {
	var p *Progress
	if epoch > 0 {
		p = &Progress{Epoch: epoch}
	}
	broken, err := s.record(ctx, s.pool, outbox.UUID{}, p, outcomes, nil)
	if err == nil && len(broken) > 0 {
		return &broken[0]
	}
	return err
}
