package route

import "github.com/neo-commons/outbox-relay/outbox"

// Source is one of the two tables that hold subscriptions.
type Source uint8

// The sources.
const (
	Current Source = iota // webhook_subscriptions
	Older                 // webhook_event_subscriptions
)

// String returns the table's name.
func (s Source) String() string {
	if s == Older {
		return tableOlder
	}
	return tableCurrent
}

// TableEventTypes is the one table whose invalid rows count all the same, but for their payload_schema.
const TableEventTypes = "webhook_event_types"

const (
	tableEndpoints = "webhook_endpoints"
	tableCurrent   = "webhook_subscriptions"
	tableOlder     = "webhook_event_subscriptions"
)

// SubscriptionRow is a row of either table of subscriptions. A table owns the row it was given, Filters included.
type SubscriptionRow struct {
	Source     Source
	ID         outbox.UUID
	EndpointID outbox.UUID
	// EventTypeID is what an Older subscription is for; a Current one goes by its EventType alone.
	EventTypeID outbox.UUID
	EventType   string // an event type or a pattern
	Filters     []byte // jsonb
	Active      bool
	ContextID   outbox.UUID // zero: events of any context, or of none
}

// EventTypeRow is a row of webhook_event_types.
type EventTypeRow struct {
	ID                   outbox.UUID
	EventType            string
	Enabled              bool // false: events of this type go nowhere
	RequiresVerification bool // events of this type go to verified endpoints only
	// PayloadSchema is a JSON Schema for the payloads of such events; empty: none.
	PayloadSchema string
}

// Invalid is a row that matches nothing until it is changed, or an event type without the schema that it should have.
type Invalid struct {
	Table string
	ID    outbox.UUID
	Err   error
}
