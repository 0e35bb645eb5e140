package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// The order of the retry queue. Of the rows with one (lane, order_key) the first by (order_lsn, order_n, delivery_id) is the head; all
// others are parked. Two transactions must not arrange the rows of one endpoint at the same time: the one that takes the head away would not see
// the row that the other parks behind it, and nobody would ever wake that. So whoever does one or the other locks the endpoint first, in one
// order for everybody. The SQL functions of the schema package take the same lock.

// lockOrder takes the locks in the order of their numbers: a set-returning function in FROM is scanned as it comes.
const lockOrder = `
SELECT pg_catalog.pg_advisory_xact_lock(s.h)
FROM (SELECT DISTINCT pg_catalog.hashtextextended(outbox_relay.lane(u.t, u.e)::text, ` + lockEndpoint + `) AS h
  FROM unnest($1::text[], $2::uuid[]) AS u (t, e) ORDER BY 1 OFFSET 0) s`

const behind = `(SELECT FROM outbox_relay.retry_queue h WHERE h.lane = q.lane AND h.order_key = q.order_key
    AND (h.order_lsn, h.order_n, h.delivery_id) < (q.order_lsn, q.order_n, q.delivery_id))`

// parkRows parks those of the rows just written that are not the head of their key, and the row that each of them has come in front of: it may
// have been the head. A new head ($2) that has come in front of one in flight waits for that. (IS TRUE keeps the condition from being a reason to go through
// all that has a key, where the server has counted none.)
const parkRows = `
WITH pushed AS MATERIALIZED (
  SELECT n.delivery_id FROM outbox_relay.retry_queue r CROSS JOIN LATERAL (
    SELECT n.delivery_id FROM outbox_relay.retry_queue n
    WHERE n.lane = r.lane AND n.order_key = r.order_key AND (n.order_lsn, n.order_n, n.delivery_id) > (r.order_lsn, r.order_n, r.delivery_id)
    ORDER BY n.order_lsn, n.order_n, n.delivery_id LIMIT 1) n
  WHERE r.delivery_id = ANY($1::uuid[]))
UPDATE outbox_relay.retry_queue q SET due_at = 'infinity'
WHERE q.delivery_id = ANY($1::uuid[] || ARRAY(SELECT p.delivery_id FROM pushed p)) AND q.leased_by IS NULL
  AND (q.due_at < 'infinity') IS TRUE AND (EXISTS ` + behind + ` OR q.delivery_id = ANY($2::uuid[]) AND outbox_relay.in_flight(q.lane, q.order_key)) IS TRUE`

// The keys of an endpoint are found one after the other, each by a look into the index: one may have a million rows.
const orderedEndpoints = `
WITH RECURSIVE l AS (
  (SELECT q.lane, q.tenant, q.endpoint_id FROM outbox_relay.retry_queue q WHERE q.order_key IS NOT NULL ORDER BY q.lane LIMIT 1)
  UNION ALL
  SELECT n.lane, n.tenant, n.endpoint_id FROM l CROSS JOIN LATERAL (
    SELECT q.lane, q.tenant, q.endpoint_id FROM outbox_relay.retry_queue q
    WHERE q.order_key IS NOT NULL AND q.lane > l.lane ORDER BY q.lane LIMIT 1) n)
SELECT l.tenant, l.endpoint_id FROM l WHERE l.tenant = ANY($1::text[])`

const blockedKeys = `
SELECT ARRAY(
  WITH RECURSIVE k AS (
    (SELECT q.order_key FROM outbox_relay.retry_queue q WHERE q.lane = u.lane AND q.order_key IS NOT NULL ORDER BY q.order_key LIMIT 1)
    UNION ALL
    SELECT n.order_key FROM k CROSS JOIN LATERAL (
      SELECT q.order_key FROM outbox_relay.retry_queue q WHERE q.lane = u.lane AND q.order_key > k.order_key ORDER BY q.order_key LIMIT 1) n)
  SELECT k.order_key FROM k LIMIT $3::int8)
FROM (SELECT u.i, outbox_relay.lane(u.t, u.e) AS lane FROM unnest($1::text[], $2::uuid[]) WITH ORDINALITY AS u (t, e, i) OFFSET 0) u
ORDER BY u.i`

// wakeNext makes the heads of keys due after those before them have gone.
const wakeNext = `SELECT outbox_relay.wake_next($1::text, $2::uuid[], $3::uuid[])`

// ordered lists the endpoints whose rows in the queue the batches rearrange.
func ordered(batches ...tenantBatch) (tenants []string, endpoints []outbox.UUID) {
	for i := range batches {
		from := len(endpoints) // of this tenant
		for _, o := range batches[i].outcomes {
			d := o.Delivery
			if d.Order.Key.IsZero() || o.Status == Success && !d.Queued || slices.Contains(endpoints[from:], d.EndpointID) {
				continue
			}
			tenants, endpoints = append(tenants, d.Tenant), append(endpoints, d.EndpointID)
		}
	}
	return tenants, endpoints
}

// arrange returns the statements that keep the order of the queue after the outcomes of a tenant have been written.
func arrange(tenant string, first, won, later []*Outcome) []statement {
	var rows, fresh, endpoints, keys []outbox.UUID
	for i, list := range [][]*Outcome{first, won, later} {
		for _, o := range list {
			d := o.Delivery
			if d.Order.Key.IsZero() || o.Status == Leased { // the head, and nobody else's
				continue
			}
			again := o.Status == Retrying || o.Status == Pending
			if again {
				rows = append(rows, d.ID)
			}
			switch {
			case i == 0 && o.Status == Pending:
				fresh = append(fresh, d.ID)
			case i > 0, !again: // it was in flight, and one before it may have waited for that
				endpoints, keys = append(endpoints, d.EndpointID), append(keys, d.Order.Key)
			}
		}
	}
	var list []statement
	if len(rows) > 0 {
		list = append(list, statement{sql: parkRows, args: []any{rows, fresh}})
	}
	if len(keys) > 0 {
		list = append(list, statement{sql: wakeNext, args: []any{tenant, endpoints, keys}})
	}
	return list
}

// OrderedEndpoints lists the endpoints of the tenants that have rows with a key in the retry queue.
func (s *Store) OrderedEndpoints(ctx context.Context, tenants []string) ([]Endpoint, error) {
	rows, err := s.pool.Query(ctx, orderedEndpoints, tenants)
	if err != nil {
		return nil, fmt.Errorf("list ordered endpoints: %w", err)
	}
	endpoints, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e Endpoint, err error) {
		return e, row.Scan(&e.Tenant, &e.ID)
	})
	if err != nil {
		return nil, fmt.Errorf("list ordered endpoints: %w", err)
	}
	return endpoints, nil
}

// Blocked lists the keys of the endpoints that have rows in the retry queue, of those with no more than most keys, and the endpoints that have more.
func (s *Store) Blocked(ctx context.Context, endpoints []Endpoint, most int) (keys []OrderedKey, more []Endpoint, err error) {
	tenants, ids := make([]string, len(endpoints)), make([]outbox.UUID, len(endpoints))
	for i, e := range endpoints {
		tenants[i], ids[i] = e.Tenant, e.ID
	}
	rows, err := s.pool.Query(ctx, blockedKeys, tenants, ids, most+1)
	if err != nil {
		return nil, nil, fmt.Errorf("list ordered keys: %w", err)
	}
	rest := endpoints
	var own []outbox.UUID
	if _, err := pgx.ForEachRow(rows, []any{&own}, func() error {
		e := rest[0]
		rest = rest[1:]
		if len(own) > most {
			more = append(more, e)
			return nil
		}
		for _, key := range own {
			keys = append(keys, OrderedKey{Tenant: e.Tenant, Endpoint: e.ID, Key: key})
		}
		return nil
	}); err != nil {
		return nil, nil, fmt.Errorf("list ordered keys: %w", err)
	}
	return keys, more, nil
}

// StillBlocked tells of each key whether it has rows in the retry queue, or may have some once all is queued that its tenant has missed.
func (s *Store) StillBlocked(ctx context.Context, keys []OrderedKey) ([]bool, error) {
	tenants, endpoints, ids := make([]string, len(keys)), make([]outbox.UUID, len(keys)), make([]outbox.UUID, len(keys))
	for i, k := range keys {
		tenants[i], endpoints[i], ids[i] = k.Tenant, k.Endpoint, k.Key
	}
	rows, err := s.pool.Query(ctx, `
SELECT EXISTS (SELECT FROM outbox_relay.retry_queue q WHERE q.lane = outbox_relay.lane(k.t, k.e) AND q.order_key = k.k)
  OR EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.schema = k.t AND (t.state = 'suspended' OR t.backfill IS NOT NULL AND t.backfill_done_at IS NULL))
FROM unnest($1::text[], $2::uuid[], $3::uuid[]) WITH ORDINALITY AS k (t, e, k, i) ORDER BY k.i`, tenants, endpoints, ids)
	if err != nil {
		return nil, fmt.Errorf("look up ordered keys: %w", err)
	}
	still, err := pgx.CollectRows(rows, pgx.RowTo[bool])
	if err != nil {
		return nil, fmt.Errorf("look up ordered keys: %w", err)
	}
	return still, nil
}

// forgetDisabled clears what was said of an endpoint that has been made active again by hand.
const forgetDisabled = `
UPDATE {tenant}.webhook_endpoints e SET disabled_reason = NULL, disabled_at = NULL
WHERE e.id = $1::uuid AND e.is_active AND (e.disabled_reason IS NOT NULL OR e.disabled_at IS NOT NULL)`

// wakePart is how many rows outbox_relay.wake makes due at once.
const wakePart = 20_000

// Wake makes deliveries due that are parked for an endpoint which takes them again, at random times within the given one. more tells that there may be others:
// call it again.
func (s *Store) Wake(ctx context.Context, tenant string, endpoint outbox.UUID, within time.Duration) (more bool, err error) {
	var n int64
	err = s.pool.QueryRow(ctx, `SELECT outbox_relay.wake($1::text, $2::uuid, $3::int8 * interval '1 microsecond')`, tenant, endpoint, within.Microseconds()).Scan(&n)
	if err == nil {
		_, err = s.pool.Exec(ctx, forTenant(forgetDisabled, tenant), endpoint)
	}
	if err != nil && !isTenants(err) {
		return false, fmt.Errorf("wake deliveries: %w", err)
	}
	return n >= wakePart, nil
}

// WakeParkedHeads makes due what is parked and waits for nothing: of endpoints that take deliveries, rows without an order and first rows of
// their key. It looks at a part of the queue, from a place on, which is the zero value at first, and returns the place of the next; zero: that was the last.
func (s *Store) WakeParkedHeads(ctx context.Context, place outbox.UUID) (next outbox.UUID, woken int64, err error) {
	if err := s.pool.QueryRow(ctx, `SELECT w.place, w.woken FROM outbox_relay.wake_parked_heads($1::uuid) w`, place).Scan(&next, &woken); err != nil {
		return outbox.UUID{}, 0, fmt.Errorf("wake parked deliveries: %w", err)
	}
	return next, woken, nil
}
