package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// loadClaimed reads bodies up to a number of bytes ($2), those of one key in their order; $4: the first in any case. Where the body is not kept, the event
// it is made of counts. An endpoint that is not there may be of a transaction that the log has brought and nobody else sees yet: it is older than the one that wrote
// the delivery, so that it is gone once none of those is under way. A day after it was written it is gone in any case: what is two thousand million transactions
// old is younger than all to age.
const loadClaimed = `
SELECT d.id, d.webhook_event_id, d.webhook_endpoint_id, coalesce(d.request_url, ''), coalesce(d.request_method, ''), coalesce(d.request_headers, '{}')::text,
  CASE WHEN NOT d.over THEN d.request_body END, d.over,
  d.delivery_status::text, d.attempt_number::int4, d.replay::int4, e.id IS NOT NULL,
  age(d.written) <= age(pg_snapshot_xmin(pg_current_snapshot())::xid) AND coalesce(d.created_at::timestamptz > now() - interval '1 day', true), ` + verifiedOnly + `, ` + endpointColumns + `
FROM (SELECT d.*, sum(d.size) OVER place > $2::int8 AND NOT ($4::bool AND row_number() OVER place = 1) AS over
  FROM (SELECT d.*, d.xmin AS written, q.order_lsn, q.order_n, coalesce(octet_length(d.request_body), (
      SELECT octet_length(coalesce(e.event_data::text, '')) + octet_length(coalesce(e.event_metadata::text, '')) FROM {tenant}.webhook_events e WHERE e.id = d.webhook_event_id), 0) AS size
    FROM {tenant}.webhook_deliveries d LEFT JOIN outbox_relay.retry_queue q ON q.delivery_id = d.id WHERE d.id = ANY($1::uuid[])) d
  WINDOW place AS (ORDER BY d.order_lsn NULLS FIRST, d.order_n, d.id ROWS UNBOUNDED PRECEDING)) d
LEFT JOIN {tenant}.webhook_endpoints e ON e.id = d.webhook_endpoint_id` + verificationOf + `$3::text`

// verifiedOnly tells whether the event is of a type that goes to verified endpoints only. Where there is no such type, no event is looked up.
const verifiedOnly = `CASE WHEN (SELECT EXISTS (SELECT FROM {tenant}.webhook_event_types t WHERE t.requires_verification)) THEN
    EXISTS (SELECT FROM {tenant}.webhook_events o JOIN {tenant}.webhook_event_types t ON t.event_type = o.event_type
      WHERE o.id = d.webhook_event_id AND t.requires_verification) ELSE false END`

// standing has those of $1 that are still leased to $2, if their tenant takes deliveries, with their endpoints as they are now.
const standing = `SELECT q.delivery_id, ` + endpointColumns + `
FROM outbox_relay.retry_queue q JOIN outbox_relay.tenants t ON t.schema = q.tenant AND t.state = 'active'
JOIN {tenant}.webhook_endpoints e ON e.id = q.endpoint_id` + verificationOf + `q.tenant
WHERE q.delivery_id = ANY($1::uuid[]) AND q.leased_by = $2::uuid`

// Standing reads again what some claimed deliveries of a tenant were judged by: the row of the endpoint of each. One that is not the owner's any more, or whose
// endpoint is gone, or whose tenant takes no deliveries, is not among them. An error of the tenant's own is a *TenantError.
func (s *Store) Standing(ctx context.Context, owner outbox.UUID, tenant string, deliveries []outbox.UUID) (map[outbox.UUID]delivery.EndpointRow, error) {
	rows, _ := s.pool.Query(ctx, forTenant(standing, tenant), deliveries, owner)
	found := make(map[outbox.UUID]delivery.EndpointRow, len(deliveries))
	var id outbox.UUID
	var e delivery.EndpointRow
	_, err := pgx.ForEachRow(rows, append([]any{&id}, endpointFields(&e)...), func() error {
		found[id] = e
		e = delivery.EndpointRow{} // it keeps slices
		return nil
	})
	if isTenants(err) {
		return nil, &TenantError{Tenant: tenant, Err: err}
	}
	return found, wrap(err, "read claimed deliveries again")
}

const schemaExists = `SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = $1::text)`

const loadEvents = `SELECT ` + EventColumns + ` FROM {tenant}.webhook_events e WHERE e.id = ANY($1::uuid[])`

// load reads the deliveries of all tenants in one pipeline, or, if that has an error, tenant by tenant.
func (c *claimer) load(ctx context.Context) ([]Claimed, error) {
	var names []string
	for name, g := range c.groups {
		if len(g.ids) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	if len(names) > 0 {
		c.first = names[rand.IntN(len(names))] //nolint:gosec // G404: nobody gains from knowing which
	}
	err := c.loadTenants(ctx, names)
	if err != nil && !isTenants(err) {
		return nil, err
	}
	if err != nil {
		for _, name := range names {
			if err := c.loadAlone(ctx, name); err != nil {
				return nil, err
			}
		}
	}
	var all []Claimed
	for _, name := range names {
		all = append(all, c.groups[name].rows...)
	}
	slices.SortStableFunc(all, func(a, b Claimed) int {
		return cmp.Or(cmp.Compare(a.Order.LSN, b.Order.LSN), cmp.Compare(a.Order.N, b.Order.N), bytes.Compare(a.ID[:], b.ID[:]))
	})
	return all, nil
}

func (c *claimer) loadAlone(ctx context.Context, name string) error {
	err := c.loadTenants(ctx, []string{name})
	if err == nil || !isTenants(err) {
		return err
	}
	g := c.groups[name]
	g.rows, g.dropped = nil, make(map[string][]outbox.UUID)
	there := true // a table that is missing may be back in a moment, a schema is not
	if code(err) == codeUndefinedTable {
		if err := c.conn.QueryRow(ctx, schemaExists, name).Scan(&there); err != nil {
			return err
		}
	}
	if there {
		g.err, g.putOff = err, g.ids
		return nil
	}
	for _, id := range g.ids {
		g.drop(id, "the tenant's schema is gone")
	}
	return nil
}

func (c *claimer) loadTenants(ctx context.Context, names []string) error {
	b := &pgx.Batch{}
	for _, name := range names {
		g := c.groups[name]
		b.Queue(forTenant(loadClaimed, name), g.ids, cmp.Or(c.budget, math.MaxInt64), name, name == c.first).Query(func(rows pgx.Rows) error { return g.collect(rows, name) })
	}
	if err := c.conn.SendBatch(ctx, b).Close(); err != nil {
		return err
	}
	for _, name := range names {
		if err := c.loadEvents(ctx, name, c.groups[name]); err != nil {
			return err
		}
	}
	return nil
}

// loadEvents fetches the events of the deliveries whose body is not kept.
func (c *claimer) loadEvents(ctx context.Context, name string, g *claimedTenant) error {
	var ids []outbox.UUID
	for i := range g.rows {
		if g.rows[i].Message == nil {
			ids = append(ids, g.rows[i].EventID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	rows, err := c.conn.Query(ctx, forTenant(loadEvents, name), ids)
	if err != nil {
		return err
	}
	defer rows.Close()
	events := make(map[outbox.UUID]*outbox.Event, len(ids))
	for rows.Next() {
		e, err := ScanEvent(rows)
		if err != nil {
			return err
		}
		events[e.ID] = &e
	}
	kept := g.rows[:0]
	for _, r := range g.rows {
		if r.Message == nil {
			if r.Event = events[r.EventID]; r.Event == nil {
				g.drop(r.ID, "the request body and the event are gone")
				continue
			}
		}
		kept = append(kept, r)
	}
	g.rows = kept
	return rows.Err()
}

// collect reads the rows of one tenant and sorts out those that cannot be attempted.
func (g *claimedTenant) collect(rows pgx.Rows, tenant string) error {
	g.rows, g.tooMuch, g.putOff, g.dropped = nil, nil, nil, make(map[string][]outbox.UUID)
	missing := make(map[outbox.UUID]struct{}, len(g.ids))
	for _, id := range g.ids {
		missing[id] = struct{}{}
	}
	for rows.Next() {
		var (
			cl              = Claimed{Delivery: Delivery{Tenant: tenant, Queued: true}}
			d               = &cl.Delivery
			headers, status string
			body            *string
			attempts        int32
			exists, over    bool
			unsure          bool // whether the endpoint is gone
		)
		fields := append([]any{&d.ID, &d.EventID, &d.EndpointID, &d.URL, &d.Method, &headers, &body, &over, &status, &attempts, &d.Replay, &exists, &unsure, &cl.VerifiedOnly},
			endpointFields(&cl.Endpoint)...)
		if err := rows.Scan(fields...); err != nil {
			return err
		}
		delete(missing, d.ID)
		d.Order = g.places[d.ID]
		if status == "retrying" {
			d.Attempts = int(attempts)
		}
		switch {
		case status != "pending" && status != "retrying":
			g.drop(d.ID, "the delivery has ended: "+status)
		case !exists && unsure:
			g.putOff = append(g.putOff, d.ID)
		case !exists:
			g.drop(d.ID, "the endpoint is gone")
		case over:
			g.tooMuch = append(g.tooMuch, d.ID)
		case body == nil:
			g.rows = append(g.rows, cl)
		default:
			m, err := delivery.ParseMessage(d.EventID, []byte(*body), []byte(headers))
			if err != nil {
				g.drop(d.ID, err.Error())
				continue
			}
			d.Message = &m
			g.rows = append(g.rows, cl)
		}
	}
	if rows.Err() == nil { // or we do not know
		for id := range missing {
			g.drop(id, "the delivery is gone")
		}
	}
	return rows.Err()
}

func (g *claimedTenant) drop(id outbox.UUID, reason string) {
	g.dropped[reason] = append(g.dropped[reason], id)
}

// clean takes what cannot be attempted out of the queue and out of our hands.
func (c *claimer) clean(ctx context.Context) error {
	var tooMuch, parked, putOffs, drops []outbox.UUID
	for name, g := range c.groups {
		tooMuch, parked, putOffs = append(tooMuch, g.tooMuch...), append(parked, g.parked...), append(putOffs, g.putOff...)
		for reason, ids := range g.dropped {
			drops = append(drops, ids...)
			// The row may be gone with its table, or out of our reach: then there is nothing to be said in it.
			if _, err := c.conn.Exec(ctx, forTenant(cancel, name), ids, text(reason)); err != nil && !isTenants(err) {
				return err
			}
		}
	}
	now, later := int64(0), putOff.Microseconds()
	var errs []error
	for _, back := range []struct {
		ids []outbox.UUID
		due *int64 // nil: until the tenant is resumed
	}{{tooMuch, &now}, {parked, nil}, {putOffs, &later}} {
		if len(back.ids) > 0 {
			_, err := c.conn.Exec(ctx, giveBack, c.owner, back.ids, back.due)
			errs = append(errs, err)
		}
	}
	if len(drops) > 0 {
		_, err := c.conn.Exec(ctx, drop, c.owner, drops)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
