package desk

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Queue is what waits in the retry queue. Beyond store.QueueCountLimit rows, Total is the server's estimate, and the rest is of that many of them.
type Queue struct {
	Total     Count     `json:"total"`
	Due       Count     `json:"due"`                 // without those of endpoints whose breaker is open
	Shut      Count     `json:"due_behind_breakers"` // those
	OldestDue float64   `json:"oldest_due_seconds"`  // for how long the first one has been due
	Leased    Count     `json:"leased"`              // a relay has them, and attempts them
	Parked    Count     `json:"parked"`              // they wait for their endpoint, or behind another delivery
	NextDue   Time      `json:"next_due_at,omitzero"`
	Worst     []Backlog `json:"worst"`   // endpoints that most is waiting for
	Blocked   []Blocked `json:"blocked"` // keys that most is waiting behind
}

// Backlog is what waits for an endpoint.
type Backlog struct {
	Tenant     string      `json:"tenant"`
	EndpointID outbox.UUID `json:"endpoint_id"`
	Name       string      `json:"name,omitempty"`
	Total      Count       `json:"total"`
	Due        int64       `json:"due"`
	Parked     int64       `json:"parked"`
	NextDue    Time        `json:"next_due_at,omitzero"`
	// Reasons are those of the first hundred by their due time: what deferred them, or the class of the failure.
	Reasons map[string]int64 `json:"reasons"`
}

// Blocked is an order that does not go on: what waits behind a delivery of the same key.
type Blocked struct {
	Tenant     string      `json:"tenant"`
	EndpointID outbox.UUID `json:"endpoint_id"`
	Key        outbox.UUID `json:"key"` // the aggregate, or the endpoint itself
	Behind     int64       `json:"behind"`
	HeadID     outbox.UUID `json:"head_delivery_id"`
	HeadDueAt  Time        `json:"head_due_at,omitzero"`
	Attempts   int         `json:"head_attempts"`
	Reason     string      `json:"head_reason,omitempty"`
}

const (
	queueByEndpoint = `
WITH s AS MATERIALIZED (SELECT q.tenant, q.endpoint_id, q.due_at, q.leased_by FROM outbox_relay.retry_queue q LIMIT $1::int4)
SELECT s.tenant, s.endpoint_id, count(*), count(*) FILTER (WHERE s.due_at <= now()), count(*) FILTER (WHERE s.due_at = 'infinity'),
  count(*) FILTER (WHERE s.leased_by IS NOT NULL AND s.due_at > now()),
  min(s.due_at) FILTER (WHERE s.due_at > now() AND s.due_at < 'infinity' AND s.leased_by IS NULL)
FROM s GROUP BY GROUPING SETS ((), (s.tenant, s.endpoint_id)) ORDER BY grouping(s.tenant) DESC, 3 DESC, 1, 2 LIMIT $2::int4 + 1`

	// What waits for a paused endpoint has a head that is parked as well.
	queueBlocked = `
SELECT k.tenant, k.endpoint_id, k.order_key, k.n, h.delivery_id, h.due_at
FROM (SELECT s.tenant, s.endpoint_id, s.order_key, count(*) AS n, s.lane
  FROM (SELECT q.tenant, q.endpoint_id, q.order_key, q.lane FROM outbox_relay.retry_queue q WHERE q.due_at = 'infinity' LIMIT $1::int4) s
  WHERE s.order_key IS NOT NULL GROUP BY 1, 2, 3, 5 ORDER BY 4 DESC, 1, 2, 3 LIMIT $2::int4) k
CROSS JOIN LATERAL (SELECT q.delivery_id, q.due_at FROM outbox_relay.retry_queue q WHERE q.lane = k.lane AND q.order_key = k.order_key
  ORDER BY q.order_lsn, q.order_n, q.delivery_id LIMIT 1) h WHERE h.due_at < 'infinity' ORDER BY 4 DESC, 1, 2, 3`

	reasonColumn = `coalesce(CASE WHEN d.error_code = 'deferred' THEN d.error_message ELSE d.error_code END, '')::text`

	queueReasons = `
SELECT coalesce((SELECT e.name FROM {tenant}.webhook_endpoints e WHERE e.id = $1::uuid), '')::text,
  coalesce((SELECT jsonb_object_agg(r.reason, r.n) FROM (SELECT ` + reasonColumn + ` AS reason, count(*) AS n
    FROM (SELECT q.delivery_id FROM outbox_relay.retry_queue q WHERE uuid_send(q.lane) = uuid_send(outbox_relay.lane($2::text, $1::uuid)) ORDER BY q.due_at LIMIT 100) q
    JOIN {tenant}.webhook_deliveries d ON d.id = q.delivery_id GROUP BY 1) r), '{}')`
)

// surveyQueue begins no statement after as long as one may take: what is left then is a gap.
func (d *Desk) surveyQueue(ctx context.Context, o *Overview) error {
	until := time.Now().Add(d.patience)
	q := &o.Queue
	st, err := store.ReadQueue(ctx, d.conn)
	if err != nil {
		return err
	}
	many := st.Queued >= store.QueueCountLimit
	q.Total = Count{st.Queued, many}
	q.Due = Count{st.Due, st.Due >= store.QueueCountLimit}
	q.OldestDue = st.OldestDue.Seconds()
	if time.Now().After(until) {
		return errTooLong
	}
	rows, err := d.conn.Query(ctx, queueByEndpoint, store.QueueCountLimit, overviewShown)
	if err != nil {
		return err
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (w Backlog, err error) {
		var tenant *string
		var leased int64
		err = row.Scan(&tenant, &w.EndpointID, &w.Total.N, &w.Due, &w.Parked, &leased, &w.NextDue)
		if tenant == nil {
			q.Shut = Count{max(w.Due-st.Due, 0), many}
			q.Leased, q.Parked, q.NextDue = Count{leased, many}, Count{w.Parked, many}, w.NextDue
			return w, err
		}
		w.Tenant, w.Total.More, w.Reasons = *tenant, many, map[string]int64{}
		return w, err
	})
	if err != nil {
		return err
	}
	q.Worst = list[1:]
	if time.Now().After(until) {
		return errTooLong
	}
	if rows, err = d.conn.Query(ctx, queueBlocked, store.QueueCountLimit, overviewShown); err == nil {
		q.Blocked, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (b Blocked, err error) {
			err = row.Scan(&b.Tenant, &b.EndpointID, &b.Key, &b.Behind, &b.HeadID, &b.HeadDueAt)
			return b, err
		})
	}
	if err != nil {
		return err
	}
	for i := range q.Worst {
		w := &q.Worst[i]
		if err := d.lookInto(ctx, o, until, w.Tenant, queueReasons, []any{w.EndpointID, w.Tenant}, &w.Name, &w.Reasons); err != nil {
			return err
		}
	}
	for i := range q.Blocked {
		b := &q.Blocked[i]
		if err := d.lookInto(ctx, o, until, b.Tenant, `SELECT d.attempt_number::int4, `+reasonColumn+` FROM {tenant}.webhook_deliveries d WHERE d.id = $1::uuid`,
			[]any{b.HeadID}, &b.Attempts, &b.Reason); err != nil {
			return err
		}
	}
	return nil
}

// lookInto reads one row of a tenant, unless it is too late. A tenant that cannot be read is a gap, and a row that is gone is none.
func (d *Desk) lookInto(ctx context.Context, o *Overview, until time.Time, tenant, sql string, args []any, into ...any) error {
	if time.Now().After(until) {
		return errTooLong
	}
	err := d.conn.QueryRow(ctx, strings.ReplaceAll(sql, "{tenant}", pgx.Identifier{tenant}.Sanitize()), args...).Scan(into...)
	server, ok := errors.AsType[*pgconn.PgError](err)
	switch {
	case ok && server.Code != "57014":
		o.gap(PartQueue, "tenant %s: %s", tenant, reasonOf(server))
		return nil
	case errors.Is(err, pgx.ErrNoRows):
		return nil
	}
	return err
}
