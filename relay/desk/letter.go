package desk

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// LetterStates are those of a dead letter.
func LetterStates() []string { return []string{"open", "replayed", "discarded"} }

// DeadLetter is a delivery that was given up. A person replays or discards it.
type DeadLetter struct {
	DeliveryID   outbox.UUID `json:"delivery_id"`
	EventID      outbox.UUID `json:"event_id"`
	EventType    string      `json:"event_type,omitempty"` // empty: the event's row is gone
	EndpointID   outbox.UUID `json:"endpoint_id"`
	EndpointName string      `json:"endpoint_name,omitempty"`
	EndpointGone bool        `json:"endpoint_gone,omitempty"`
	State        string      `json:"state"`
	Attempts     int         `json:"attempts"`
	Replay       int         `json:"replay"`                // which replay it died in; zero: the original run
	ErrorCode    string      `json:"error_code,omitempty"`  // of the last attempt, or skipped
	StatusCode   int         `json:"status_code,omitempty"` // of the last answer
	Error        string      `json:"error,omitempty"`
	DeadAt       Time        `json:"dead_at"`
	ReplayedAt   Time        `json:"replayed_at,omitzero"`
	DiscardedAt  Time        `json:"discarded_at,omitzero"`
	Method       string      `json:"method"`
	URL          string      `json:"url"` // without its query
}

// LetterDetail is a dead letter with what it would send.
type LetterDetail struct {
	DeadLetter
	Headers json.RawMessage `json:"headers"` // that come from the event
	Body    *string         `json:"body,omitempty"`
	Bytes   int             `json:"body_bytes"`
	Answer  string          `json:"answer,omitempty"` // the beginning of the last one
}

// open is what has been neither replayed nor discarded.
const open = `l.replayed_at IS NULL AND l.discarded_at IS NULL`

const letterState = `CASE WHEN ` + open + ` THEN 'open' WHEN l.discarded_at IS NOT NULL THEN 'discarded' ELSE 'replayed' END`

const selectLetters = `
SELECT l.delivery_id, l.webhook_event_id, coalesce(v.event_type, '')::text, l.webhook_endpoint_id, coalesce(e.name, '')::text, e.id IS NULL,
  ` + letterState + `, l.attempts::int4, l.replay::int4, coalesce(l.last_error_code, '')::text, coalesce(l.last_status_code, 0)::int4,
  coalesce(l.last_error, '')::text, l.dead_at, l.replayed_at, l.discarded_at, l.request_method::text, l.request_url
` + fromLetters + ` WHERE `

const fromLetters = `FROM {tenant}.webhook_dead_letters l
LEFT JOIN {tenant}.webhook_events v ON v.id = l.webhook_event_id
LEFT JOIN {tenant}.webhook_endpoints e ON e.id = l.webhook_endpoint_id`

func scanLetter(row pgx.CollectableRow) (DeadLetter, error) {
	l, err := pgx.RowToStructByPos[DeadLetter](row)
	l.URL = withoutQuery(l.URL)
	return l, err
}

// LetterFilter chooses dead letters; what is zero does not count.
type LetterFilter struct {
	Endpoint, Event outbox.UUID
	Type            string    // of the event, whose row must be there
	Since, Until    time.Time // of death, Until excluded
}

// Empty tells that everything passes.
func (f *LetterFilter) Empty() bool { return *f == LetterFilter{} }

func (f *LetterFilter) conditions() *conditions {
	c := &conditions{}
	unless(c, outbox.UUID{}, "l.webhook_endpoint_id = $::uuid", f.Endpoint)
	unless(c, outbox.UUID{}, "l.webhook_event_id = $::uuid", f.Event)
	unless(c, "", "v.event_type = $::text", f.Type)
	unless(c, time.Time{}, "l.dead_at >= $::timestamptz", f.Since)
	unless(c, time.Time{}, "l.dead_at < $::timestamptz", f.Until)
	return c
}

// DeadLetters lists up to n in any of the states, the latest first.
func (d *Desk) DeadLetters(ctx context.Context, f LetterFilter, states []string, n int) ([]DeadLetter, error) {
	c := f.conditions()
	c.add(letterState+" = ANY($::text[])", states)
	c.args = append(c.args, n)
	return collect(ctx, d, "list dead letters", scanLetter, selectLetters+c.String()+limit("l.dead_at DESC, l.delivery_id DESC", len(c.args)), c.args...)
}

// DeadLetter looks up the one of a delivery.
func (d *Desk) DeadLetter(ctx context.Context, delivery outbox.UUID) (*LetterDetail, error) {
	const op = "look up dead letter"
	list, err := collect(ctx, d, op, scanLetter, selectLetters+"l.delivery_id = $1::uuid", delivery)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, d.notFound(ctx, "dead letter", delivery)
	}
	details, err := collect(ctx, d, op, func(row pgx.CollectableRow) (x LetterDetail, err error) {
		var headers string
		err = row.Scan(&headers, &x.Body, &x.Bytes, &x.Answer)
		x.Headers = json.RawMessage(headers)
		return x, err
	}, `SELECT l.request_headers::text, l.request_body, coalesce(octet_length(l.request_body), 0)::int4, coalesce(l.last_response_body, '')
FROM {tenant}.webhook_dead_letters l WHERE l.delivery_id = $1::uuid`, delivery)
	if err != nil {
		return nil, err
	}
	if len(details) == 0 { // gone in between
		return nil, d.notFound(ctx, "dead letter", delivery)
	}
	details[0].DeadLetter = list[0]
	return &details[0], nil
}

// Pile is how many open dead letters of an endpoint a filter chooses.
type Pile struct {
	EndpointID   outbox.UUID `json:"endpoint_id"`
	EndpointName string      `json:"endpoint_name,omitempty"`
	EndpointGone bool        `json:"endpoint_gone,omitempty"` // they cannot be replayed
	Holds        bool        `json:"holds,omitempty"`         // the endpoint is paused or not active: they will wait
	N            int64       `json:"open"`
}

// Piles counts the open dead letters that the filter chooses, by endpoint, the most first.
func (d *Desk) Piles(ctx context.Context, f LetterFilter) ([]Pile, error) {
	c := f.conditions()
	return collect(ctx, d, "count dead letters", pgx.RowToStructByPos[Pile], `
SELECT l.webhook_endpoint_id, coalesce(e.name, '')::text, e.id IS NULL, e.id IS NOT NULL AND (NOT e.is_active OR e.paused_at IS NOT NULL), count(*)
`+fromLetters+` WHERE `+open+` AND `+c.String()+` GROUP BY l.webhook_endpoint_id, e.id ORDER BY 5 DESC, 1`, c.args...)
}

// Replay queues up to n open dead letters that the filter chooses, the oldest events first, to become due spread over the given time, and marks them
// as replayed, all in one transaction. It returns how many it has queued.
func (d *Desk) Replay(ctx context.Context, f LetterFilter, n int, within time.Duration) (int64, error) {
	return call[int64](ctx, d, "replay dead letters", `
SELECT outbox_relay.replay($1::text, $2::uuid, $3::uuid, nullif($4::text, ''), $5::timestamptz, $6::timestamptz, $7::int4, $8::int8 * interval '1 microsecond')`,
		d.tenant, f.Endpoint, f.Event, f.Type, orNull(f.Since), orNull(f.Until), n, within.Microseconds())
}

// Discard marks a dead letter as one that nobody wants any more. False: it was replayed or discarded before.
func (d *Desk) Discard(ctx context.Context, delivery outbox.UUID) (bool, error) {
	discarded, err := call[bool](ctx, d, "discard dead letter", `SELECT outbox_relay.discard($1::text, $2::uuid)`, d.tenant, delivery)
	if err != nil || discarded {
		return discarded, err
	}
	_, err = d.DeadLetter(ctx, delivery) // or is there none?
	return false, err
}

// DiscardMany does so with up to n of those that the filter chooses, in one transaction. It returns how many; zero: none is left but what somebody has locked.
func (d *Desk) DiscardMany(ctx context.Context, f LetterFilter, n int) (int64, error) {
	c := f.conditions()
	c.args = append(c.args, d.tenant, n)
	return call[int64](ctx, d, "discard dead letters", d.sql(fmt.Sprintf(`
SELECT count(*) FILTER (WHERE outbox_relay.discard($%d::text, x.delivery_id)) FROM (SELECT l.delivery_id %s WHERE %s AND %s ORDER BY l.dead_at LIMIT $%d::int4
FOR UPDATE OF l SKIP LOCKED) x`,
		len(c.args)-1, fromLetters, open, c, len(c.args))), c.args...)
}

func limit(order string, arg int) string {
	return fmt.Sprintf(" ORDER BY %s LIMIT $%d::int4", order, arg)
}

func orNull(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}
