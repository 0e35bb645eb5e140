package wal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestEventIsWhatWasInserted compares decoded events with the rows, documents byte for byte.
func TestEventIsWhatWasInserted(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, fmt.Sprintf(eventsTable, "public"))
	full := outbox.Event{
		ID: outbox.NewUUID(), Type: "order.created", Name: "Bestellung 7", AggregateID: outbox.NewUUID(), AggregateType: "order", AggregateVersion: 7,
		Data:     json.RawMessage(`{"z": 1, "a": {"deep": [1.10, -0.0, 1e3, "\u00e9\\ \" \t", null, true]}, "z": 2, "": ""}`),
		Metadata: json.RawMessage(`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`), CorrelationID: outbox.NewUUID(),
		CausationID: outbox.NewUUID(), TriggeredByUserID: outbox.NewUUID(), ContextID: outbox.NewUUID(),
		OccurredAt: time.Date(2024, 1, 2, 3, 4, 5, 678901000, time.UTC),
	}
	least := outbox.Event{Type: "order.deleted", AggregateID: outbox.NewUUID(), AggregateType: "order"}
	big := least
	big.Data = json.RawMessage(`{"text": "` + strings.Repeat("lorem ipsum ", 50_000) + `"}`) // 600 kB: out of line in the table
	_, err := outbox.InsertMany(t.Context(), d.conn, "public", []outbox.Event{full, least, big})
	require.NoError(t, err)
	want := d.events()
	require.Len(t, want, 3)

	for _, binary := range []bool{true, false} {
		got, err := decodeEvents(d.messages(binary))
		require.NoError(t, err)
		assert.Equal(t, want, got, "binary %t", binary)
	}
	got := want[0]
	full.Data, full.Metadata, full.OccurredAt = got.Data, got.Metadata, got.OccurredAt
	assert.Equal(t, full, got)
}

// events reads all events as SQL sees them.
func (d *database) events() []outbox.Event {
	d.t.Helper()
	rows, err := d.conn.Query(d.t.Context(), `SELECT id, event_type, coalesce(event_name, ''), aggregate_id, aggregate_type, aggregate_version,
		event_data::text, event_metadata::text, correlation_id, causation_id, triggered_by_user_id, context_id, occurred_at
		FROM webhook_events ORDER BY id`)
	require.NoError(d.t, err)
	events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e outbox.Event, err error) {
		var data, metadata string
		err = row.Scan(&e.ID, &e.Type, &e.Name, &e.AggregateID, &e.AggregateType, &e.AggregateVersion, &data, &metadata,
			&e.CorrelationID, &e.CausationID, &e.TriggeredByUserID, &e.ContextID, &e.OccurredAt)
		e.Data, e.Metadata, e.OccurredAt = json.RawMessage(data), json.RawMessage(metadata), e.OccurredAt.UTC()
		return e, err
	})
	require.NoError(d.t, err)
	return events
}

// decodeEvents decodes the inserts among messages. The messages are overwritten afterwards: but for its documents an event must own what it holds.
func decodeEvents(messages [][]byte) ([]outbox.Event, error) {
	var d decoder
	var events []outbox.Event
	var plan *EventPlan
	for _, msg := range messages {
		k, err := d.decode(msg)
		if err != nil {
			return nil, err
		}
		switch k {
		case kindRelation:
			for _, rel := range d.relations {
				if plan, err = NewEventPlan(rel); err != nil {
					return nil, err
				}
			}
		case kindInsert:
			e, err := plan.Decode(&d.change.New)
			if err != nil {
				return nil, err
			}
			e.Data, e.Metadata = bytes.Clone(e.Data), bytes.Clone(e.Metadata)
			events = append(events, e)
		case kindBegin, kindCommit, kindOrigin, kindType, kindMessage, kindUpdate, kindDelete, kindTruncate:
		}
	}
	for _, msg := range messages {
		clear(msg)
	}
	return events, nil
}

func TestEventColumns(t *testing.T) {
	t.Parallel()
	columns := []string{
		"id", "event_type", "aggregate_id", "aggregate_type", "aggregate_version", "event_data", "event_metadata", "context_id", "occurred_at",
	}
	rel := &Relation{Schema: "tenant", Table: "webhook_events"}
	for _, name := range columns {
		rel.Columns = append(rel.Columns, Column{Name: name})
	}
	_, err := NewEventPlan(rel)
	require.NoError(t, err)
	for i, name := range columns {
		less := &Relation{Schema: rel.Schema, Table: rel.Table}
		less.Columns = append(append(less.Columns, rel.Columns[:i]...), rel.Columns[i+1:]...)
		_, err := NewEventPlan(less)
		var missing *MissingColumnError
		require.ErrorAs(t, err, &missing)
		assert.Equal(t, MissingColumnError{Schema: "tenant", Table: "webhook_events", Column: name}, *missing)
		assert.Contains(t, missing.Hint(), name)
	}
}

func TestEventOfWrongType(t *testing.T) {
	t.Parallel()
	rel, values := eventRow()
	plan, err := NewEventPlan(rel)
	require.NoError(t, err)
	tuple := Tuple{rel: rel, values: values}
	_, err = plan.Decode(&tuple)
	require.NoError(t, err)
	for i, c := range rel.Columns {
		broken := *rel
		broken.Columns = append([]Column(nil), rel.Columns...)
		broken.Columns[i].Type = 600 // point
		tuple := Tuple{rel: &broken, values: values}
		e, err := plan.Decode(&tuple)
		require.ErrorIs(t, err, errType, c.Name)
		assert.Zero(t, e)
		assert.NotContains(t, err.Error(), "secret")
	}
	broken := *rel
	broken.Columns = append([]Column(nil), rel.Columns...)
	broken.Columns[plan.aggregateVersion].Type = 20
	values[plan.aggregateVersion].data = []byte(be(1<<40, 8))
	tuple = Tuple{rel: &broken, values: values}
	e, err := plan.Decode(&tuple)
	require.NoError(t, err)
	require.Equal(t, int32(math.MaxInt32), e.AggregateVersion)
}

func TestInternerIsBounded(t *testing.T) {
	t.Parallel()
	var in interner
	for i := range 2 * internStrings {
		assert.Equal(t, fmt.Sprint(i), in.intern(fmt.Append(nil, i)))
	}
	assert.Len(t, in, internStrings)
	in = nil
	long := strings.Repeat("x", internLength+1)
	assert.Equal(t, long, in.intern([]byte(long)))
	assert.Empty(t, in)
}

// eventRow is a table of events and a row of it of about 300 bytes, as the server sends it.
func eventRow() (*Relation, []value) {
	id, at := strings.Repeat("\x01", 16), be(0x0002d5c8b0a4c000, 8)
	rel := &Relation{ID: 17000, Schema: "tenant", Table: "webhook_events"}
	var values []value
	for _, c := range []struct {
		name, data string
		oid        uint32
	}{
		{"id", id, 2950},
		{"event_type", "order.created", 1043},
		{"event_name", "Order created", 1043},
		{"aggregate_id", id, 2950},
		{"aggregate_type", "order", 1043},
		{"aggregate_version", be(1, 4), 23},
		{"event_data", "\x01" + `{"order": {"id": 123456, "total": "99.95", "items": [{"sku": "secret", "quantity": 2}]}, "customer": {"name": "N. N."}}`, 3802},
		{"event_metadata", "\x01" + `{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`, 3802},
		{"correlation_id", id, 2950},
		{"context_id", id, 2950},
		{"occurred_at", at, 1184},
	} {
		rel.Columns = append(rel.Columns, Column{Name: c.name, Type: c.oid})
		values = append(values, value{format: formatBinary, data: []byte(c.data)})
	}
	return rel, values
}
