package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"

	"github.com/neo-commons/outbox-relay/outbox"
)

// demoTenants are schemas; one has a name that has to be quoted.
func demoTenants() []string { return []string{"acme", "globex", `Initech "EU"`} }

func demoTypes() []string {
	return []string{"order.created", "order.paid", "order.line.added", "invoice.sent", "user.signed_up"}
}

// demoEndpoint is a row of webhook_endpoints.
type demoEndpoint struct {
	id            outbox.UUID
	tenant        string
	receiver      *demoReceiver
	secret        string
	subscriptions []demoSubscription
}

func (e *demoEndpoint) url() string {
	return fmt.Sprintf("http://%s/%s", e.receiver.listener.Addr(), e.id)
}

// wants tells whether the event has to reach the endpoint.
func (e *demoEndpoint) wants(tenant string, ev *demoEvent) bool {
	if tenant != e.tenant {
		return false
	}
	for _, s := range e.subscriptions {
		if s.matches(ev) {
			return true
		}
	}
	return false
}

// demoSubscription is a row of webhook_subscriptions. What matches says again in Go: it must not be the relay that says what the relay should have
// done.
type demoSubscription struct {
	pattern, filter string
	matches         func(e *demoEvent) bool
}

// demoEvent is what an event's data says.
type demoEvent struct {
	kind     string
	Amount   int      `json:"amount"`
	Currency string   `json:"currency"`
	Tags     []string `json:"tags"`
}

func newDemoEvent(rnd *rand.Rand) *demoEvent {
	types := demoTypes()
	return &demoEvent{
		kind:     types[rnd.IntN(len(types))],
		Amount:   rnd.IntN(1000),
		Currency: []string{"EUR", "USD"}[rnd.IntN(2)],
		Tags:     [][]string{{}, {"gift"}, {"gift", "express"}}[rnd.IntN(3)],
	}
}

// row is the event as the application inserts it.
func (e *demoEvent) row() (outbox.Event, error) {
	data, err := json.Marshal(e)
	aggregate, _, _ := strings.Cut(e.kind, ".")
	return outbox.Event{ID: outbox.NewUUID(), Type: e.kind, AggregateID: outbox.NewUUID(), AggregateType: aggregate, Data: data}, err
}

// demoEndpoints lets the tenants subscribe. Where two subscriptions of an endpoint match an event, it comes once.
func demoEndpoints(receivers []*demoReceiver) ([]*demoEndpoint, error) {
	healthy, flaky, dead := receivers[0], receivers[1], receivers[2]
	acme, globex, initech := demoTenants()[0], demoTenants()[1], demoTenants()[2]
	endpoints := []*demoEndpoint{
		{tenant: acme, receiver: healthy, subscriptions: []demoSubscription{
			{"order.**", `{}`, func(e *demoEvent) bool { return strings.HasPrefix(e.kind, "order.") }},
			{"order.created", `{"amount": {"$gte": 500}}`, func(e *demoEvent) bool { return e.kind == "order.created" && e.Amount >= 500 }},
		}},
		{tenant: acme, receiver: flaky, subscriptions: []demoSubscription{
			{"**", `{"currency": "EUR", "tags": "gift"}`, func(e *demoEvent) bool { return e.Currency == "EUR" && len(e.Tags) > 0 }},
		}},
		{tenant: globex, receiver: healthy, subscriptions: []demoSubscription{
			{"**", `{}`, func(*demoEvent) bool { return true }},
		}},
		{tenant: globex, receiver: dead, subscriptions: []demoSubscription{
			{"user.signed_up", `{"amount": {"$gte": 900}}`, func(e *demoEvent) bool { return e.kind == "user.signed_up" && e.Amount >= 900 }},
		}},
		{tenant: initech, receiver: healthy, subscriptions: []demoSubscription{
			{"order.*", `{}`, func(e *demoEvent) bool { return e.kind == "order.created" || e.kind == "order.paid" }},
			{"invoice.sent", `{"$or": [{"amount": {"$lt": 100}}, {"tags": "express"}]}`, func(e *demoEvent) bool {
				return e.kind == "invoice.sent" && (e.Amount < 100 || len(e.Tags) == 2)
			}},
		}},
		{tenant: initech, receiver: flaky, subscriptions: []demoSubscription{
			{"*.paid", `{"$not": {"currency": "USD"}}`, func(e *demoEvent) bool { return e.kind == "order.paid" && e.Currency == "EUR" }},
			{"user.signed_up", `{}`, func(e *demoEvent) bool { return e.kind == "user.signed_up" }},
		}},
		{tenant: initech, receiver: dead, subscriptions: []demoSubscription{
			{"order.line.added", `{"amount": {"$in": [7, 42, 99]}}`, func(e *demoEvent) bool {
				return e.kind == "order.line.added" && (e.Amount == 7 || e.Amount == 42 || e.Amount == 99)
			}},
		}},
	}
	for _, e := range endpoints {
		var err error
		e.id = outbox.NewUUID()
		if e.secret, err = e.receiver.register(e.id); err != nil {
			return nil, fmt.Errorf("secret of endpoint %s of %q: %w", e.receiver.name, e.tenant, err)
		}
	}
	return endpoints, nil
}
