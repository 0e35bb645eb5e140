package desk

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Fate is what became of an event at an endpoint.
type Fate string

// The fates.
const (
	Delivered Fate = "delivered"
	Waiting   Fate = "waiting"
	Dead      Fate = "dead"
	Cancelled Fate = "cancelled"
	Unmatched Fate = "not matched"
	NotRead   Fate = "not read yet"
	Missing   Fate = "no delivery" // though it would match now
)

// Account is what became of an event at one endpoint, and why.
type Account struct {
	EndpointID    outbox.UUID `json:"endpoint_id"`
	EndpointName  string      `json:"endpoint_name,omitempty"`
	Fate          Fate        `json:"fate"`
	Why           string      `json:"why,omitempty"`
	Delivery      *Delivery   `json:"delivery,omitempty"`
	DeadLetter    *DeadLetter `json:"dead_letter,omitempty"`
	Subscriptions []Judgement `json:"subscriptions"`
}

// Judgement is what the subscriptions, as they are now, make of the event.
type Judgement struct {
	ID        outbox.UUID `json:"id,omitzero"` // zero: the endpoint has none
	Table     string      `json:"table,omitempty"`
	EventType string      `json:"event_type,omitempty"`
	Matches   bool        `json:"matches"`
	Why       []string    `json:"why,omitempty"`
}

// Explanation is what became of an event.
type Explanation struct {
	Event     Event     `json:"event"`
	Endpoints []Account `json:"endpoints"`
	Others    int       `json:"other_endpoints"` // that have no subscription for the type
}

// endpointFacts is what an account needs to know of an endpoint besides its routing rows.
type endpointFacts struct {
	id                 outbox.UUID
	name               string
	state              State
	younger, changed   bool          // than the event
	youngSubscriptions []outbox.UUID // made after the event
}

// Explain tells why the event did or did not reach an endpoint, zero for all that have something to do with it. rows are the tenant's.
func (d *Desk) Explain(ctx context.Context, rows *store.TenantRows, defaults delivery.Defaults, event, endpoint outbox.UUID) (*Explanation, error) {
	x, err := d.event(ctx, event)
	if err != nil {
		return nil, err
	}
	facts, err := d.endpointFacts(ctx, endpoint, event)
	if err != nil {
		return nil, err
	}
	accounts := make(map[outbox.UUID]*Account)
	account := func(id outbox.UUID) *Account {
		if accounts[id] == nil {
			accounts[id] = &Account{EndpointID: id, EndpointName: facts[id].name, Subscriptions: []Judgement{}}
		}
		return accounts[id]
	}
	wanted := func(id outbox.UUID) bool { return endpoint.IsZero() || id == endpoint }
	for i := range x.Deliveries {
		if wanted(x.Deliveries[i].EndpointID) {
			account(x.Deliveries[i].EndpointID).Delivery = &x.Deliveries[i]
		}
	}
	for i := range x.DeadLetters {
		if wanted(x.DeadLetters[i].EndpointID) {
			account(x.DeadLetters[i].EndpointID).DeadLetter = &x.DeadLetters[i]
		}
	}
	concerned := make(map[outbox.UUID]bool)
	if !x.Gone {
		for _, v := range rows.Routing(defaults).Explain(x.routed(), endpoint) {
			a := account(v.Endpoint)
			concerned[v.Endpoint] = concerned[v.Endpoint] || v.Fits
			a.Subscriptions = append(a.Subscriptions, judge(&v))
		}
	}
	if !endpoint.IsZero() && accounts[endpoint] == nil {
		if _, known := facts[endpoint]; !known {
			return nil, d.notFound(ctx, "endpoint", endpoint)
		}
		account(endpoint)
	}
	e := &Explanation{Event: x.Event, Endpoints: []Account{}}
	for id, a := range accounts {
		if endpoint.IsZero() && a.Delivery == nil && a.DeadLetter == nil && !concerned[id] {
			e.Others++
			continue
		}
		f, known := facts[id]
		if !known {
			f.state.State = "gone"
		}
		a.judge(d, &x.Event, &f)
		e.Endpoints = append(e.Endpoints, *a)
	}
	slices.SortFunc(e.Endpoints, func(a, b Account) int {
		return cmp.Or(strings.Compare(a.EndpointName, b.EndpointName), bytes.Compare(a.EndpointID[:], b.EndpointID[:]))
	})
	return e, nil
}

// routed is the event as the relay would route it.
func (e *Event) routed() *outbox.Event {
	return &outbox.Event{
		ID: e.ID, Type: e.Type, AggregateID: e.AggregateID, AggregateType: e.AggregateType, ContextID: e.ContextID, Data: e.data, Metadata: e.metadata,
	}
}

func judge(v *route.Verdict) Judgement {
	j := Judgement{ID: v.Subscription, EventType: v.EventType, Matches: v.Matches(), Why: v.Why}
	if !v.Subscription.IsZero() {
		j.Table = v.Source.String()
	}
	return j
}

// endpointFacts reads those of one endpoint, zero for all.
func (d *Desk) endpointFacts(ctx context.Context, endpoint, event outbox.UUID) (map[outbox.UUID]endpointFacts, error) {
	list, err := collect(ctx, d, "look up endpoints", func(row pgx.CollectableRow) (f endpointFacts, err error) {
		return f, row.Scan(append([]any{&f.id, &f.name, &f.younger, &f.changed, &f.youngSubscriptions}, f.state.fields()...)...)
	}, `
SELECT e.id, coalesce(e.name, '')::text, coalesce(e.created_at > v.at, false), coalesce(e.updated_at > v.at, false),
  ARRAY(SELECT s.id FROM {tenant}.webhook_subscriptions s WHERE s.endpoint_id = e.id AND s.created_at > v.at
    UNION ALL SELECT s.id FROM {tenant}.webhook_event_subscriptions s WHERE s.webhook_endpoint_id = e.id AND s.created_at > v.at), `+stateColumns+`
FROM {tenant}.webhook_endpoints e`+healthJoin+`$3::text
LEFT JOIN (SELECT coalesce(v.created_at, v.occurred_at) AS at FROM {tenant}.webhook_events v WHERE v.id = $2::uuid) v ON true
WHERE $1::uuid IS NULL OR e.id = $1::uuid`, endpoint, event, d.tenant)
	facts := make(map[outbox.UUID]endpointFacts, len(list))
	for _, f := range list {
		facts[f.id] = f
	}
	return facts, err
}

// judge says what became of the event at the endpoint.
func (a *Account) judge(d *Desk, e *Event, f *endpointFacts) {
	if a.Delivery != nil {
		a.judgeDelivery(d, f)
		return
	}
	if a.DeadLetter != nil {
		a.Fate, a.Why = Dead, letterText(a.DeadLetter)
		return
	}
	a.Fate = Unmatched
	var matching []outbox.UUID
	for _, s := range a.Subscriptions {
		if s.Matches {
			matching = append(matching, s.ID)
		}
	}
	switch {
	case len(matching) == 0:
	case e.Progress != Read:
		a.Fate, a.Why = NotRead, "it matches, and will be delivered when it is read"
		if e.Progress == Before {
			a.Fate, a.Why = Missing, "the event is older than the tenant's place in the log"
		}
	default:
		a.Fate, a.Why = Missing, f.missing(matching)
	}
}

// missing says what may be behind a delivery that is not there though it would be made now.
func (f *endpointFacts) missing(matching []outbox.UUID) string {
	young := 0
	for _, id := range matching {
		if slices.Contains(f.youngSubscriptions, id) {
			young++
		}
	}
	switch {
	case f.younger:
		return "the endpoint was made after the event"
	case young == len(matching):
		return "what matches now was subscribed after the event"
	case f.changed:
		return "the endpoint's row was changed after the event, and may not have matched before; or retention has removed the delivery"
	}
	return "retention has removed the delivery, or a row was changed after the event and did not match before"
}

func (a *Account) judgeDelivery(d *Desk, f *endpointFacts) {
	x := a.Delivery
	switch x.Status {
	case "success":
		a.Fate = Delivered
	case "failed":
		a.Fate, a.Why = Dead, x.Error
		if a.DeadLetter != nil {
			a.Why = letterText(a.DeadLetter)
		}
	case "cancelled":
		a.Fate, a.Why = Cancelled, x.Error
	default:
		a.Fate, a.Why = Waiting, d.why(x, &f.state, nil)
	}
}

func letterText(l *DeadLetter) string {
	text := l.Error
	if l.ErrorCode != "" {
		text = strings.TrimSuffix(l.ErrorCode+": "+text, ": ")
	}
	if l.State != "open" {
		text += "; the dead letter was " + l.State
	}
	return text
}
