package relay

import (
	"errors"
	"fmt"
	"reflect"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// registryChanged applies a change of a routing table, in commit order like everything else in the stream. The error is the tenant's own: its table
// cannot be read any more.
func (s *session) registryChanged(rel *relation, c *wal.Change) error {
	t := rel.tenant
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.Op == wal.Truncate {
		t.now.changes++
		t.now.digest.spoil()
		t.table.Truncate(c.Relation.Table)
		return nil
	}
	r := row{rel: c.Relation, t: &c.New}
	if c.Op == wal.Delete {
		r.t = &c.Old
	}
	var id outbox.UUID
	r.id("id", &id)
	was := id
	if c.Op == wal.Update && c.Old.Len() > 0 { // the key itself was updated, or all of the old row is there
		old := row{rel: c.Relation, t: &c.Old}
		old.id("id", &was)
		r.err = errors.Join(r.err, old.err)
		if was.IsZero() { // the old row is that of an index without the id
			was = id
		}
	}
	if r.err == nil && id.IsZero() {
		r.err = errors.New("the replica identity does not contain it")
	}
	if r.err != nil {
		return fmt.Errorf("read the id of a row of %s: %w", c.Relation.Table, r.err)
	}
	if c.Op == wal.Delete {
		t.now.changes++
		t.forget(rel.kind, id)
		return nil
	}
	s.set(t, rel.kind, was, id, &r)
	if was != id {
		t.forget(rel.kind, was)
	}
	return nil
}

// differs counts a change of the routing table, if the row is another one than before: most updates only note when it was used last.
func (t *tenant) differs(known bool, before, after any) bool {
	if known && reflect.DeepEqual(before, after) {
		return false
	}
	t.now.changes++
	if known {
		t.now.digest.remove(before)
	}
	t.now.digest.add(after)
	return true
}

func (t *tenant) forget(kind tableKind, id outbox.UUID) {
	var row any
	var known bool
	switch kind {
	case tableEndpoints:
		row, known = t.table.EndpointRow(id)
		t.table.DeleteEndpoint(id)
	case tableEventTypes:
		row, known = t.table.EventTypeRow(id)
		t.table.DeleteEventType(id)
	case tableSubscriptions:
		row, known = t.table.SubscriptionRow(id, route.Current)
		t.table.DeleteSubscription(id, route.Current)
	case tableOlderSubscriptions:
		row, known = t.table.SubscriptionRow(id, route.Older)
		t.table.DeleteSubscription(id, route.Older)
	case tableOther, tableEvents, tableTenants:
	}
	if known {
		t.now.digest.remove(row)
	}
}

// set applies the new state of a row. What the log does not carry of it is taken from the row before, whose id was another if the key was updated.
func (s *session) set(t *tenant, kind tableKind, was, id outbox.UUID, r *row) {
	var fault error
	same := was == id // else the row before is still to be forgotten, which takes it off the digest
	switch kind {
	case tableEndpoints:
		e, known := t.table.EndpointRow(was)
		before := e
		r.endpoint(&e)
		attest(&before, &e)
		if r.err == nil && t.differs(same && known, before, e) {
			fault = t.table.SetEndpoint(e)
			signal(s.verify)
		}
		if known && (!before.Active || before.Paused) && e.Active && !e.Paused {
			s.takesAgain(laneKey{t.schema, id})
		}
	case tableEventTypes:
		e, known := t.table.EventTypeRow(was)
		before := e
		if r.eventType(&e, s.inspector.checksSchemas()); r.err == nil && t.differs(same && known, before, e) {
			fault = t.table.SetEventType(e)
		}
	case tableSubscriptions, tableOlderSubscriptions:
		source := route.Current
		if kind == tableOlderSubscriptions {
			source = route.Older
		}
		e, known := t.table.SubscriptionRow(was, source)
		before := e
		e.Source = source
		if r.subscription(&e); r.err == nil && t.differs(same && known, before, e) {
			fault = t.table.SetSubscription(e)
		}
	case tableOther, tableEvents, tableTenants:
	}
	if r.err != nil { // not even readable: then it is not to match as it was before
		t.forget(kind, id)
		fault = r.err
	}
	s.complain(t, r.rel.Table, id, fault)
}
