package desk

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Statuses are those of a delivery, as in webhook_deliveries.
func Statuses() []string { return []string{"pending", "retrying", "success", "failed", "cancelled"} }

// Delivery is one (event, endpoint), with its place in the retry queue.
type Delivery struct {
	ID           outbox.UUID `json:"id"`
	EventID      outbox.UUID `json:"event_id"`
	EventType    string      `json:"event_type,omitempty"` // empty: the event's row is gone
	EndpointID   outbox.UUID `json:"endpoint_id"`
	EndpointName string      `json:"endpoint_name"`
	Status       string      `json:"status"`
	Replay       int         `json:"replay"`   // which replay this is; zero: the original run
	Attempts     int         `json:"attempts"` // made in this replay
	Method       string      `json:"method"`
	URL          string      `json:"url"`                   // without its query
	StatusCode   int         `json:"status_code,omitempty"` // of the last answer
	ErrorCode    string      `json:"error_code,omitempty"`  // the class of the last failure, deferred, cancelled or skipped
	Error        string      `json:"error,omitempty"`
	CreatedAt    Time        `json:"created_at,omitzero"`
	AttemptedAt  Time        `json:"attempted_at,omitzero"`
	CompletedAt  Time        `json:"completed_at,omitzero"`
	Queued       bool        `json:"queued"`             // it is in the retry queue
	DueAt        Time        `json:"due_at,omitzero"`    // missing though Queued: it is parked
	LeasedBy     outbox.UUID `json:"leased_by,omitzero"` // the relay that has it until DueAt
}

// attempted tells rows without an attempt by the time that one takes; attempt_number is 1 at least.
const attempted = `(d.delivery_status = 'success' OR d.delivery_status <> 'pending' AND d.response_time_ms IS NOT NULL)`

const selectDeliveries = `
SELECT d.id, d.webhook_event_id, coalesce(v.event_type, '')::text, d.webhook_endpoint_id, coalesce(e.name, '')::text, d.delivery_status::text,
  d.replay::int4, CASE WHEN ` + attempted + ` THEN d.attempt_number ELSE 0 END::int4, d.request_method::text, d.request_url::text,
  coalesce(d.response_status_code, 0)::int4, coalesce(d.error_code, '')::text, coalesce(d.error_message, '')::text,
  d.created_at::timestamptz, CASE WHEN ` + attempted + ` THEN d.attempted_at END::timestamptz, d.completed_at::timestamptz,
  q.delivery_id IS NOT NULL, q.due_at, q.leased_by
FROM {tenant}.webhook_deliveries d
LEFT JOIN {tenant}.webhook_events v ON v.id = d.webhook_event_id
LEFT JOIN {tenant}.webhook_endpoints e ON e.id = d.webhook_endpoint_id
LEFT JOIN outbox_relay.retry_queue q ON q.delivery_id = d.id
WHERE d.relayed AND `

func scanDelivery(row pgx.CollectableRow) (Delivery, error) {
	d, err := pgx.RowToStructByPos[Delivery](row)
	d.URL = withoutQuery(d.URL)
	return d, err
}

// DeliveryFilter chooses deliveries; what is zero does not count.
type DeliveryFilter struct {
	Endpoint, Event outbox.UUID
	Type            string    // of the event, whose row must be there
	Statuses        []string  // any of these
	Since, Until    time.Time // of the delivery's making, Until excluded
	Limit           int       // required
}

// Deliveries lists those that the relay made, the newest first.
func (d *Desk) Deliveries(ctx context.Context, f DeliveryFilter) ([]Delivery, error) {
	var c conditions
	unless(&c, outbox.UUID{}, "d.webhook_endpoint_id = $::uuid", f.Endpoint)
	unless(&c, outbox.UUID{}, "d.webhook_event_id = $::uuid", f.Event)
	unless(&c, "", "v.event_type = $::text", f.Type)
	if len(f.Statuses) > 0 {
		c.add("d.delivery_status = ANY($::text[])", f.Statuses)
	}
	// The ids of the relay begin with the time: the index of the primary key has the order and the borders.
	if !f.Since.IsZero() {
		c.add("d.id >= $::uuid", store.FirstID(f.Since))
	}
	if !f.Until.IsZero() {
		c.add("d.id < $::uuid", store.FirstID(f.Until))
	}
	c.args = append(c.args, f.Limit)
	return collect(ctx, d, "list deliveries", scanDelivery, selectDeliveries+c.String()+limit("d.id DESC", len(c.args)), c.args...)
}

// Attempt is one that failed.
type Attempt struct {
	Replay     int    `json:"replay"`
	Number     int    `json:"number"` // within the replay
	At         Time   `json:"at"`
	TookMS     int    `json:"took_ms"`
	Class      string `json:"class"`
	StatusCode int    `json:"status_code,omitempty"`
	Error      string `json:"error,omitempty"`
	Answer     string `json:"answer,omitempty"` // the beginning of its body
}

// Place is where a delivery stands among those of the same key of an endpoint that promises an order.
type Place struct {
	Key    outbox.UUID `json:"key"`            // the endpoint or the aggregate
	Before int         `json:"before"`         // how many are before it, up to CountLimit
	Behind int         `json:"behind"`         // how many are behind it, up to CountLimit
	Head   *Delivery   `json:"head,omitempty"` // the first of all, unless it is this one
}

// DeliveryDetail is all there is to say about a delivery.
type DeliveryDetail struct {
	Delivery
	Why        string    `json:"why,omitempty"` // it waits
	MaxTries   int       `json:"max_attempts"`  // zero: the configuration's default
	Endpoint   State     `json:"endpoint"`
	Place      *Place    `json:"place,omitempty"`
	Failures   []Attempt `json:"failed_attempts"`
	DeadLetter string    `json:"dead_letter,omitempty"` // the state of its dead letter
}

// attemptsShown bounds what one delivery shows; ten attempts of ten replays are 100.
const attemptsShown = 100

// Delivery looks one up.
func (d *Desk) Delivery(ctx context.Context, id outbox.UUID) (*DeliveryDetail, error) {
	const op = "look up delivery"
	list, err := collect(ctx, d, op, scanDelivery, selectDeliveries+"d.id = $1::uuid", id)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, d.notFound(ctx, "delivery", id)
	}
	x := &DeliveryDetail{Delivery: list[0]}
	if x.Endpoint, err = d.endpointState(ctx, x.EndpointID); err != nil {
		return nil, err
	}
	x.MaxTries = x.Endpoint.maxTries
	if x.Failures, err = d.attempts(ctx, id); err != nil {
		return nil, err
	}
	letters, err := collect(ctx, d, op, scanLetter, selectLetters+"l.delivery_id = $1::uuid", id)
	if err != nil {
		return nil, err
	}
	if len(letters) > 0 {
		x.DeadLetter = letters[0].State
	}
	if x.Place, err = d.place(ctx, id); err != nil {
		return nil, err
	}
	x.Why = d.why(&x.Delivery, &x.Endpoint, x.Place)
	return x, nil
}

// attempts lists the failed ones, the last ones if there are many, in the order in which they were made.
func (d *Desk) attempts(ctx context.Context, id outbox.UUID) ([]Attempt, error) {
	return collect(ctx, d, "look up attempts", pgx.RowToStructByPos[Attempt], `
SELECT * FROM (
  SELECT t.replay::int4, t.attempt_number::int4, t.attempted_at, coalesce(t.response_time_ms, 0)::int4, t.error_class::text,
    coalesce(t.response_status_code, 0)::int4, coalesce(t.error_message, '')::text, coalesce(t.response_body, '')::text
  FROM {tenant}.webhook_delivery_attempts t WHERE t.delivery_id = $1::uuid ORDER BY t.replay DESC, t.attempt_number DESC, t.attempted_at DESC LIMIT $2::int4) t
ORDER BY 1, 2, 3`, id, attemptsShown)
}

// place looks up where a delivery stands; nil: it has no order to keep.
func (d *Desk) place(ctx context.Context, id outbox.UUID) (*Place, error) {
	const op = "look up order"
	const same = `FROM outbox_relay.retry_queue h WHERE h.lane = q.lane AND h.order_key = q.order_key`
	const position = ` (h.order_lsn, h.order_n, h.delivery_id) `
	var head outbox.UUID
	places, err := collect(ctx, d, op, func(row pgx.CollectableRow) (p Place, err error) {
		return p, row.Scan(&p.Key, &p.Before, &p.Behind, &head)
	}, `
SELECT q.order_key,
  (SELECT count(*) FROM (SELECT `+same+` AND`+position+`< (q.order_lsn, q.order_n, q.delivery_id) LIMIT $2::int4) b),
  (SELECT count(*) FROM (SELECT `+same+` AND`+position+`> (q.order_lsn, q.order_n, q.delivery_id) LIMIT $2::int4) b),
  (SELECT h.delivery_id `+same+` ORDER BY h.order_lsn, h.order_n, h.delivery_id LIMIT 1)
FROM outbox_relay.retry_queue q WHERE q.delivery_id = $1::uuid AND q.order_key IS NOT NULL`, id, CountLimit)
	if err != nil || len(places) == 0 {
		return nil, err
	}
	p := &places[0]
	if head == id {
		return p, nil
	}
	heads, err := collect(ctx, d, op, scanDelivery, selectDeliveries+"d.id = $1::uuid", head)
	if len(heads) > 0 {
		p.Head = &heads[0]
	}
	return p, err
}

// Resend queues a delivery again that has ended, whichever way. False: it is queued already.
func (d *Desk) Resend(ctx context.Context, id outbox.UUID) (bool, error) {
	return call[bool](ctx, d, "resend delivery", `SELECT outbox_relay.resend($1::text, $2::uuid)`, d.tenant, id)
}

// Skip gives a waiting delivery up, as a dead letter, so that what waits behind it goes on. False: it does not wait.
func (d *Desk) Skip(ctx context.Context, id outbox.UUID, reason string) (bool, error) {
	return call[bool](ctx, d, "skip delivery", `SELECT outbox_relay.skip($1::text, $2::uuid, nullif($3::text, ''))`, d.tenant, id, reason)
}
