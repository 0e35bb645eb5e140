package relay

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// The audit compares what has been committed with what is recorded, past all that the relay believes of itself: events that were handled long ago by the
// snapshot that was saved, match a subscription, and have no delivery. There should be none. The leader looks at what a snapshot has newly come to cover
// before it saves it; anybody may look at any period with Audit.

// AuditOptions choose what Audit looks at.
type AuditOptions struct {
	Tenants      []string  // nil: all that are registered on the shard
	Since, Until time.Time // when the events occurred; zero: no bound
	// Thorough compares every event with every endpoint. Else only events that have no delivery at all are looked at, which is much faster.
	Thorough bool
	// Repair queues what is missing.
	Repair bool
	// Found is told of each delivery that is missing. Progress is told of each tenant before it is looked at. Both may be nil, and are called by the goroutine
	// that called Audit.
	Found    func(tenant string, event, endpoint outbox.UUID)
	Progress func(tenant string)
}

// AuditReport is what Audit has found in one tenant.
type AuditReport struct {
	Tenant  string `json:"tenant"`
	Events  int64  `json:"events"`            // handled in the period
	Missing int64  `json:"missing"`           // deliveries
	Queued  int64  `json:"queued,omitempty"`  // of these
	Skipped string `json:"skipped,omitempty"` // why the tenant was not looked at, or not to the end
	Failed  bool   `json:"failed,omitempty"`  // an error is why
	// Added is when the tenant was added, if that is within the period: events from before are left out. Zero: it is not.
	Added time.Time `json:"added_at,omitzero"`
	// Restored is when the tenant came from another cluster, by a restore or with its schema, likewise: events from before are left out.
	Restored time.Time `json:"restored_at,omitzero"`
}

// Audit looks for deliveries of the store's shard that are missing. It judges by the subscriptions as they are now: an event from before its subscription counts as missing.
// It only reads, unless it is to repair.
func Audit(ctx context.Context, st *store.Store, cfg *Config, o AuditOptions) ([]AuditReport, error) {
	registry, err := st.LoadShard(ctx, o.Tenants, math.MaxUint64, nil)
	if err != nil {
		return nil, err
	}
	handled, err := st.Handled(ctx)
	if err != nil {
		return nil, err
	}
	if handled.String() == "" && (cfg.Database.Shards == 1 || len(registry.Tenants) > 0) {
		return nil, errors.New("nothing has been handled yet: a relay saves what it has handled after half a minute")
	}
	var reports []AuditReport
	for i := range registry.Tenants {
		rows := &registry.Tenants[i]
		if !cfg.Tenants.Includes(rows.Schema) {
			continue
		}
		if o.Progress != nil {
			o.Progress(rows.Schema)
		}
		report := AuditReport{Tenant: rows.Schema}
		switch {
		case rows.Err != nil:
			report.Skipped, report.Failed = rows.Err.Error(), true
		case rows.State == store.StateSuspended:
			report.Skipped = "suspended: " + rows.Reason
		case rows.Backfilling:
			report.Skipped = "earlier events are still being queued"
		default:
			if rows.Added.After(o.Since) {
				report.Added = rows.Added.UTC()
			}
			if rows.Restored.After(o.Since) {
				report.Restored = rows.Restored.UTC()
			}
			table := rows.Routing(cfg.EndpointDefaults())
			a := auditor{
				store: st, cfg: cfg, table: table, inspector: newInspector(cfg, nil, nil), repair: o.Repair, thorough: o.Thorough, found: o.Found,
				span: store.Range{Tenant: rows.Schema, To: handled, Since: o.Since, Until: o.Until},
			}
			if report.Events, err = st.CountEvents(ctx, a.span); err == nil {
				err = a.run(ctx)
			}
			report.Missing, report.Queued = a.missing, a.queued
		}
		if broken, ok := errors.AsType[*store.TenantError](err); ok {
			report.Skipped, report.Failed, err = broken.Err.Error(), true, nil
		}
		if err != nil {
			return reports, err
		}
		reports = append(reports, report)
	}
	return reports, nil
}

// An auditor looks at one tenant.
type auditor struct {
	store     *store.Store
	cfg       *Config
	table     matcher
	inspector *inspector
	span      store.Range
	epoch     int64 // of a leader; zero: of nobody
	thorough  bool
	repair    bool
	found     func(tenant string, event, endpoint outbox.UUID)
	repaired  func([]store.Outcome) // is told what has been queued; nil: nobody is

	missing, queued int64
	first           outbox.UUID // event
}

// matcher is a routing table.
type matcher interface {
	Wants(eventType string) bool
	Match(e *outbox.Event, dst []route.Target) []route.Target
	PayloadSchema(eventType string) *route.PayloadSchema
}

func (a *auditor) run(ctx context.Context) error {
	types, err := a.store.UnaccountedTypes(ctx, a.span, a.thorough)
	if err != nil {
		return err
	}
	types = slices.DeleteFunc(types, func(name string) bool { return !a.table.Wants(name) })
	if len(types) == 0 {
		return nil
	}
	var last outbox.UUID
	for done := false; !done; {
		var events []store.Unaccounted
		if events, done, err = a.store.UnaccountedPage(ctx, a.span, types, a.thorough, last, backfillPage); err != nil {
			return err
		}
		var p portion
		for i := range events {
			a.look(&events[i], &p)
			last = events[i].ID
			// An event's own go together, however many: with one delivery of it, it would count as handled.
			if p.holds(1, a.cfg) || i == len(events)-1 {
				if err := a.queue(ctx, p.out); err != nil {
					return err
				}
				p = portion{}
			}
		}
	}
	return nil
}

func (a *auditor) queue(ctx context.Context, out []store.Outcome) error {
	if len(out) == 0 {
		return nil
	}
	if err := a.store.Queue(ctx, a.epoch, out); err != nil {
		return fmt.Errorf("queue what is missing: %w", err)
	}
	a.queued += int64(len(out))
	if a.repaired != nil {
		a.repaired(out)
	}
	return nil
}

// look compares one event with its deliveries, and adds what is missing if that is to be repaired.
func (a *auditor) look(u *store.Unaccounted, p *portion) {
	var m messages
	var refused *refusal
	targets := a.table.Match(&u.Event, nil)
	for _, target := range targets {
		// Which are undecided is a matter of chance: the stream may have found out that the endpoint does not want it.
		if target.Undecided || slices.Contains(u.Delivered, target.Endpoint.ID) {
			continue
		}
		if a.missing++; a.first.IsZero() {
			a.first = u.ID
		}
		if a.found != nil {
			a.found(a.span.Tenant, u.ID, target.Endpoint.ID)
		}
		if !a.repair {
			continue
		}
		if refused == nil {
			r := a.inspector.look(a.span.Tenant, a.table, &u.Event, targets)
			refused = &r
		}
		p.add(missed(a.span.Tenant, &u.Event, target, &m, 0, a.cfg.Delivery.Source, store.DeferAudit, *refused))
	}
}

// auditReach is how old what an event tells of may be when it is committed, to be looked at as it comes. Rows that came from another cluster without anybody knowing, with a
// schema that was added without a backfill say, carry transaction ids of that: for years to come there may be some that seem to have been committed just now. They are old by
// then, and nobody waits for them any more.
const auditReach = 7 * 24 * time.Hour

// audit looks, before a snapshot is saved, at what it shows and the one before does not. A tenant whose subscriptions have changed meanwhile is left
// out: what they would match now they did not match then. So is one that has just been found not to be published: it is suspended, and has a backfill to come.
// Without routes, the one before is of another session, and so are deliveries of what came since: the rows of a tenant must be what that one knew last.
func (s *session) audit(ctx context.Context, from, to store.Snapshot, routes map[string]version, unpublished map[string]string) error {
	var steady []string
	for _, t := range s.served() {
		if !t.is(store.StateActive) || t.isFilling() || t.isGone() || t.until != 0 || unpublished[t.schema] != "" {
			continue
		}
		now := t.version()
		before, known := routes[t.schema]
		if routes == nil {
			before, known = version{digest: now.digest}, t.steady
		}
		if known && now == before { // not one that has come meanwhile: what its events matched before is not known
			steady = append(steady, t.schema)
		}
	}
	eventful, err := s.store.Eventful(ctx, steady, from, to)
	if err != nil {
		return err
	}
	for _, name := range eventful {
		t := s.tenant(name)
		if t == nil {
			continue
		}
		a := auditor{
			store: s.store, cfg: s.cfg(), table: t, inspector: s.inspector, span: store.Range{Tenant: name, From: from, To: to, Since: time.Now().Add(-auditReach)},
			epoch: s.epoch, repair: true, repaired: s.queued,
		}
		err := a.run(ctx)
		if _, broken := errors.AsType[*store.TenantError](err); broken {
			s.log.Warn("audit: the tenant's tables cannot be read", "tenant", name, "error", err)
			continue
		}
		if err != nil {
			return err
		}
		if a.missing > 0 {
			s.metrics.auditFindings.Add(float64(a.missing))
			s.log.Error("audit: committed events had no delivery; it is being queued", "tenant", name, "deliveries", a.missing, "first_event", a.first,
				"check", "whether somebody has changed publications, slot or tables; outbox-relay audit looks at earlier events")
		}
	}
	return nil
}

// missed makes a pending row of an event that did not come by the log, to stand at a place in it; zero: before all that the log brings. Those of one place
// keep the order of the pages. What is refused becomes a dead letter instead.
func missed(tenant string, e *outbox.Event, target route.Target, m *messages, at wal.LSN, source, reason string, refused refusal) store.Outcome {
	ep := target.Endpoint
	o := store.Outcome{
		Delivery: &store.Delivery{
			ID: uncommittedID(), Tenant: tenant, EventID: e.ID, EndpointID: ep.ID, URL: ep.URL, Method: ep.Method, Message: m.of(nil, ep.Format, e, source),
			EventType: e.Type, Subscription: target.Subscription, Order: place(ep, e, at, 0),
		},
		Status: store.Pending, Reason: reason, Park: ep.Paused,
	}
	if refused = refused.of(&target); refused.code != "" {
		o.Status, o.Code, o.Reason, o.Park = store.Failed, refused.code, refused.reason, false
	}
	return o
}
