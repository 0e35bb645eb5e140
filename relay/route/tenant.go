// Package route decides which endpoints an event goes to. It holds a tenant's endpoints, subscriptions and event types in memory, fed
// row by row from the initial load and from the stream, and knows no database.
package route

import (
	"bytes"
	"cmp"
	"errors"
	"iter"
	"slices"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// Tenant is the routing table of one tenant. Rows may come in any order, a subscription before its endpoint or its event type; what
// is set or deleted counts from the next Match on. A row that cannot be used matches nothing until a later one with its id mends it.
// Each row that is set is worked out anew: whoever has many that say nothing new leaves those out.
// A Tenant must be used by one goroutine at a time, Match included.
type Tenant struct {
	schema        string
	defaults      delivery.Defaults
	endpoints     map[outbox.UUID]*endpoint
	subscriptions map[subscriptionKey]*subscription
	index         index
}

// endpoint is an entry that subscriptions point to. It is there before its row is, and stays as long as it is pointed to.
type endpoint struct {
	row           delivery.EndpointRow
	known         bool               // the row is there
	usable        *delivery.Endpoint // nil: the row is not there or err says why not
	err           error
	subscriptions int

	round  uint64 // the last Match that chose the endpoint
	target int    // its place among that one's targets
}

type subscriptionKey struct {
	source Source
	id     outbox.UUID
}

type subscription struct {
	row      SubscriptionRow
	endpoint *endpoint
	filter   *Filter // nil: everything passes
	err      error
	list     *list // where the index keeps it; nil: it matches nothing
	at       int   // its place there
}

// NewTenant returns an empty table. Endpoints take from d what their rows leave open; the tenant of d is this one.
func NewTenant(schema string, d delivery.Defaults) *Tenant {
	d.Tenant = schema
	return &Tenant{
		schema:        schema,
		defaults:      d,
		endpoints:     make(map[outbox.UUID]*endpoint),
		subscriptions: make(map[subscriptionKey]*subscription),
		index:         newIndex(),
	}
}

// SetEndpoint puts the row in the place of the one before with the same id. The error is that of delivery.NewEndpoint. The table owns row.CustomHeaders from
// here on.
func (t *Tenant) SetEndpoint(row delivery.EndpointRow) error {
	e := t.endpoint(row.ID)
	e.known, e.row = true, row
	e.usable, e.err = delivery.NewEndpoint(row, t.defaults)
	return e.err
}

// SetDefaults has the endpoints take what their rows leave open from d. It returns the rows that could be used before and cannot be any more: their secrets
// are sealed with a key that d does not have, say.
func (t *Tenant) SetDefaults(d delivery.Defaults) (invalid []Invalid) {
	d.Tenant = t.schema
	t.defaults = d
	for id, e := range t.endpoints {
		if !e.known {
			continue
		}
		before := e.err
		if e.usable, e.err = delivery.NewEndpoint(e.row, d); before == nil && e.err != nil {
			invalid = append(invalid, Invalid{tableEndpoints, id, e.err})
		}
	}
	return invalid
}

// DeleteEndpoint forgets the row.
func (t *Tenant) DeleteEndpoint(id outbox.UUID) {
	if e := t.endpoints[id]; e != nil {
		e.row, e.known, e.usable, e.err = delivery.EndpointRow{}, false, nil, nil
		t.release(id, e)
	}
}

// Endpoint returns the endpoint, active or not; nil if there is none or its row is invalid.
func (t *Tenant) Endpoint(id outbox.UUID) *delivery.Endpoint {
	if e := t.endpoints[id]; e != nil {
		return e.usable
	}
	return nil
}

// EndpointRow returns the row that was set last, for the columns that an UPDATE leaves out. It must not be written to.
func (t *Tenant) EndpointRow(id outbox.UUID) (row delivery.EndpointRow, ok bool) {
	if e := t.endpoints[id]; e != nil {
		return e.row, e.known
	}
	return row, false
}

// Endpoints yields every row that is there, in no particular order, with the endpoint that it makes; nil if it is invalid.
func (t *Tenant) Endpoints() iter.Seq2[delivery.EndpointRow, *delivery.Endpoint] {
	return func(yield func(delivery.EndpointRow, *delivery.Endpoint) bool) {
		for _, e := range t.endpoints {
			if e.known && !yield(e.row, e.usable) {
				return
			}
		}
	}
}

// endpoint returns the entry, a new one if need be.
func (t *Tenant) endpoint(id outbox.UUID) *endpoint {
	e := t.endpoints[id]
	if e == nil {
		e = &endpoint{}
		t.endpoints[id] = e
	}
	return e
}

func (t *Tenant) release(id outbox.UUID, e *endpoint) {
	if !e.known && e.subscriptions == 0 {
		delete(t.endpoints, id)
	}
}

// SetSubscription puts the row in the place of the one before with the same id and source. The error says what is wrong with its
// pattern or filter. The table owns row.Filters from here on.
func (t *Tenant) SetSubscription(row SubscriptionRow) error {
	t.DeleteSubscription(row.ID, row.Source)
	s := &subscription{row: row, endpoint: t.endpoint(row.EndpointID)}
	s.endpoint.subscriptions++
	t.subscriptions[subscriptionKey{row.Source, row.ID}] = s
	p, err := parseEventType(&row)
	s.filter, s.err = parseFilters(row.Filters)
	s.err = errors.Join(err, s.err)
	if s.err == nil && row.Active {
		t.index.add(s, p)
	}
	return s.err
}

func parseEventType(row *SubscriptionRow) (pattern, error) {
	switch {
	case row.Source == Older:
		return nil, nil //nolint:nilnil // no pattern
	case row.EventType == "":
		return nil, errors.New("event type is empty: use one such as order.created, or ** for all")
	case isPattern(row.EventType):
		return compilePattern(row.EventType)
	default:
		return nil, nil //nolint:nilnil // an exact type
	}
}

// parseFilters spares the common filter that lets everything pass.
func parseFilters(doc []byte) (*Filter, error) {
	if bytes.Equal(doc, []byte("{}")) {
		return nil, nil //nolint:nilnil // everything passes
	}
	return CompileFilter(doc)
}

// DeleteSubscription forgets the row.
func (t *Tenant) DeleteSubscription(id outbox.UUID, source Source) {
	key := subscriptionKey{source, id}
	s := t.subscriptions[key]
	if s == nil {
		return
	}
	delete(t.subscriptions, key)
	t.index.remove(s)
	s.endpoint.subscriptions--
	t.release(s.row.EndpointID, s.endpoint)
}

// SubscriptionRow returns the row that was set last, for the columns that an UPDATE leaves out. It must not be written to.
func (t *Tenant) SubscriptionRow(id outbox.UUID, source Source) (row SubscriptionRow, ok bool) {
	if s := t.subscriptions[subscriptionKey{source, id}]; s != nil {
		return s.row, true
	}
	return row, false
}

// SetEventType puts the row in the place of the one before with the same id. The error says what is wrong with its payload_schema, which then counts as
// none: everything else of the row is in force.
func (t *Tenant) SetEventType(row EventTypeRow) error {
	t.index.deleteType(row.ID)
	t.index.setType(row)
	return t.index.schemas[row.ID].fault()
}

// DeleteEventType forgets the row. Events of the type are then matched by Current subscriptions alone.
func (t *Tenant) DeleteEventType(id outbox.UUID) { t.index.deleteType(id) }

// PayloadSchema returns what the payloads of events of a type have to match; nil: whatever they like.
func (t *Tenant) PayloadSchema(eventType string) *PayloadSchema {
	if len(t.index.schemas) == 0 {
		return nil
	}
	return t.index.schemas[t.index.typeIDs[eventType]]
}

// EventTypeRow returns the row that was set last.
func (t *Tenant) EventTypeRow(id outbox.UUID) (row EventTypeRow, ok bool) {
	row, ok = t.index.types[id]
	return row, ok
}

// Truncate forgets all rows of a table, named without its schema. Names of other tables are ignored.
func (t *Tenant) Truncate(table string) {
	switch table {
	case tableEndpoints:
		for id := range t.endpoints {
			t.DeleteEndpoint(id)
		}
	case TableEventTypes:
		for id := range t.index.types {
			t.DeleteEventType(id)
		}
	case tableCurrent, tableOlder:
		for key := range t.subscriptions {
			if key.source.String() == table {
				t.DeleteSubscription(key.id, key.source)
			}
		}
	}
}

// Count is how many endpoints there are: those that take deliveries, those that are paused, those that are not active, and those whose row cannot be used.
type Count struct{ Active, Paused, Inactive, Invalid int }

// Count counts them.
func (t *Tenant) Count() (c Count) {
	for _, e := range t.endpoints {
		switch {
		case !e.known:
		case e.usable == nil:
			c.Invalid++
		case !e.usable.Active:
			c.Inactive++
		case e.usable.Paused:
			c.Paused++
		default:
			c.Active++
		}
	}
	return c
}

// Invalid returns the rows that match nothing because of what is in them, and event types whose payload_schema counts as none, in order of table and id.
func (t *Tenant) Invalid() []Invalid {
	var all []Invalid
	for id, e := range t.endpoints {
		if e.err != nil {
			all = append(all, Invalid{tableEndpoints, id, e.err})
		}
	}
	for key, s := range t.subscriptions {
		if s.err != nil {
			all = append(all, Invalid{key.source.String(), key.id, s.err})
		}
	}
	for id, s := range t.index.schemas {
		if err := s.fault(); err != nil {
			all = append(all, Invalid{TableEventTypes, id, err})
		}
	}
	slices.SortFunc(all, func(a, b Invalid) int {
		return cmp.Or(cmp.Compare(a.Table, b.Table), bytes.Compare(a.ID[:], b.ID[:]))
	})
	return all
}
