package relay

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// A tenant is a schema whose events we relay. Its routing table is used by the stream, by the leader's background work and by whoever brings another
// configuration, one at a time.
type tenant struct {
	mu      sync.Mutex // of the fields up to the next gap; but for saved, the others stay as they were loaded
	state   string
	gone    bool // the schema is, and that has been told
	filling bool // earlier events are still being queued: what has an order goes behind them
	table   *route.Tenant
	now     version // of the table

	schema   string
	steady   bool           // it was loaded with the rows that the last checkpoint of the session before knew
	saved    *int64         // digest that the database has; nil: none. The checkpoint's, once it is loaded
	tables   string         // that it was loaded from; see store.TenantRows
	snapshot store.Snapshot // what the table was loaded from
	loaded   wal.LSN        // commits from here on are not in the snapshot

	// Events of commits before from were for the slot of another shard to bring, and those from until on are. Zero: no bound.
	from, until wal.LSN
}

// brings tells whether it is our slot that brings an event of this commit.
func (t *tenant) brings(commit wal.LSN) bool {
	return commit >= t.from && (t.until == 0 || commit < t.until)
}

// wants tells whether a change of the routing table is to be applied: unless the load has seen it already.
func (t *tenant) wants(b wal.Begin) bool {
	return b.CommitLSN >= t.loaded || !t.snapshot.Visible(b.XID)
}

// Match is that of the routing table.
func (t *tenant) Match(e *outbox.Event, dst []route.Target) []route.Target {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.table.Match(e, dst)
}

// MatchFor is that of the routing table.
func (t *tenant) MatchFor(e *outbox.Event, endpoint outbox.UUID) (route.Target, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.table.MatchFor(e, endpoint)
}

// Wants is that of the routing table.
func (t *tenant) Wants(eventType string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.table.Wants(eventType)
}

// PayloadSchema is that of the routing table.
func (t *tenant) PayloadSchema(eventType string) *route.PayloadSchema {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.table.PayloadSchema(eventType)
}

// version tells which state of the routing table this is.
func (t *tenant) version() version {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.now
}

// endpoint finds an endpoint; nil if there is none that can be used.
func (t *tenant) endpoint(id outbox.UUID) *delivery.Endpoint {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.table.Endpoint(id)
}

func (t *tenant) is(state string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.state == state
}

func (t *tenant) setState(state string) {
	t.mu.Lock()
	t.state = state
	t.mu.Unlock()
}

func (t *tenant) isGone() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.gone
}

// setGone tells whether the schema has been there so far, and is gone.
func (t *tenant) setGone(gone bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	was := t.gone
	t.gone = gone
	return gone && !was
}

func (t *tenant) isFilling() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.filling
}

func (t *tenant) setFilling(filling bool) {
	t.mu.Lock()
	t.filling = filling
	t.mu.Unlock()
}

type tableKind uint8

const (
	tableOther tableKind = iota
	tableEvents
	tableEndpoints
	tableEventTypes
	tableSubscriptions
	tableOlderSubscriptions
	tableTenants
)

func kindOf(table string) tableKind {
	switch table {
	case "webhook_events":
		return tableEvents
	case "webhook_endpoints":
		return tableEndpoints
	case "webhook_event_types":
		return tableEventTypes
	case "webhook_subscriptions":
		return tableSubscriptions
	case "webhook_event_subscriptions":
		return tableOlderSubscriptions
	}
	return tableOther
}

// A relation is what the session knows of a table in the stream. A changed table comes with a new wal.Relation.
type relation struct {
	wal    *wal.Relation
	kind   tableKind
	tenant *tenant // nil: none of ours
	plan   *wal.EventPlan
}

// relation finds what a row belongs to. The name comes from the catalog, through the server; the payload has no say in it.
func (s *session) relation(r *wal.Relation) *relation {
	rel := s.relations[r.ID]
	if rel == nil || rel.wal != r {
		rel = &relation{wal: r, kind: kindOf(r.Table)}
		if r.Schema == ownSchema && r.Table == "tenants" {
			rel.kind = tableTenants
		}
		s.relations[r.ID] = rel
	}
	rel.tenant = s.tenants[r.Schema] // as it is now: it may have been loaded anew
	return rel
}

func (r *relation) eventPlan() (plan *wal.EventPlan, err error) {
	if r.plan == nil {
		r.plan, err = wal.NewEventPlan(r.wal)
	}
	return r.plan, err
}

// loadTenants reads the routing tables of all tenants of the shard from one snapshot.
func (s *session) loadTenants(ctx context.Context) error {
	_, err := s.load(ctx, nil)
	return err
}

// load reads the routing tables of those of the named tenants that are of our shard, nil for all, and says how many that are. Changes of them that the stream repeats are known by the snapshot.
func (s *session) load(ctx context.Context, schemas []string) (loaded int, err error) {
	began, defaults := time.Now(), s.defaults.Load()
	reg, err := s.store.LoadShard(ctx, schemas, max(s.start, s.tx.begin.CommitLSN), s.stream.Beat)
	if err != nil {
		return 0, fmt.Errorf("load routing tables: %w", err)
	}
	for i := range reg.Tenants {
		rows := &reg.Tenants[i]
		if !s.cfg().Tenants.Includes(rows.Schema) {
			continue
		}
		attestLoaded(rows.Endpoints)
		t := &tenant{
			schema: rows.Schema, state: rows.State, filling: rows.Backfilling, snapshot: reg.Snapshot, loaded: reg.LSN,
			table: rows.Routing(*defaults), from: rows.Moved, tables: rows.Tables, saved: rows.Digest,
		}
		if loaded++; rows.Left { // the last leader had not come to its end here: what is missed is in the other shard's hands, so nothing waits for it
			t.from, t.until, t.filling = 0, rows.Moved, false
			s.owed = max(s.owed, rows.Moved)
		}
		for _, row := range t.table.Invalid() {
			s.complain(t, row.Table, row.ID, row.Err)
		}
		t.now.digest = digestOf(rows)
		t.steady = rows.Digest != nil && digest(*rows.Digest) == t.now.digest
		s.mu.Lock()
		s.tenants[rows.Schema] = t
		s.mu.Unlock()
		if now := s.defaults.Load(); now != defaults { // they were changed before the tenant could be seen
			s.setDefaults(t)
		}
		if rows.Err == nil || rows.State == store.StateSuspended {
			continue
		}
		if err := s.suspend(ctx, t, fmt.Errorf("read its tables: %w", rows.Err)); err != nil {
			return loaded, err
		}
	}
	s.log.Debug("routing tables loaded", "tenants", len(reg.Tenants), "took", time.Since(began))
	signal(s.backfill)
	return loaded, nil
}

// complain tells of a row that cannot be used. It matches nothing until it is mended, and an event type has no payload_schema; everything else goes on.
func (s *session) complain(t *tenant, kind string, id outbox.UUID, err error) {
	if err != nil {
		s.metrics.invalidRows.Inc()
		s.log.Warn("a row of the routing table cannot be used", "tenant", t.schema, "kind", kind, "id", id, "error", err)
	}
}

// tenantChanged follows outbox_relay.tenants: a new tenant is loaded before its first event is looked at.
func (s *session) tenantChanged(ctx context.Context, c *wal.Change) error {
	if c.Op == wal.Truncate {
		s.leave("")
		return nil
	}
	r := row{rel: c.Relation, t: &c.New}
	if c.Op == wal.Delete {
		r.t = &c.Old
	}
	var schema, before, tables string
	state := store.StateActive
	r.text("schema", &schema)
	r.text("state", &state)
	r.text("tables", &tables)
	var backfill string
	var filled time.Time
	var shard int32
	r.int32("shard", &shard, 0)
	r.text("backfill", &backfill)
	r.time("backfill_done_at", &filled)
	if c.Op == wal.Update && c.Old.Len() > 0 { // the key itself was updated
		old := row{rel: c.Relation, t: &c.Old}
		old.text("schema", &before)
	}
	if r.err != nil {
		return fmt.Errorf("read a row of %s.tenants: %w", ownSchema, r.err)
	}
	if before != "" && before != schema {
		s.leave(before)
	}
	if c.Op != wal.Delete && int(shard) != s.shard {
		return s.movedAway(ctx, schema)
	}
	switch {
	case c.Op == wal.Delete:
		s.leave(schema)
	case s.tenants[schema] != nil && !s.tenants[schema].wants(s.tx.begin):
	case s.tenants[schema] == nil || tables != s.tenants[schema].tables || state != store.StateSuspended && s.tenants[schema].is(store.StateSuspended):
		if !s.cfg().Tenants.Includes(schema) {
			return nil
		}
		if err := s.awaitVisible(ctx); err != nil {
			return err
		}
		if n, err := s.load(ctx, []string{schema}); err != nil || n == 0 { // none: it has been moved away since
			return err
		}
		s.log.Info("tenant joins", "tenant", schema, "state", state)
	default:
		t, filling := s.tenants[schema], backfill != "" && filled.IsZero()
		if state == store.StateActive && (!t.is(store.StateActive) || t.isFilling() && !filling) { // not at each page of a backfill
			s.resumed.Store(true)
			signal(s.attention)
		}
		t.setState(state)
		t.setFilling(filling)
		signal(s.backfill)
	}
	return nil
}

// movedAway follows a tenant to its end here. Its events before this place of the log are ours to record, and the leader of its new shard waits for that.
func (s *session) movedAway(ctx context.Context, schema string) error {
	t := s.tenants[schema]
	switch {
	case t == nil: // of another shard, as most are
		return nil
	case t.until == 0 && !t.wants(s.tx.begin), t.until != 0 && t.brings(s.tx.begin.CommitLSN): // an older move, since when it has come back
		return nil
	}
	if err := s.lookUp(ctx); err != nil { // what is held back is still its
		return err
	}
	s.owed = max(s.owed, s.tx.begin.CommitLSN)
	s.leave(schema)
	return nil
}

// leave forgets a tenant, or all of them, and what is known of its tables, which would keep its routing table.
func (s *session) leave(schema string) {
	maps.DeleteFunc(s.relations, func(_ uint32, r *relation) bool { return r.wal.Schema == schema || schema == "" })
	s.mu.Lock()
	defer s.mu.Unlock()
	if schema == "" {
		clear(s.tenants)
	}
	delete(s.tenants, schema)
	s.log.Info("tenant leaves", "tenant", schema)
}

// tenant finds a tenant from outside the stream's goroutine; nil if it is not served.
func (s *session) tenant(schema string) *tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tenants[schema]
}

// served lists the tenants that are served, by name, from outside the stream's goroutine.
func (s *session) served() []*tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(maps.Values(s.tenants), func(a, b *tenant) int { return cmp.Compare(a.schema, b.schema) })
}

// known lists their names.
func (s *session) known() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.schemas()
}

// schemas lists the tenants that are served.
func (s *session) schemas() []string { return slices.Sorted(maps.Keys(s.tenants)) }

// awaitVisible waits until the transaction being read is visible to others. The server sends a commit once it is flushed, which may be before:
// with synchronous replication, as long before as the standby takes.
func (s *session) awaitVisible(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := s.store.Visible(ctx, s.tx.begin.XID)
		if ok || err != nil {
			return err
		}
		if err := s.stream.Beat(ctx); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
