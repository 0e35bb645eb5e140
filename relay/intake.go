package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// lookupBatch is how many deliveries, and lookupBytes how much memory of theirs, are looked up at once while the stream repeats what an earlier
// session may have recorded.
const (
	lookupBatch = 512
	lookupBytes = 8 << 20
)

// idlePosition is how often a position without outcomes is recorded at most, and idleBytes how far it must have moved: less would make the
// record of the position the only traffic there is.
const (
	idlePosition = 5 * time.Second
	idleBytes    = 16 << 10
)

// Begin starts a transaction of the stream. Events of one whose commit is covered by the recorded position are skipped. Changes of
// the routing tables are not: whether a table has been loaded with them, its tenant knows (wants).
func (s *session) Begin(ctx context.Context, b wal.Begin) error {
	if b.CommitLSN > s.startHigh {
		if err := s.lookUp(ctx); err != nil {
			return err
		}
	}
	s.tx = transaction{
		begin:  b,
		skip:   b.CommitLSN < s.start,
		repeat: b.CommitLSN <= s.startHigh && !failpoint.Planted(failpoint.AckCommitLSN),
		entry:  noCommit,
	}
	return nil
}

// Change takes one row of the open transaction: an event is matched and goes on its way, a row of the routing table takes effect.
func (s *session) Change(ctx context.Context, c *wal.Change) error {
	rel := s.relation(c.Relation)
	switch rel.kind {
	case tableEvents:
		if s.tx.skip || c.Op != wal.Insert {
			return nil
		}
		s.tx.n++ // whosever it is: the place of an event is the same each time the log is read, whichever tenants are ours then
		if rel.tenant == nil || !rel.tenant.brings(s.tx.begin.CommitLSN) {
			return nil
		}
		return s.event(ctx, rel, c)
	case tableTenants:
		return s.tenantChanged(ctx, c)
	case tableEndpoints, tableEventTypes, tableSubscriptions, tableOlderSubscriptions:
		if rel.tenant == nil || !rel.tenant.wants(s.tx.begin) {
			return nil
		}
		if err := s.registryChanged(rel, c); err != nil {
			return s.suspend(ctx, rel.tenant, err)
		}
	case tableOther:
	}
	return nil
}

// Commit ends the transaction: from here on its position may be covered.
func (s *session) Commit(_ context.Context, c wal.Commit) error {
	if s.tx.skip {
		return nil
	}
	if failpoint.Planted(failpoint.AckCommitLSN) {
		c.EndLSN = c.CommitLSN
	}
	s.ledger.end(s.tx.entry, c.EndLSN)
	if s.tx.entry == noCommit { // events that match nothing may be all there is
		s.recordPosition(s.owes())
	}
	s.metrics.read(c.CommitTime)
	return nil
}

// Keepalive tells that the server has sent everything before lsn. When nothing is in the works, that position is recorded, now and then, or at
// once if the server asks: it does so while it shuts down.
func (s *session) Keepalive(ctx context.Context, lsn wal.LSN, replyRequested bool) error {
	if failpoint.Planted(failpoint.NoKeepaliveAck) {
		return nil
	}
	if err := s.recorder.err(); wal.IsShutdown(err) {
		return err
	}
	if lsn > s.startHigh {
		if err := s.lookUp(ctx); err != nil {
			return err
		}
	}
	s.ledger.idle(lsn)
	s.metrics.caughtUp()
	s.recordPosition(replyRequested || s.owes())
	return nil
}

// owes tells whether the leader of another shard waits for our position: it goes on with a tenant once that is recorded.
func (s *session) owes() bool { return wal.LSN(s.confirmed.Load()) < s.owed }

// recordPosition asks for the covered position to be recorded where no outcome carries it along: now and then, and only once it has moved far enough, or
// at once. Writing it makes WAL of its own: a quiet server is left quiet.
func (s *session) recordPosition(atOnce bool) {
	if !atOnce && time.Since(s.positioned) < idlePosition {
		return
	}
	covered, _ := s.ledger.position()
	durable := wal.LSN(s.confirmed.Load())
	if atOnce && covered > durable || covered > durable+idleBytes {
		s.positioned = time.Now()
		s.recorder.writePosition()
	}
}

// event matches one event and dispatches its deliveries.
func (s *session) event(ctx context.Context, rel *relation, c *wal.Change) error {
	t := rel.tenant
	s.read.Add(1)
	if t.is(store.StateSuspended) {
		return nil // its events stay in the table until it is resumed
	}
	plan, err := rel.eventPlan()
	if err != nil {
		return s.suspend(ctx, t, err)
	}
	e := &s.decoded
	if *e, err = plan.Decode(&c.New); err != nil {
		return s.suspend(ctx, t, fmt.Errorf("decode event: %w", err))
	}
	s.targets = t.Match(e, s.targets[:0])
	s.metrics.event(s.tx.begin.CommitTime, len(s.targets))
	if len(s.targets) == 0 {
		return nil
	}
	refused := s.inspector.look(t.schema, t, e, s.targets)
	if s.tx.entry == noCommit {
		s.tx.entry = s.ledger.begin(s.tx.begin.CommitLSN, s.tx.begin.CommitTime)
	}
	jobs := s.jobs(t, e)
	for i, j := range jobs {
		j.refused = refused.of(&s.targets[i])
	}
	failpoint.Hit(failpoint.Decoded)
	for range jobs {
		s.ledger.add(s.tx.entry)
	}
	if s.tx.repeat {
		s.repeated = append(s.repeated, jobs...)
		for _, j := range jobs {
			s.repeatedBytes += j.bytes
		}
		if len(s.repeated) < lookupBatch && s.repeatedBytes < lookupBytes {
			return nil
		}
		return s.lookUp(ctx)
	}
	if s.tracing != nil {
		defer s.tracing.event(ctx, s.tx.begin.CommitTime, e, jobs).End()
	}
	for _, j := range jobs {
		s.dispatch(ctx, t, j)
	}
	clear(jobs) // they are others' now; of an event with many endpoints they would be kept until another has as many
	return s.stream.Beat(ctx)
}

// jobs makes the deliveries of an event. The body is encoded once per format and shared.
func (s *session) jobs(t *tenant, e *outbox.Event) []*job {
	s.batch = s.batch[:0]
	var m messages
	var sharing sharings
	sharing.count(s.targets)
	source := s.cfg().Delivery.Source
	for _, target := range s.targets {
		f := target.Endpoint.Format
		j := newJob(t.schema, target, m.of(s.scratch[:0], f, e, source), e, s)
		sharing.of(f, j)
		s.batch = append(s.batch, j)
	}
	return s.batch
}

func newJob(tenant string, target route.Target, m *delivery.Message, e *outbox.Event, s *session) *job {
	ep := target.Endpoint
	return &job{
		Delivery: store.Delivery{
			ID: committedID(s.tx.begin.CommitTime), Tenant: tenant, EventID: m.ID, EndpointID: ep.ID, URL: ep.URL, Method: ep.Method, Message: m,
			Subscription: target.Subscription, EventType: e.Type, Order: place(ep, e, s.tx.begin.CommitLSN, s.tx.n),
		},
		endpoint:  ep,
		committed: s.tx.begin.CommitTime,
		ledger:    s.ledger,
		commit:    s.tx.entry,
	}
}

// place is where a delivery stands in the order that its endpoint promises.
func place(ep *delivery.Endpoint, e *outbox.Event, commit wal.LSN, n int32) store.Place {
	switch ep.Order {
	case delivery.OrderStrict:
		return store.Place{Key: ep.ID, LSN: commit, N: n}
	case delivery.OrderAggregate:
		return store.Place{Key: e.AggregateID, LSN: commit, N: n}
	case delivery.OrderNone:
	}
	return store.Place{}
}

func (s *session) dispatch(ctx context.Context, t *tenant, j *job) {
	s.metrics.dispatches.Inc()
	switch {
	case j.refused.code != "":
		s.dispatcher.reject(ctx, j)
	case t.is(store.StatePaused), j.endpoint.Paused:
		s.dispatcher.postpone(ctx, j, store.DeferPaused, parked)
	case j.ordered() && t.isFilling(): // it stands behind events that are not in the queue yet
		s.dispatcher.postpone(ctx, j, store.DeferOrder, parked)
	default:
		s.dispatcher.admit(ctx, j)
	}
}

// lookUp dispatches what has been held back for a look into the deliveries: what an earlier session recorded, but could not cover, is not sent
// again.
func (s *session) lookUp(ctx context.Context) error {
	if len(s.repeated) == 0 {
		return nil
	}
	events := make(map[string][]outbox.UUID)
	for _, j := range s.repeated {
		events[j.Tenant] = append(events[j.Tenant], j.EventID)
	}
	recorded := make(map[string]map[store.Pair]struct{}, len(events))
	for name, ids := range events {
		t := s.tenants[name]
		if t == nil { // removed meanwhile
			continue
		}
		done, err := s.store.Recorded(ctx, name, ids)
		if broken, ok := errors.AsType[*store.TenantError](err); ok {
			done, err = nil, s.suspend(ctx, t, broken.Err)
		}
		if err != nil { // nothing has been taken from repeated yet: finish counts all of it
			return fmt.Errorf("look up recorded deliveries: %w", err)
		}
		recorded[name] = done
	}
	for _, j := range s.repeated {
		t := s.tenants[j.Tenant]
		_, done := recorded[j.Tenant][store.Pair{Event: j.EventID, Endpoint: j.EndpointID}]
		if done || t == nil || t.is(store.StateSuspended) {
			s.ledger.settle(j.commit)
			s.metrics.repeated.Inc()
			continue
		}
		if s.tracing != nil {
			s.tracing.delivery(ctx, j)
		}
		s.dispatch(ctx, t, j)
	}
	clear(s.repeated)
	s.repeated, s.repeatedBytes = s.repeated[:0], 0
	return nil
}
