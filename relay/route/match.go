package route

import (
	"bytes"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// Target is an endpoint that an event goes to, and the first by id of its subscriptions that match.
type Target struct {
	Endpoint     *delivery.Endpoint
	Subscription outbox.UUID
	// Undecided says that the filter of the subscription was not held against the event: those before it had used up MatchBudget.
	Undecided bool
}

// MatchBudget is over how many bytes of JSON the filters of all subscriptions may walk for one event, some tenths of a second. Every condition walks over the object
// that it looks into: 100,000 subscriptions with a filter stay below that with a payload of 1 KiB, and few come near it with one of any size. What is over it would
// hold up the events of all tenants, and let a connection to the server run out of time in the end.
const MatchBudget = 256 << 20

// Match appends one target for each active endpoint that a subscription sends e to, in no particular order.
func (t *Tenant) Match(e *outbox.Event, dst []Target) []Target {
	p := t.index.plan(e.Type)
	if p.disabled {
		return dst
	}
	t.index.round++
	r := round{number: t.index.round, event: e, left: MatchBudget, verifiedOnly: p.verifiedOnly, targets: dst}
	for _, b := range p.buckets {
		r.choose(b.lists[outbox.UUID{}])
		if !e.ContextID.IsZero() {
			r.choose(b.lists[e.ContextID])
		}
	}
	return r.targets
}

// Wants tells whether any subscription is for the type: whether Match may have targets for an event of it.
func (t *Tenant) Wants(eventType string) bool {
	p := t.index.plan(eventType)
	return !p.disabled && len(p.buckets) > 0
}

// round is one Match.
type round struct {
	number       uint64
	event        *outbox.Event
	left         int // of MatchBudget
	verifiedOnly bool
	targets      []Target
}

// choose adds the endpoints of the subscriptions in list that match.
func (r *round) choose(l *list) {
	if l == nil {
		return
	}
	for _, s := range l.subscriptions {
		e := s.endpoint
		if e.usable == nil || !e.usable.Active || r.verifiedOnly && !e.usable.Verified {
			continue
		}
		chosen := e.round == r.number
		if chosen && !r.targets[e.target].Undecided && bytes.Compare(r.targets[e.target].Subscription[:], s.row.ID[:]) <= 0 {
			continue
		}
		matches, decided := true, true
		if s.filter != nil {
			matches, decided = s.filter.match(r.event, &r.left)
		}
		switch {
		case decided && !matches, !decided && chosen:
			continue
		case chosen:
			r.targets[e.target].Subscription, r.targets[e.target].Undecided = s.row.ID, false
			continue
		}
		e.round, e.target = r.number, len(r.targets)
		r.targets = append(r.targets, Target{Endpoint: e.usable, Subscription: s.row.ID, Undecided: !decided})
	}
}
