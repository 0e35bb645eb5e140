package route

import (
	"slices"
	"strings"

	"github.com/neo-commons/outbox-relay/outbox"
)

// index finds the subscriptions for an event type. Those with the same type or pattern share a bucket; a plan lists the buckets for
// a type, so that an event costs one look-up and not a try of each pattern.
//
//	event type ──► plan ──► bucket of the exact type      ──► list for any context
//	                   ├──► bucket of the event type's id ──► list for the event's context
//	                   └──► buckets of patterns
type index struct {
	buckets  map[bucketKey]*bucket
	patterns map[bucketKey]*bucket // those of buckets that have one
	types    map[outbox.UUID]EventTypeRow
	typeIDs  map[string]outbox.UUID
	schemas  map[outbox.UUID]*PayloadSchema // of the types that have one
	plans    map[string]*plan               // for the types seen since their buckets or rows last changed
	round    uint64
	outline  outline // of the event that is matched
}

// maxPlans bounds the memory for event types that come once and never again: some 300 kB a tenant with the longest types, and few patterns. A plan is made in microseconds.
const maxPlans = 1_000

// plan is what Match has to know of an event type.
type plan struct {
	buckets      []*bucket
	disabled     bool
	verifiedOnly bool
}

// bucketKey is the type or pattern of a Current subscription, or the event type's id of an Older one, so that these follow when
// their event type arrives late or is called otherwise.
type bucketKey struct {
	text   string
	typeID outbox.UUID
}

type bucket struct {
	pattern pattern // nil: none
	lists   map[outbox.UUID]*list
}

// list holds the subscriptions of a bucket for one context, the zero UUID for any. It is never empty.
type list struct{ subscriptions []*subscription }

func newIndex() index {
	return index{
		buckets:  make(map[bucketKey]*bucket),
		patterns: make(map[bucketKey]*bucket),
		types:    make(map[outbox.UUID]EventTypeRow),
		typeIDs:  make(map[string]outbox.UUID),
		schemas:  make(map[outbox.UUID]*PayloadSchema),
		plans:    make(map[string]*plan),
	}
}

func (x *index) plan(eventType string) *plan {
	p := x.plans[eventType]
	if p == nil {
		if len(x.plans) >= maxPlans {
			clear(x.plans)
		}
		p = x.newPlan(eventType)
		x.plans[strings.Clone(eventType)] = p // a clone: the string may be a piece of a large event
	}
	return p
}

func (x *index) newPlan(eventType string) *plan {
	p := &plan{}
	if b := x.buckets[bucketKey{text: eventType}]; b != nil && b.pattern == nil {
		p.buckets = append(p.buckets, b)
	}
	if id, ok := x.typeIDs[eventType]; ok {
		row := x.types[id]
		p.disabled, p.verifiedOnly = !row.Enabled, row.RequiresVerification
		if b := x.buckets[bucketKey{typeID: id}]; b != nil {
			p.buckets = append(p.buckets, b)
		}
	}
	for _, b := range x.patterns {
		if b.pattern.match(eventType) {
			p.buckets = append(p.buckets, b)
		}
	}
	return p
}

// dropPlans forgets the plans in which the bucket is, or will be.
func (x *index) dropPlans(key bucketKey, b *bucket) {
	if b.pattern == nil {
		delete(x.plans, key.text)
		delete(x.plans, x.types[key.typeID].EventType)
		return
	}
	for eventType := range x.plans {
		if b.pattern.match(eventType) {
			delete(x.plans, eventType)
		}
	}
}

func (x *index) setType(row EventTypeRow) {
	x.types[row.ID] = row
	x.typeIDs[row.EventType] = row.ID
	if row.PayloadSchema != "" {
		x.schemas[row.ID] = compilePayloadSchema(row.PayloadSchema)
	}
	delete(x.plans, row.EventType)
}

func (x *index) deleteType(id outbox.UUID) {
	row, ok := x.types[id]
	if !ok {
		return
	}
	delete(x.types, id)
	delete(x.schemas, id)
	if x.typeIDs[row.EventType] == id {
		delete(x.typeIDs, row.EventType)
	}
	delete(x.plans, row.EventType)
}

// keyOf returns where s belongs.
func keyOf(row *SubscriptionRow) bucketKey {
	if row.Source == Older {
		return bucketKey{typeID: row.EventTypeID}
	}
	return bucketKey{text: row.EventType}
}

// add takes in a subscription, for the pattern p unless that is nil.
func (x *index) add(s *subscription, p pattern) {
	key := keyOf(&s.row)
	b := x.buckets[key]
	if b == nil {
		b = &bucket{pattern: p, lists: make(map[outbox.UUID]*list)}
		x.buckets[key] = b
		if p != nil {
			x.patterns[key] = b
		}
		x.dropPlans(key, b)
	}
	l := b.lists[s.row.ContextID]
	if l == nil {
		l = &list{}
		b.lists[s.row.ContextID] = l
	}
	s.list, s.at = l, len(l.subscriptions)
	l.subscriptions = append(l.subscriptions, s)
}

// remove takes out a subscription, if it was added.
func (x *index) remove(s *subscription) {
	l := s.list
	if l == nil {
		return
	}
	end := len(l.subscriptions) - 1
	moved := l.subscriptions[end]
	l.subscriptions[s.at], moved.at = moved, s.at
	l.subscriptions = slices.Delete(l.subscriptions, end, end+1)
	s.list = nil
	if end > 0 {
		return
	}

	key := keyOf(&s.row)
	b := x.buckets[key]
	delete(b.lists, s.row.ContextID)
	if len(b.lists) == 0 {
		delete(x.buckets, key)
		delete(x.patterns, key)
		x.dropPlans(key, b)
	}
}
