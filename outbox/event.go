package outbox

import (
	"encoding/json"
	"time"
)

// Event is one row of a tenant's webhook_events: something that happened to an aggregate and that webhooks tell of.
// Only Type, AggregateID and AggregateType are required.
type Event struct {
	// ID identifies the event; receivers see it as webhook-id and use it to drop repeats. Zero asks Insert for a new version 7 id.
	ID UUID
	// Type is what subscriptions match: lower-case segments joined by dots, such as order.created. At most 255 characters.
	Type string
	// Name is a title for people, at most 255 characters. Empty is NULL.
	Name string

	// AggregateID and AggregateType (at most 100 characters) name the thing the event is about.
	AggregateID   UUID
	AggregateType string
	// AggregateVersion is the aggregate's version after the event. Zero is 1.
	AggregateVersion int32

	// Data is the payload, any JSON document that jsonb can hold. Empty is {}.
	Data json.RawMessage
	// Metadata is a JSON object; traceparent and tracestate in it become headers of the request. Empty is {}.
	Metadata json.RawMessage

	// CorrelationID, CausationID, TriggeredByUserID and ContextID are optional: zero is NULL. A subscription that has a context
	// receives the events of that ContextID only.
	CorrelationID     UUID
	CausationID       UUID
	TriggeredByUserID UUID
	ContextID         UUID

	// OccurredAt is kept in microseconds. Zero is the database's now(), the time at which the transaction began.
	OccurredAt time.Time
}
