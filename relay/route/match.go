package route

import (
	"bytes"
	"fmt"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// Target is an endpoint that an event goes to, and the first by id of its subscriptions that match.
type Target struct {
	Endpoint     *delivery.Endpoint
	Subscription outbox.UUID
	// Undecided says that the filter of the subscription was not held against the event to the end: see MatchBudget.
	Undecided bool
	// Fault is why, if it was not that budget: a panic, of which the event is no more than the occasion.
	Fault string
}

// MatchBudget is over how many bytes of JSON the filters of all subscriptions may walk for one event, and a quarter of it is for one filter: half a second or so. They
// walk over what they look into, not over what stands beside it: no more than a few thousand conditions on data of any size come near it, unless they look for something in
// arrays of some MiB. What is over it would hold up the events of all tenants, and let a connection to the server run out of time in the end.
const (
	MatchBudget  = 256 << 20
	filterBudget = MatchBudget / 4
)

// Match appends one target for each active endpoint that a subscription sends e to, in no particular order.
func (t *Tenant) Match(e *outbox.Event, dst []Target) []Target {
	p := t.index.plan(e.Type)
	if p.disabled {
		return dst
	}
	r := round{event: e, verifiedOnly: p.verifiedOnly, targets: dst}
	t.match(p, &r)
	return r.targets
}

// MatchFor is Match for one endpoint, with a budget of its own. It returns false if the event does not go there.
func (t *Tenant) MatchFor(e *outbox.Event, endpoint outbox.UUID) (Target, bool) {
	p := t.index.plan(e.Type)
	only := t.endpoints[endpoint]
	if p.disabled || only == nil {
		return Target{}, false
	}
	r := round{event: e, verifiedOnly: p.verifiedOnly, only: only}
	t.match(p, &r)
	if len(r.targets) == 0 {
		return Target{}, false
	}
	return r.targets[0], true
}

func (t *Tenant) match(p *plan, r *round) {
	t.index.round++
	r.number, r.left, r.outline = t.index.round, MatchBudget, &t.index.outline
	defer r.outline.drop()
	for _, b := range p.buckets {
		r.choose(b.lists[outbox.UUID{}])
		if id := r.event.ContextID; !id.IsZero() {
			r.choose(b.lists[id])
		}
	}
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
	outline      *outline
	left         int       // of MatchBudget
	only         *endpoint // nil: any
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
		if r.only != nil && e != r.only || e.usable == nil || !e.usable.Active || r.verifiedOnly && !e.usable.Verified {
			continue
		}
		chosen := e.round == r.number
		if chosen && !r.targets[e.target].Undecided && bytes.Compare(r.targets[e.target].Subscription[:], s.row.ID[:]) <= 0 {
			continue
		}
		matches, decided, fault := true, true, ""
		if s.filter != nil {
			matches, decided, fault = r.filter(s.filter)
		}
		switch {
		case decided && !matches, !decided && chosen:
			continue
		case chosen:
			r.targets[e.target] = Target{Endpoint: e.usable, Subscription: s.row.ID}
			continue
		}
		e.round, e.target = r.number, len(r.targets)
		r.targets = append(r.targets, Target{Endpoint: e.usable, Subscription: s.row.ID, Undecided: !decided, Fault: fault})
	}
}

// filter holds a filter against the event. One event must not end the process again and again, for all tenants: a panic leaves it undecided.
func (r *round) filter(f *Filter) (matches, decided bool, fault string) {
	part := min(r.left, filterBudget)
	if part <= 0 {
		return false, false, ""
	}
	r.left -= part
	defer func() {
		r.left += part
		if p := recover(); p != nil {
			r.outline = nil // it may be half made
			matches, decided, fault = false, false, fmt.Sprint(p)
		}
	}()
	matches, decided = f.match(r.event, r.outline, &part)
	return matches, decided, ""
}
