package store

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// putOff is how long deliveries of a tenant that cannot be read, or of an endpoint that is not seen yet, sleep before they are looked at again.
const putOff = time.Minute

// Claimed is a delivery taken from the retry queue, with its endpoint as it is now.
type Claimed struct {
	Delivery
	Endpoint delivery.EndpointRow
	// VerifiedOnly says that the event is of a type that goes to verified endpoints only.
	VerifiedOnly bool
	// Event is there in place of Message where the row does not keep the body, since it was delivered once: it is to be made anew.
	Event *outbox.Event
}

// ClaimOptions bound a claim.
type ClaimOptions struct {
	N     int           // deliveries, without those that follow the first of an ordered key
	Run   int           // deliveries of one ordered key, the first one included
	Lease time.Duration // how long they are the owner's
	// Caps is for endpoints that can take only so many of N now; 0: none. The others can take any number.
	Caps map[Endpoint]int
	// Tenants are those whose deliveries may be claimed; nil: all.
	Tenants []string
	// Bytes is about how much of bodies is loaded at most; what exceeds it goes back. Zero: no bound. The first delivery always fits.
	Bytes int64
}

// claimDue takes what is due, past rows that another replica is taking at this moment. A row whose lease has run out is due like any other.
//
// IS TRUE keeps the index on due_at from being used where the row is known: what the server believes to be due, of what it saw an hour ago, is next to nothing, and
// it would go through all that is due by now for each row.
//
// Of what is looked at every endpoint gets its first before any gets its second: a long backlog of one does not keep the others out. Of an ordered key only
// the head is taken, and with it the rows behind it, up to the first that somebody else holds, or that events still to be queued from the tables will come
// in front of.
const claimDue = `
WITH RECURSIVE cap AS MATERIALIZED (SELECT outbox_relay.lane(u.t, u.e) AS lane, u.n FROM unnest($4::text[], $5::uuid[], $6::int4[]) AS u (t, e, n)),
{looked},
ranked AS (
  SELECT q.*, row_number() OVER (PARTITION BY q.lane ORDER BY q.due_at) AS rank FROM looked q
  WHERE ` + notFull + ` AND ($7::text[] IS NULL OR q.tenant = ANY($7::text[])) AND (q.order_key IS NULL OR NOT EXISTS ` + behind + `)),
chosen AS (
  SELECT r.delivery_id FROM ranked r LEFT JOIN cap USING (lane) WHERE cap.n IS NULL OR r.rank <= cap.n ORDER BY r.rank, r.due_at),
head AS MATERIALIZED (
  SELECT h.*, CASE WHEN h.order_key IS NOT NULL THEN outbox_relay.filling_place(h.tenant) END AS filling FROM chosen c CROSS JOIN LATERAL (
    SELECT q.tenant, q.delivery_id, q.lane, q.order_key, q.order_lsn, q.order_n FROM outbox_relay.retry_queue q
    WHERE q.delivery_id = c.delivery_id AND (q.due_at <= now()) IS TRUE FOR UPDATE SKIP LOCKED) h
  LIMIT $2::int4),
follower AS MATERIALIZED (
  SELECT h.delivery_id AS head, n.delivery_id, n.nr FROM head h CROSS JOIN LATERAL (
    SELECT q.delivery_id, row_number() OVER (ORDER BY q.order_lsn, q.order_n, q.delivery_id) AS nr FROM outbox_relay.retry_queue q
    WHERE q.lane = h.lane AND q.order_key = h.order_key
      AND (q.order_lsn, q.order_n, q.delivery_id) > (h.order_lsn, h.order_n, h.delivery_id) AND (q.order_lsn <= h.filling) IS NOT FALSE
    ORDER BY q.order_lsn, q.order_n, q.delivery_id LIMIT $8::int4 - 1) n
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

// claimAlone makes the replicas of one slot claim one after the other. Two that claim at once look at the same rows: the second locks, to no end, what the
// first has just taken, and the first waits for that when it records. It is a matter of speed alone. So a replica that is stuck half-way (its network is frozen,
// say) is waited for once, for claimPatience, and then for a while not any more.
const (
	claimPatience = `SELECT pg_catalog.set_config('lock_timeout', '1s', true)`
	claimAlone    = `SELECT pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended($1::text, ` + lockClaim + `))`
)

// notFull leaves out what is of an endpoint that can take nothing.
const notFull = `NOT EXISTS (SELECT FROM cap c WHERE c.n = 0 AND c.lane = q.lane)`

const queueColumns = `q.delivery_id, q.tenant, q.lane, q.order_key, q.order_lsn, q.order_n, q.due_at`

// What is looked at. Usually that is the longest due, which costs the same whatever else waits. Where these are of endpoints that can take no more now, a
// million of them perhaps, the others are found endpoint by endpoint, each with its part of the look. Its conditions are for the index of both columns: with
// plain ones the planner would walk all that is due in search of one endpoint. The second column ends no walk (PostgreSQL goes by the first of such a comparison), so
// that an endpoint of which nothing is due must be left out before: the first row of each tells.
const (
	longestDue = `looked AS MATERIALIZED (
  SELECT ` + queueColumns + ` FROM outbox_relay.retry_queue q WHERE q.due_at <= now() ORDER BY q.due_at LIMIT $2::int4 * 4)`

	dueByEndpoint = `queued AS (
  (SELECT q.lane, q.tenant, q.due_at FROM outbox_relay.retry_queue q ORDER BY uuid_send(q.lane), q.due_at LIMIT 1)
  UNION ALL
  SELECT n.* FROM queued CROSS JOIN LATERAL (
    SELECT q.lane, q.tenant, q.due_at FROM outbox_relay.retry_queue q WHERE uuid_send(q.lane) > uuid_send(queued.lane) ORDER BY uuid_send(q.lane), q.due_at LIMIT 1) n),
open AS MATERIALIZED (
  SELECT q.lane FROM queued q WHERE q.due_at <= now() AND ` + notFull + ` AND ($7::text[] IS NULL OR q.tenant = ANY($7::text[]))),
looked AS MATERIALIZED (
  SELECT l.* FROM open o CROSS JOIN LATERAL (
    SELECT ` + queueColumns + ` FROM outbox_relay.retry_queue q
    WHERE (uuid_send(q.lane), q.due_at) > (uuid_send(o.lane), '-infinity') AND (uuid_send(q.lane), q.due_at) <= (uuid_send(o.lane), now())
      AND (q.order_key IS NULL OR NOT EXISTS ` + behind + `)
    ORDER BY uuid_send(q.lane), q.due_at LIMIT (SELECT greatest($2::int4 * 4 / count(*), 1) FROM open)) l)`
)

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
	c := claimer{store: s, conn: conn.Conn(), owner: owner, groups: make(map[string]*claimedTenant), of: make(map[Endpoint]int)}
	looked, err := c.claim(ctx, o, longestDue)
	if more = looked >= 4*o.N; err == nil && more && c.n < o.N {
		_, err = c.claim(ctx, o, dueByEndpoint)
		more = false // unless there are as many as were asked for
	}
	if err != nil {
		return nil, false, fmt.Errorf("claim deliveries: %w", explain(err))
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
	rows, _ := s.pool.Query(ctx, renew, owner, ids, lease.Microseconds())
	renewed, err := pgx.CollectRows(rows, pgx.RowTo[outbox.UUID])
	if err != nil {
		return nil, fmt.Errorf("renew %d leases: %w", len(ids), err)
	}
	return renewed, nil
}

// A claimer claims one batch on one connection.
type claimer struct {
	store  *Store
	conn   *pgx.Conn
	owner  outbox.UUID
	n      int              // deliveries claimed
	of     map[Endpoint]int // these by endpoint
	budget int64            // of bodies, for each tenant; zero: no bound
	first  string           // the tenant whose first body is read however large it is: any of them, so that each gets its turn
	groups map[string]*claimedTenant
}

// claimedTenant is what was claimed of one tenant, and what becomes of it unless it is attempted.
type claimedTenant struct {
	ids     []outbox.UUID
	places  map[outbox.UUID]Place
	rows    []Claimed
	tooMuch []outbox.UUID            // more than is loaded at once
	parked  []outbox.UUID            // of a tenant that takes none now
	putOff  []outbox.UUID            // of a tenant or an endpoint that cannot be read
	dropped map[string][]outbox.UUID // by reason
	err     error
}

// claim claims up to what is left of o.N, of what a look finds, and returns how much that was.
func (c *claimer) claim(ctx context.Context, o ClaimOptions, look string) (looked int, err error) {
	tenants, endpoints, caps := make([]string, 0, len(o.Caps)), make([]outbox.UUID, 0, len(o.Caps)), make([]int32, 0, len(o.Caps))
	for e, n := range o.Caps {
		tenants, endpoints = append(tenants, e.Tenant), append(endpoints, e.ID)
		caps = append(caps, int32(max(n-c.of[e], 0))) //nolint:gosec // no more than a window
	}
	args := []any{c.owner, o.N - c.n, o.Lease.Microseconds(), tenants, endpoints, caps, o.Tenants, max(o.Run, 1)}
	take := func(alone bool) error {
		b := &pgx.Batch{}
		if alone {
			b.Queue(claimPatience)
			b.Queue(claimAlone, c.store.slot)
		}
		b.Queue(strings.Replace(claimDue, "{looked}", look, 1), args...).Query(func(rows pgx.Rows) error {
			looked, err = c.taken(rows)
			return err
		})
		return c.conn.SendBatch(ctx, b).Close()
	}
	alone := time.Since(time.UnixMilli(c.store.crowded.Load())) > putOff
	if err = take(alone); alone && code(err) == codeLockNotAvailable {
		c.store.crowded.Store(time.Now().UnixMilli())
		err = take(false)
	}
	if o.Bytes > 0 {
		c.budget = max(o.Bytes/int64(max(len(c.groups), 1)), 1)
	}
	return looked, err
}

// taken reads what a claim has taken, and how much it looked at.
func (c *claimer) taken(rows pgx.Rows) (looked int, err error) {
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
		c.of[Endpoint{*tenant, endpoint}]++
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
	return looked, err
}
