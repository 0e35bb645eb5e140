package relay

import (
	"encoding/json"
	"maps"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// The types of the relay's own news.
const (
	newsFailing    = route.NewsPrefix + "endpoint.failing"    // every attempt has failed for health.warn_after
	newsDisabled   = route.NewsPrefix + "endpoint.disabled"   // by the relay
	newsRecovered  = route.NewsPrefix + "endpoint.recovered"  // a success after failing was told
	newsUnverified = route.NewsPrefix + "endpoint.unverified" // the last try to verify it has failed
	newsExhausted  = route.NewsPrefix + "delivery.exhausted"  // a dead letter: the last attempt has failed
	newsDead       = route.NewsPrefix + "delivery.dead"       // a dead letter before that: the answer was final
)

// newsOfEndpoint makes news whose subject is an endpoint. Facts go with the id.
func newsOfEndpoint(kind string, key laneKey, facts map[string]any) *store.News {
	data := map[string]any{"endpoint_id": key.endpoint}
	maps.Copy(data, facts)
	text, err := json.Marshal(data)
	if err != nil {
		text = []byte("{}") // our own few types always marshal
	}
	return &store.News{Tenant: key.tenant, Event: outbox.Event{
		ID: outbox.NewUUID(), Type: kind, AggregateID: key.endpoint, AggregateType: "webhook_endpoint", Data: text,
	}}
}

// newsOfDead tells of a dead letter. Neither the payload nor the receiver's answer is in it.
func newsOfDead(o *store.Outcome) *store.News {
	kind, class, fault := newsDead, string(o.Result.Class), o.Result.Err
	if !o.Attempted {
		class, fault = o.Code, o.Reason
	} else if o.Result.Class.Retryable() && o.Result.Directive == delivery.DirectiveNone {
		kind = newsExhausted
	}
	facts := map[string]any{
		"delivery_id": o.Delivery.ID, "event_id": o.Delivery.EventID, "attempts": o.Delivery.Attempts, "replay": o.Delivery.Replay,
		"error_class": class, "error": fault,
	}
	if o.Result.Status > 0 {
		facts["status"] = o.Result.Status
	}
	n := newsOfEndpoint(kind, laneKey{o.Delivery.Tenant, o.Delivery.EndpointID}, facts)
	n.About = o.Delivery.EventID
	return n
}
