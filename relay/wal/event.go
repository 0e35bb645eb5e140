package wal

import (
	"fmt"
	"math"

	"github.com/neo-commons/outbox-relay/outbox"
)

// MissingColumnError reports a table of events without a column that events cannot do without.
type MissingColumnError struct {
	Schema, Table, Column string
}

func (e *MissingColumnError) Error() string {
	return fmt.Sprintf("table %q.%q has no column %q", e.Schema, e.Table, e.Column)
}

// Hint tells a person what to do.
func (e *MissingColumnError) Hint() string {
	return fmt.Sprintf("restore the column %q, or its name, then resume the tenant", e.Column)
}

// EventPlan knows where the columns of one Relation of events are. It belongs to the goroutine of the stream.
type EventPlan struct {
	id, eventType, eventName, aggregateID, aggregateType, aggregateVersion    int
	data, metadata, correlationID, causationID, userID, contextID, occurredAt int

	eventTypes, aggregateTypes interner
}

// NewEventPlan finds the columns by name. A column that is not null in the reference schema, and context_id, on which matching depends, must be
// there, else the error is a *MissingColumnError; the others are null where they are missing.
func NewEventPlan(rel *Relation) (*EventPlan, error) {
	p := &EventPlan{
		eventName:     rel.Column("event_name"),
		correlationID: rel.Column("correlation_id"),
		causationID:   rel.Column("causation_id"),
		userID:        rel.Column("triggered_by_user_id"),
	}
	for _, c := range []struct {
		name  string
		index *int
	}{
		{"id", &p.id},
		{"event_type", &p.eventType},
		{"aggregate_id", &p.aggregateID},
		{"aggregate_type", &p.aggregateType},
		{"aggregate_version", &p.aggregateVersion},
		{"event_data", &p.data},
		{"event_metadata", &p.metadata},
		{"context_id", &p.contextID},
		{"occurred_at", &p.occurredAt},
	} {
		if *c.index = rel.Column(c.name); *c.index < 0 {
			return nil, &MissingColumnError{Schema: rel.Schema, Table: rel.Table, Column: c.name}
		}
	}
	return p, nil
}

// Decode makes an event of a row of the plan's Relation. Data and Metadata are the tuple's memory, good as long as that is; types are shared with the
// events before.
func (p *EventPlan) Decode(t *Tuple) (outbox.Event, error) {
	g := getter{t: t}
	e := outbox.Event{
		ID:                g.uuid(p.id),
		Type:              p.eventTypes.intern(g.bytes(p.eventType)),
		Name:              string(g.bytes(p.eventName)), // often another one in every row
		AggregateID:       g.uuid(p.aggregateID),
		AggregateType:     p.aggregateTypes.intern(g.bytes(p.aggregateType)),
		AggregateVersion:  g.int32(p.aggregateVersion),
		CorrelationID:     g.uuid(p.correlationID),
		CausationID:       g.uuid(p.causationID),
		TriggeredByUserID: g.uuid(p.userID),
		ContextID:         g.uuid(p.contextID),
	}
	if g.err == nil {
		e.OccurredAt, g.err = t.Time(p.occurredAt)
	}
	e.Data, e.Metadata = g.json(p.data), g.json(p.metadata)
	if g.err != nil {
		return outbox.Event{}, g.err
	}
	return e, nil
}

// getter reads columns until the first error. A column that is not there is null.
type getter struct {
	t   *Tuple
	err error
}

func (g *getter) uuid(i int) (u outbox.UUID) {
	if g.err == nil && i >= 0 {
		u, g.err = g.t.UUID(i)
	}
	return u
}

func (g *getter) bytes(i int) (b []byte) {
	if g.err == nil && i >= 0 {
		b, g.err = g.t.Bytes(i)
	}
	return b
}

func (g *getter) json(i int) (b []byte) {
	if g.err == nil && i >= 0 {
		b, g.err = g.t.JSON(i)
	}
	return b
}

// int32 takes the nearest number that fits: a column may be wider than what a body has room for, and nobody is to wait for that.
func (g *getter) int32(i int) int32 {
	if g.err != nil || i < 0 {
		return 0
	}
	var n int64
	n, g.err = g.t.Int(i)
	return int32(min(max(n, math.MinInt32), math.MaxInt32))
}

const (
	internStrings = 1024 // kept at most per column
	internLength  = 255  // bytes; longer strings are not kept
)

// interner gives equal short strings the same memory, as long as there are few: event and aggregate types repeat in every row.
type interner map[string]string

func (in *interner) intern(b []byte) string {
	if s, ok := (*in)[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(*in) < internStrings && len(s) <= internLength {
		if *in == nil {
			*in = make(interner)
		}
		(*in)[s] = s
	}
	return s
}
