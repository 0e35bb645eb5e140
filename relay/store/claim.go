package store

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// putOff is how long deliveries of a tenant that cannot be read sleep before they are looked at again.
const putOff = time.Minute

// Claimed is a delivery taken from the retry queue, with its endpoint as it is now.
type Claimed struct {
	Delivery
	Endpoint delivery.EndpointRow
	// Event is there in place of Message where the row does not keep the body, since it was delivered once: it is to be made anew.
	Event *outbox.Event
}

// ClaimOptions bound a claim.
type ClaimOptions struct {
	N     int           // deliveries, without those that follow the first of an ordered key
	Run   int           // deliveries of one ordered key, the first one included
	Lease time.Duration // how long they are the owner's
	// Caps is for endpoints that can take only so many of N now; 0: none. The others can take any number.
	Caps map[outbox.UUID]int
	// Tenants are those whose deliveries may be claimed; nil: all.
	Tenants []string
	// Bytes is about how much of bodies is loaded at most; what exceeds it goes back. Zero: no bound. The first delivery always fits.
	Bytes int64
}

// claimDue takes what is due, past rows that another replica is taking at this moment. A row whose lease has run out is due like any other.
//
// Of what is looked at every endpoint gets its first before any gets its second: a long backlog of one does not keep the others out. Of an ordered key only
// the head is taken, and with it the rows behind it, up to the first that somebody else holds, or that events still to be queued from the tables will come
// in front of.
const claimDue = `
WITH RECURSIVE {looked},
ranked AS (
  SELECT q.*, row_number() OVER (PARTITION BY q.endpoint_id ORDER BY q.due_at) AS rank FROM looked q
  WHERE q.endpoint_id <> ALL($4::uuid[]) AND ($8::text[] IS NULL OR q.tenant = ANY($8::text[])) AND (q.order_key IS NULL OR NOT EXISTS ` + behind + `)),
chosen AS MATERIALIZED (
  SELECT r.delivery_id, r.rank FROM ranked r LEFT JOIN unnest($5::uuid[], $6::int4[]) AS cap (endpoint_id, n) USING (endpoint_id)
  WHERE cap.n IS NULL OR r.rank <= cap.n),
head AS MATERIALIZED (
  SELECT q.delivery_id, q.endpoint_id, q.order_key, q.order_lsn, q.order_n,
    CASE WHEN q.order_key IS NOT NULL THEN outbox_relay.filling_place(q.tenant) END AS filling FROM chosen c JOIN outbox_relay.retry_queue q USING (delivery_id)
  WHERE q.delivery_id = ANY(ARRAY(SELECT c.delivery_id FROM chosen c)) AND q.due_at <= now() ORDER BY c.rank, q.due_at LIMIT $2::int4 FOR UPDATE OF q SKIP LOCKED),
follower AS MATERIALIZED (
  SELECT h.delivery_id AS head, n.delivery_id, n.nr FROM head h CROSS JOIN LATERAL (
    SELECT q.delivery_id, row_number() OVER (ORDER BY q.order_lsn, q.order_n, q.delivery_id) AS nr FROM outbox_relay.retry_queue q
    WHERE q.endpoint_id = h.endpoint_id AND q.order_key = h.order_key
      AND (q.order_lsn, q.order_n, q.delivery_id) > (h.order_lsn, h.order_n, h.delivery_id) AND (q.order_lsn <= h.filling) IS NOT FALSE
    ORDER BY q.order_lsn, q.order_n, q.delivery_id LIMIT $7::int4 - 1) n
  WHERE h.order_key IS NOT NULL),
held AS MATERIALIZED (
  SELECT q.delivery_id FROM outbox_relay.retry_queue q
  WHERE q.delivery_id = ANY(ARRAY(SELECT f.delivery_id FROM follower f)) AND (q.leased_by IS NULL OR q.due_at <= now()) FOR UPDATE SKIP LOCKED),
run AS (
  SELECT f.delivery_id, bool_and(held.delivery_id IS NOT NULL) OVER (PARTITION BY f.head ORDER BY f.nr) AS unbroken
  FROM follower f LEFT JOIN held USING (delivery_id)),
taken AS (
  UPDATE outbox_relay.retry_queue q SET due_at = now() + $3::int8 * interval '1 microsecond', leased_by = $1::uuid
  WHERE q.delivery_id = ANY(ARRAY(SELECT h.delivery_id FROM head h UNION ALL SELECT r.delivery_id FROM run r WHERE r.unbroken))
  RETURNING q.tenant, q.delivery_id, q.endpoint_id, q.order_key, q.order_lsn::text, q.order_n, (SELECT t.state FROM outbox_relay.tenants t WHERE t.schema = q.tenant))
SELECT l.n::int4, t.* FROM (SELECT count(*) AS n FROM looked) l LEFT JOIN taken t ON true`

const queueColumns = `q.delivery_id, q.tenant, q.endpoint_id, q.order_key, q.order_lsn, q.order_n, q.due_at`

// What is looked at. Usually that is the longest due, which costs the same whatever else waits. Where these are of endpoints that can take no more now, a
// million of them perhaps, the others are found endpoint by endpoint, each with its part of the look. Its conditions are for the index of both columns: with
// plain ones the planner would walk all that is due in search of one endpoint.
const (
	longestDue = `looked AS MATERIALIZED (
  SELECT ` + queueColumns + ` FROM outbox_relay.retry_queue q WHERE q.due_at <= now() ORDER BY q.due_at LIMIT $2::int4 * 4)`

	dueByEndpoint = `queued AS (
  (SELECT q.endpoint_id, q.tenant FROM outbox_relay.retry_queue q ORDER BY q.endpoint_id LIMIT 1)
  UNION ALL
  SELECT n.* FROM queued CROSS JOIN LATERAL (
    SELECT q.endpoint_id, q.tenant FROM outbox_relay.retry_queue q WHERE q.endpoint_id > queued.endpoint_id ORDER BY q.endpoint_id LIMIT 1) n),
open AS MATERIALIZED (
  SELECT o.endpoint_id FROM queued o WHERE o.endpoint_id <> ALL($4::uuid[]) AND ($8::text[] IS NULL OR o.tenant = ANY($8::text[]))),
looked AS MATERIALIZED (
  SELECT l.* FROM open o CROSS JOIN LATERAL (
    SELECT ` + queueColumns + ` FROM outbox_relay.retry_queue q
    WHERE (q.endpoint_id, q.due_at) > (o.endpoint_id, '-infinity') AND (q.endpoint_id, q.due_at) <= (o.endpoint_id, now())
      AND (q.order_key IS NULL OR NOT EXISTS ` + behind + `)
    ORDER BY q.endpoint_id, q.due_at LIMIT (SELECT greatest($2::int4 * 4 / count(*), 1) FROM open)) l)`
)

// loadClaimed reads bodies up to a number of bytes, those of one key in their order.
const loadClaimed = `
SELECT d.id, d.webhook_event_id, d.webhook_endpoint_id, coalesce(d.request_url, ''), coalesce(d.request_method, ''), coalesce(d.request_headers, '{}')::text,
  CASE WHEN d.before <= $2::int8 THEN d.request_body END, d.before > $2::int8,
  d.delivery_status::text, d.attempt_number::int4, d.replay::int4, e.id IS NOT NULL, ` + endpointColumns + `
FROM (SELECT d.*, coalesce(sum(octet_length(d.request_body)) OVER (ORDER BY q.order_lsn NULLS FIRST, q.order_n, d.id
    ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS before
  FROM {tenant}.webhook_deliveries d LEFT JOIN outbox_relay.retry_queue q ON q.delivery_id = d.id WHERE d.id = ANY($1::uuid[])) d
LEFT JOIN {tenant}.webhook_endpoints e ON e.id = d.webhook_endpoint_id`

const schemaExists = `SELECT EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = $1::text)`

const loadEvents = `SELECT ` + eventColumns + ` FROM {tenant}.webhook_events e WHERE e.id = ANY($1::uuid[])`

// mine locks which of $2 are leased to $1, in one order for everybody.
const mine = `(SELECT l.delivery_id FROM outbox_relay.retry_queue l
WHERE l.delivery_id = ANY($2::uuid[]) AND l.leased_by = $1::uuid ORDER BY 1 FOR UPDATE) mine WHERE q.delivery_id = mine.delivery_id`

const (
	giveBack = `UPDATE outbox_relay.retry_queue q SET due_at = coalesce(now() + $3::int8 * interval '1 microsecond', 'infinity'), leased_by = NULL FROM ` + mine
	// What is locked is being recorded: its lease is over. Waiting for it, tenant by tenant in another order, could deadlock.
	renew = `UPDATE outbox_relay.retry_queue q SET due_at = now() + $3::int8 * interval '1 microsecond'
FROM (SELECT l.delivery_id FROM outbox_relay.retry_queue l WHERE l.delivery_id = ANY($2::uuid[]) AND l.leased_by = $1::uuid FOR UPDATE SKIP LOCKED) mine
WHERE q.delivery_id = mine.delivery_id RETURNING q.delivery_id`
	drop   = `DELETE FROM outbox_relay.retry_queue q USING ` + mine
	cancel = `UPDATE {tenant}.webhook_deliveries w SET delivery_status = 'cancelled', next_retry_at = NULL, completed_at = now(),
  error_code = '` + codeCancelled + `', error_message = $2::text
WHERE w.id = ANY($1::uuid[]) AND w.delivery_status IN ('pending', 'retrying')`
)

// Claim takes due deliveries out of the retry queue under a lease: until it runs out nobody else gets them. Those of one ordered key come in
// their order. more tells that there may be others due. A tenant that is not active or cannot be read, and a delivery that cannot be made any
// more, are dealt with here and logged. The error is one of the database as a whole; what had been claimed by then becomes due again when its
// lease runs out.
func (s *Store) Claim(ctx context.Context, owner outbox.UUID, o ClaimOptions) (claimed []Claimed, more bool, err error) {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("claim deliveries: %w", err)
	}
	defer conn.Release()
	c := claimer{conn: conn.Conn(), owner: owner, groups: make(map[string]*claimedTenant), of: make(map[outbox.UUID]int)}
	looked, err := c.claim(ctx, o, longestDue)
	if more = looked >= 4*o.N; err == nil && more && c.n < o.N {
		_, err = c.claim(ctx, o, dueByEndpoint)
		more = false // unless there are as many as were asked for
	}
	if err != nil {
		return nil, false, fmt.Errorf("claim deliveries: %w", err)
	}
	if claimed, err = c.load(ctx); err != nil {
		return nil, false, fmt.Errorf("load %d claimed deliveries: %w", c.n, err)
	}
	if err := c.clean(ctx); err != nil {
		return nil, false, fmt.Errorf("give back claimed deliveries: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(c.groups)) {
		g := c.groups[name]
		if g.err != nil {
			s.log.WarnContext(ctx, "deliveries put off: the tenant cannot be read", "tenant", name, "deliveries", len(g.putOff), "error", g.err)
		}
		for reason, ids := range g.dropped {
			s.log.WarnContext(ctx, "deliveries taken out of the retry queue", "tenant", name, "deliveries", len(ids), "reason", reason)
		}
	}
	return claimed, more || c.n >= o.N, nil
}

// Renew makes leases of the owner's run until lease from now and returns those that do. The others are lost, or their outcomes are being recorded.
func (s *Store) Renew(ctx context.Context, owner outbox.UUID, ids []outbox.UUID, lease time.Duration) ([]outbox.UUID, error) {
	rows, err := s.pool.Query(ctx, renew, owner, ids, lease.Microseconds())
	if err != nil {
		return nil, fmt.Errorf("renew %d leases: %w", len(ids), err)
	}
	renewed, err := pgx.CollectRows(rows, pgx.RowTo[outbox.UUID])
	if err != nil {
		return nil, fmt.Errorf("renew %d leases: %w", len(ids), err)
	}
	return renewed, nil
}

// A claimer claims one batch on one connection.
type claimer struct {
	conn   *pgx.Conn
	owner  outbox.UUID
	n      int                 // deliveries claimed
	of     map[outbox.UUID]int // these by endpoint
	budget int64               // of bodies, for each tenant; zero: no bound
	groups map[string]*claimedTenant
}

// claimedTenant is what was claimed of one tenant, and what becomes of it unless it is attempted.
type claimedTenant struct {
	ids     []outbox.UUID
	places  map[outbox.UUID]Place
	rows    []Claimed
	tooMuch []outbox.UUID            // more than is loaded at once
	parked  []outbox.UUID            // of a tenant that takes none now
	putOff  []outbox.UUID            // of a tenant that cannot be read
	dropped map[string][]outbox.UUID // by reason
	err     error
}

// claim claims up to what is left of o.N, of what a look finds, and returns how much that was.
func (c *claimer) claim(ctx context.Context, o ClaimOptions, look string) (looked int, err error) {
	none, capped, caps := []outbox.UUID{}, []outbox.UUID{}, []int32{}
	for id, n := range o.Caps {
		if n -= c.of[id]; n <= 0 {
			none = append(none, id)
		} else {
			capped, caps = append(capped, id), append(caps, int32(n)) //nolint:gosec // no more than a window
		}
	}
	rows, err := c.conn.Query(ctx, strings.Replace(claimDue, "{looked}", look, 1),
		c.owner, o.N-c.n, o.Lease.Microseconds(), none, capped, caps, max(o.Run, 1), o.Tenants)
	if err != nil {
		return 0, err
	}
	var (
		tenant, lsn, state *string
		id, endpoint, key  outbox.UUID
		n                  *int32
	)
	_, err = pgx.ForEachRow(rows, []any{&looked, &tenant, &id, &endpoint, &key, &lsn, &n, &state}, func() error {
		if tenant == nil {
			return nil // nothing was taken
		}
		g := c.groups[*tenant]
		if g == nil {
			g = &claimedTenant{places: make(map[outbox.UUID]Place), dropped: make(map[string][]outbox.UUID)}
			c.groups[*tenant] = g
		}
		c.n++
		c.of[endpoint]++
		if lsn != nil && n != nil {
			at, err := pglogrepl.ParseLSN(*lsn)
			if err != nil {
				return err
			}
			g.places[id] = Place{key, at, *n}
		}
		switch {
		case state == nil:
			g.drop(id, "the tenant is not registered any more")
		case *state != StateActive:
			g.parked = append(g.parked, id)
		default:
			g.ids = append(g.ids, id)
		}
		return nil
	})
	c.budget = o.Bytes / int64(max(len(c.groups), 1))
	return looked, err
}

// load reads the deliveries of all tenants in one pipeline, or, if that has an error, tenant by tenant.
func (c *claimer) load(ctx context.Context) ([]Claimed, error) {
	var names []string
	for name, g := range c.groups {
		if len(g.ids) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
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
		b.Queue(forTenant(loadClaimed, name), g.ids, cmp.Or(c.budget, math.MaxInt64)).Query(func(rows pgx.Rows) error { return g.collect(rows, name) })
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
		e, err := scanEvent(rows)
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
	g.rows, g.tooMuch, g.dropped = nil, nil, make(map[string][]outbox.UUID)
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
		)
		fields := append([]any{&d.ID, &d.EventID, &d.EndpointID, &d.URL, &d.Method, &headers, &body, &over, &status, &attempts, &d.Replay, &exists},
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
