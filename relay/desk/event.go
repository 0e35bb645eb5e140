package desk

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Event is a row of webhook_events, with how far the relay is with it.
type Event struct {
	ID            outbox.UUID `json:"id"`
	Gone          bool        `json:"gone,omitempty"` // the row is not there, deliveries are; the rest is empty then
	Type          string      `json:"type,omitempty"`
	Name          string      `json:"name,omitempty"`
	AggregateType string      `json:"aggregate_type,omitempty"`
	AggregateID   outbox.UUID `json:"aggregate_id,omitzero"`
	Version       int32       `json:"aggregate_version,omitempty"`
	ContextID     outbox.UUID `json:"context_id,omitzero"`
	CorrelationID outbox.UUID `json:"correlation_id,omitzero"`
	CausationID   outbox.UUID `json:"causation_id,omitzero"`
	UserID        outbox.UUID `json:"triggered_by_user_id,omitzero"`
	OccurredAt    Time        `json:"occurred_at,omitzero"`
	Progress      Progress    `json:"progress,omitempty"`
	ProgressText  string      `json:"progress_text,omitempty"`

	data, metadata json.RawMessage
}

// Progress is how far the relay is with an event.
type Progress string

// The progresses.
const (
	Read      Progress = "read"      // matched; what was sent or waits has a row
	Unread    Progress = "unread"    // not read, or not noted as read
	Before    Progress = "before"    // older than the tenant's place in the log
	Backfill  Progress = "backfill"  // older, and to be queued
	Suspended Progress = "suspended" // left in the table until the tenant is resumed
)

// EventDetail is an event with its deliveries.
type EventDetail struct {
	Event
	Data        json.RawMessage `json:"event_data,omitempty"`
	Metadata    json.RawMessage `json:"event_metadata,omitempty"`
	Deliveries  []Delivery      `json:"deliveries"`
	DeadLetters []DeadLetter    `json:"dead_letters"`
}

// deliveriesShown bounds what one event shows: it has a delivery for each endpoint at most.
const deliveriesShown = 10_000

// Event looks one up, its payload with body.
func (d *Desk) Event(ctx context.Context, id outbox.UUID, body bool) (*EventDetail, error) {
	x, err := d.event(ctx, id)
	if err != nil {
		return nil, err
	}
	if body {
		x.Data, x.Metadata = x.data, x.metadata
	}
	return x, nil
}

func (d *Desk) event(ctx context.Context, id outbox.UUID) (*EventDetail, error) {
	x := &EventDetail{Event: Event{ID: id}}
	var err error
	if x.Deliveries, err = d.Deliveries(ctx, DeliveryFilter{Event: id, Limit: deliveriesShown}); err != nil {
		return nil, err
	}
	if x.DeadLetters, err = d.DeadLetters(ctx, LetterFilter{Event: id}, LetterStates(), deliveriesShown); err != nil {
		return nil, err
	}
	var marks marks
	events, err := collect(ctx, d, "look up event", func(row pgx.CollectableRow) (Event, error) {
		v, err := store.ScanEvent(row, marks.fields()...)
		return Event{
			ID: v.ID, Type: v.Type, Name: v.Name, AggregateType: v.AggregateType, AggregateID: v.AggregateID, Version: v.AggregateVersion, ContextID: v.ContextID,
			CorrelationID: v.CorrelationID, CausationID: v.CausationID, UserID: v.TriggeredByUserID, OccurredAt: Time{v.OccurredAt}, data: v.Data, metadata: v.Metadata,
		}, err
	}, selectEvent, id, d.tenant, d.slot)
	switch {
	case err != nil:
		return nil, err
	case len(events) > 0:
		x.Event = events[0]
		x.Progress, x.ProgressText = marks.progress(d, len(x.Deliveries) > 0)
	case len(x.Deliveries) == 0 && len(x.DeadLetters) == 0:
		return nil, d.notFound(ctx, "event", id)
	default:
		x.Gone = true
	}
	return x, nil
}

const selectEvent = `
SELECT ` + store.EventColumns + `,
  coalesce(pg_visible_in_snapshot(e.xid, p.snapshot), false),
  e.xid IS NULL OR pg_visible_in_snapshot(e.xid, t.added_snapshot) OR t.restored_at IS NOT NULL AND NOT pg_visible_in_snapshot(e.xid, pg_current_snapshot())
    OR coalesce(e.created_at < ` + store.OwnSince + `, false),
  t.restored_at,
  t.backfill_upto IS NOT NULL AND (e.xid IS NULL OR pg_visible_in_snapshot(e.xid, t.backfill_upto))
    AND (t.backfill_from IS NULL OR e.xid IS NOT NULL AND NOT pg_visible_in_snapshot(e.xid, t.backfill_from))
    AND CASE t.backfill WHEN 'unprocessed' THEN e.processed_at IS NULL WHEN 'since' THEN e.occurred_at >= t.backfill_since ELSE true END,
  t.backfill_done_at IS NOT NULL,
  t.backfill_from IS NOT NULL AND (e.xid IS NULL OR pg_visible_in_snapshot(e.xid, t.backfill_from)),
  coalesce(s.active, false), s.slot_name IS NOT NULL, slot.name,
  coalesce(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, s.confirmed_flush_lsn), 0)::int8
FROM {tenant}.webhook_events e
JOIN outbox_relay.tenants t ON t.schema = $2::text
CROSS JOIN LATERAL (SELECT $3::text || CASE WHEN t.shard > 0 THEN '_' || t.shard ELSE '' END AS name) slot
LEFT JOIN outbox_relay.progress p ON p.slot = slot.name
LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = slot.name
WHERE e.id = $1::uuid`

// marks is where an event stands in the order of transactions.
type marks struct {
	recorded     bool // before the relay's last note of what it has recorded
	beforeTenant bool
	restored     Time // when the tenant came with rows of another cluster; zero: never
	backfilled   bool // by the tenant's latest backfill, done or not
	backfillDone bool
	beforeSuspension,
	reading, slot bool
	slotName string // of the tenant's shard
	lag      int64  // bytes of the log that are not confirmed
}

func (m *marks) fields() []any {
	return []any{&m.recorded, &m.beforeTenant, &m.restored, &m.backfilled, &m.backfillDone, &m.beforeSuspension, &m.reading, &m.slot, &m.slotName, &m.lag}
}

// progress judges the marks. What has deliveries was read.
func (m *marks) progress(d *Desk, delivered bool) (Progress, string) {
	switch {
	case delivered:
		return Read, "yes"
	case d.state == "suspended" && !m.beforeSuspension:
		return Suspended, "no: the tenant is suspended (" + d.reason + "); mend it, then run: outbox-relay tenants resume " + d.tenant
	case m.backfilled && !m.backfillDone:
		return Backfill, "not yet: it is among the earlier events that are being queued"
	case m.backfilled:
		return Read, "yes, among earlier events"
	case m.beforeTenant && !m.restored.IsZero():
		return Before, "not known: its tenant came from another cluster at " + m.restored.Format(time.RFC3339) +
			"; events from before are left out; endpoints recover --since queues such events"
	case m.beforeTenant:
		return Before, "no: it was committed before " + d.tenant + " became a tenant; endpoints recover --since queues such events"
	case m.recorded:
		return Read, "yes"
	case !m.slot:
		return Unread, fmt.Sprintf("no: the replication slot %q does not exist; run: outbox-relay check", m.slotName)
	case !m.reading:
		return Unread, fmt.Sprintf("not yet: no relay reads the log now, %s of it are not confirmed; run: outbox-relay check", bytesText(m.lag))
	default:
		return Unread, fmt.Sprintf("not yet, or not noted: a relay is at work, %s of the log are not confirmed, and it notes every half a minute what it has read", bytesText(m.lag))
	}
}

// bytesText is a number of bytes for people.
func bytesText(n int64) string {
	const unit = 1024
	switch {
	case n < unit:
		return fmt.Sprintf("%d bytes", n)
	case n < unit*unit:
		return fmt.Sprintf("%.1f KiB", float64(n)/unit)
	case n < unit*unit*unit:
		return fmt.Sprintf("%.1f MiB", float64(n)/(unit*unit))
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(unit*unit*unit))
}
