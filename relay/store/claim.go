package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// putOff is how long deliveries of a tenant that is not active, or cannot be read, sleep before they are looked at again.
const putOff = time.Minute

// Claimed is a delivery taken from the retry queue, with its endpoint as it is now.
type Claimed struct {
	Delivery
	Endpoint delivery.EndpointRow
}

// claimDue takes what is due, oldest first, past rows that another replica is taking at this moment. A row whose lease has run out is
// due like any other.
const claimDue = `
WITH due AS MATERIALIZED (
  SELECT q.delivery_id FROM outbox_relay.retry_queue q
  WHERE q.due_at <= now() AND q.endpoint_id <> ALL($4::uuid[]) ORDER BY q.due_at LIMIT $2::int4 FOR UPDATE SKIP LOCKED)
UPDATE outbox_relay.retry_queue q SET due_at = now() + $3::int8 * interval '1 microsecond', leased_by = $1::uuid
FROM due WHERE q.delivery_id = due.delivery_id
RETURNING q.tenant, q.delivery_id, (SELECT t.state FROM outbox_relay.tenants t WHERE t.schema = q.tenant)`

const loadClaimed = `
SELECT d.id, d.webhook_event_id, d.webhook_endpoint_id, d.request_url, d.request_method, d.request_headers::text, d.request_body,
  d.delivery_status::text, d.attempt_number::int4, e.id IS NOT NULL, ` + endpointColumns + `
FROM {tenant}.webhook_deliveries d LEFT JOIN {tenant}.webhook_endpoints e ON e.id = d.webhook_endpoint_id
WHERE d.id = ANY($1::uuid[])`

// mine locks which of $2 are leased to $1, in one order for everybody.
const mine = `(SELECT l.delivery_id FROM outbox_relay.retry_queue l
WHERE l.delivery_id = ANY($2::uuid[]) AND l.leased_by = $1::uuid ORDER BY 1 FOR UPDATE) mine WHERE q.delivery_id = mine.delivery_id`

const (
	giveBack = `UPDATE outbox_relay.retry_queue q SET due_at = now() + $3::int8 * interval '1 microsecond', leased_by = NULL FROM ` + mine
	// What is locked is being recorded: its lease is over. Waiting for it, tenant by tenant in another order, could deadlock.
	renew = `UPDATE outbox_relay.retry_queue q SET due_at = now() + $3::int8 * interval '1 microsecond'
FROM (SELECT l.delivery_id FROM outbox_relay.retry_queue l WHERE l.delivery_id = ANY($2::uuid[]) AND l.leased_by = $1::uuid FOR UPDATE SKIP LOCKED) mine
WHERE q.delivery_id = mine.delivery_id`
	drop   = `DELETE FROM outbox_relay.retry_queue q USING ` + mine
	cancel = `UPDATE {tenant}.webhook_deliveries w SET delivery_status = 'cancelled', next_retry_at = NULL, completed_at = now(),
  error_code = '` + codeCancelled + `', error_message = $2::text
WHERE w.id = ANY($1::uuid[]) AND w.delivery_status IN ('pending', 'retrying')`
)

// Claim takes up to n due deliveries out of the retry queue, oldest first, under a lease: until it runs out nobody else gets them.
// Endpoints in busy are passed over. A tenant that is not active or cannot be read, and a delivery that cannot be made any more, are
// dealt with here and logged; so fewer than n do not mean that nothing is left. The error is one of the database as a whole; what
// had been claimed by then becomes due again when its lease runs out.
func (s *Store) Claim(ctx context.Context, owner outbox.UUID, n int, lease time.Duration, busy []outbox.UUID) ([]Claimed, error) {
	if busy == nil {
		busy = []outbox.UUID{}
	}
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("claim deliveries: %w", err)
	}
	defer conn.Release()
	c := claimer{conn: conn.Conn(), owner: owner, groups: make(map[string]*claimedTenant)}
	if err := c.claim(ctx, n, lease, busy); err != nil {
		return nil, fmt.Errorf("claim deliveries: %w", err)
	}
	claimed, err := c.load(ctx)
	if err != nil {
		return nil, fmt.Errorf("load %d claimed deliveries: %w", c.n, err)
	}
	if err := c.clean(ctx); err != nil {
		return nil, fmt.Errorf("give back claimed deliveries: %w", err)
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
	return claimed, nil
}

// Release gives leases of the owner's back: what is still leased to it is due at once.
func (s *Store) Release(ctx context.Context, owner outbox.UUID, ids []outbox.UUID) error {
	if _, err := s.pool.Exec(ctx, giveBack, owner, ids, int64(0)); err != nil {
		return fmt.Errorf("release %d leases: %w", len(ids), err)
	}
	return nil
}

// Renew makes leases of the owner's run until lease from now. Those it has lost already stay lost.
func (s *Store) Renew(ctx context.Context, owner outbox.UUID, ids []outbox.UUID, lease time.Duration) error {
	if _, err := s.pool.Exec(ctx, renew, owner, ids, lease.Microseconds()); err != nil {
		return fmt.Errorf("renew %d leases: %w", len(ids), err)
	}
	return nil
}

// NextDue tells in how long the first delivery of the retry queue is due, leases included; zero or less if one is due already. It
// returns false if the queue is empty.
func (s *Store) NextDue(ctx context.Context) (time.Duration, bool, error) {
	var micros *int64
	err := s.pool.QueryRow(ctx, `SELECT (extract(epoch FROM min(q.due_at) - now()) * 1e6)::int8 FROM outbox_relay.retry_queue q`).Scan(&micros)
	if err != nil {
		return 0, false, fmt.Errorf("read next due time: %w", err)
	}
	if micros == nil {
		return 0, false, nil
	}
	return time.Duration(*micros) * time.Microsecond, true, nil
}

// A claimer claims one batch on one connection.
type claimer struct {
	conn   *pgx.Conn
	owner  outbox.UUID
	n      int
	groups map[string]*claimedTenant
}

// claimedTenant is what was claimed of one tenant, and what becomes of it unless it is attempted.
type claimedTenant struct {
	ids     []outbox.UUID
	rows    []Claimed
	putOff  []outbox.UUID
	dropped map[string][]outbox.UUID // by reason
	err     error
}

func (c *claimer) claim(ctx context.Context, n int, lease time.Duration, busy []outbox.UUID) error {
	rows, err := c.conn.Query(ctx, claimDue, c.owner, n, lease.Microseconds(), busy)
	if err != nil {
		return err
	}
	var (
		tenant string
		id     outbox.UUID
		state  *string
	)
	_, err = pgx.ForEachRow(rows, []any{&tenant, &id, &state}, func() error {
		g := c.groups[tenant]
		if g == nil {
			g = &claimedTenant{dropped: make(map[string][]outbox.UUID)}
			c.groups[tenant] = g
		}
		c.n++
		switch {
		case state == nil:
			g.drop(id, "the tenant is not registered any more")
		case *state != StateActive:
			g.putOff = append(g.putOff, id)
		default:
			g.ids = append(g.ids, id)
		}
		return nil
	})
	return err
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
	return all, nil
}

func (c *claimer) loadAlone(ctx context.Context, name string) error {
	err := c.loadTenants(ctx, []string{name})
	if err == nil || !isTenants(err) {
		return err
	}
	g := c.groups[name]
	g.rows, g.dropped = nil, make(map[string][]outbox.UUID)
	if code(err) != codeUndefinedTable {
		g.err, g.putOff = err, g.ids
		return nil
	}
	for _, id := range g.ids {
		g.drop(id, "the tenant's tables are gone")
	}
	return nil
}

func (c *claimer) loadTenants(ctx context.Context, names []string) error {
	b := &pgx.Batch{}
	for _, name := range names {
		g := c.groups[name]
		b.Queue(forTenant(loadClaimed, name), g.ids).Query(func(rows pgx.Rows) error { return g.collect(rows, name) })
	}
	return c.conn.SendBatch(ctx, b).Close()
}

// collect reads the rows of one tenant and sorts out those that cannot be attempted.
func (g *claimedTenant) collect(rows pgx.Rows, tenant string) error {
	g.rows, g.dropped = nil, make(map[string][]outbox.UUID)
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
			exists          bool
		)
		fields := append([]any{&d.ID, &d.EventID, &d.EndpointID, &d.URL, &d.Method, &headers, &body, &status, &attempts, &exists},
			endpointFields(&cl.Endpoint)...)
		if err := rows.Scan(fields...); err != nil {
			return err
		}
		delete(missing, d.ID)
		if status == "retrying" {
			d.Attempts = int(attempts)
		}
		switch {
		case status != "pending" && status != "retrying":
			g.drop(d.ID, "the delivery has ended: "+status)
		case !exists:
			g.drop(d.ID, "the endpoint is gone")
		case body == nil:
			g.drop(d.ID, "the request body is gone")
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
	var putOffs, drops []outbox.UUID
	for name, g := range c.groups {
		putOffs = append(putOffs, g.putOff...)
		for reason, ids := range g.dropped {
			drops = append(drops, ids...)
			// The row may be gone with its table, or out of our reach: then there is nothing to be said in it.
			if _, err := c.conn.Exec(ctx, forTenant(cancel, name), ids, text(reason)); err != nil && !isTenants(err) {
				return err
			}
		}
	}
	var errs []error
	if len(putOffs) > 0 {
		_, err := c.conn.Exec(ctx, giveBack, c.owner, putOffs, putOff.Microseconds())
		errs = append(errs, err)
	}
	if len(drops) > 0 {
		_, err := c.conn.Exec(ctx, drop, c.owner, drops)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
