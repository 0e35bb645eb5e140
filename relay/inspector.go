package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
)

// What error_code says of events that are dead letters from the start.
const (
	codeEvent  = "event_invalid"  // it breaks a bound of Config.Validation or that of filters, or has no id
	codeSchema = "schema_invalid" // it does not match the payload_schema of its type
)

var errNoID = errors.New("its id is the nil UUID")

// A refusal says why an event is not sent. The zero value says that it is.
type refusal struct{ code, reason string }

// of is what is refused for one endpoint: also an event of which nobody knows whether it wants it. It must not be lost without a word, and not be sent by chance.
func (r refusal) of(t *route.Target) refusal {
	if r.code == "" && t.Fault != "" {
		return refusal{codeEvent, fmt.Sprintf("the filter of subscription %s: panic: %s: this is a fault of outbox-relay", t.Subscription, t.Fault)}
	}
	if r.code == "" && t.Undecided {
		return refusal{codeEvent, fmt.Sprintf("not held against the filter of subscription %s to the end: for one event all filters walk over %v of JSON at most, each over a quarter of that", t.Subscription,
			ByteSize(route.MatchBudget))}
	}
	return r
}

// An inspector holds matched events against the bounds and the schemas of the configuration. It is safe for concurrent use.
type inspector struct {
	limits  outbox.Limits
	schemas SchemaMode
	metrics *metrics     // nil: nobody counts
	log     *slog.Logger // nil: nobody is told

	mu   sync.Mutex
	told map[told]*silence
}

// told is what one line of the log in a while is for.
type told struct{ tenant, code string }

// silence is how much has been left unsaid since the last line.
type silence struct {
	teller
	unsaid int
}

// complainAgain is how soon events of a tenant are complained of again for the same.
const complainAgain = time.Minute

func newInspector(cfg *Config, m *metrics, log *slog.Logger) *inspector {
	return &inspector{limits: cfg.EventLimits(), schemas: cfg.Validation.PayloadSchema, metrics: m, log: log, told: make(map[told]*silence)}
}

func (i *inspector) checksSchemas() bool { return i.schemas != SchemaOff }

// schemaTable knows the schemas of a tenant's event types.
type schemaTable interface {
	PayloadSchema(eventType string) *route.PayloadSchema
}

// look says whether a matched event is to be sent, as far as that is the same for all its targets.
func (i *inspector) look(tenant string, table schemaTable, e *outbox.Event, targets []route.Target) refusal {
	err := i.limits.Check(e)
	if e.ID.IsZero() { // which stands for none: a receiver could not tell it from that of another tenant
		err = errNoID
	}
	if err != nil {
		r := refusal{codeEvent, err.Error()}
		i.complain(tenant, e, r, false)
		return r
	}
	if n := slices.IndexFunc(targets, func(t route.Target) bool { return t.Undecided }); n >= 0 {
		i.complain(tenant, e, refusal{}.of(&targets[n]), false)
	}
	if i.schemas == SchemaOff {
		return refusal{}
	}
	reason := table.PayloadSchema(e.Type).Check(e.Data)
	if reason == "" {
		return refusal{}
	}
	r := refusal{codeSchema, reason}
	i.complain(tenant, e, r, i.schemas == SchemaWarn)
	if i.schemas == SchemaWarn {
		return refusal{}
	}
	return r
}

// complain counts the event, and tells of it unless the same was told of the tenant a moment ago. The reason has nothing of the payload.
func (i *inspector) complain(tenant string, e *outbox.Event, r refusal, sent bool) {
	if i.metrics == nil {
		return
	}
	i.metrics.invalidEvents[r.code].Inc()
	i.mu.Lock()
	defer i.mu.Unlock()
	s := i.told[told{tenant, r.code}]
	if s == nil {
		s = &silence{}
		i.told[told{tenant, r.code}] = s
	}
	if !s.due(time.Now(), complainAgain) {
		s.unsaid++
		return
	}
	i.log.Warn("an event is not valid", "tenant", tenant, "event", e.ID, "event_type", e.Type, "code", r.code, "reason", r.reason, "sent", sent, "unsaid", s.unsaid)
	s.unsaid = 0
}
