package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/outbox"
)

// entry is what the oracle knows of one event.
type entry struct {
	id          outbox.UUID
	tenant      string
	kind        string
	amount      int
	key         outbox.UUID // its aggregate; of one writer
	writer      int
	place       int       // among all of its writer, who commits them in this order
	begun       time.Time // before its transaction was
	committedAt time.Time // when its writer knew of that
	committed   bool
	phantom     bool          // committed, and lost with a primary
	excused     bool          // it may be sent, or not
	end         pglogrepl.LSN // its commit ends at or before
}

// An oracle knows which events were committed, and who is to get them, without any code of the relay.
type oracle struct {
	mu       sync.Mutex
	rules    map[string][]rule
	ordered  map[outbox.UUID]bool // endpoints with an order; true: all their events are one key
	ignored  map[outbox.UUID]bool // endpoints to which nothing is promised
	entries  map[outbox.UUID]*entry
	expected map[pair]*entry
	owed     map[string]map[pair]*entry // by tenant: committed, and no outcome has been seen yet
	events   int                        // committed
	unclear  int                        // commits without an answer, which the server had to be asked about
}

func newOracle() *oracle {
	return &oracle{
		rules: make(map[string][]rule), ordered: make(map[outbox.UUID]bool), ignored: make(map[outbox.UUID]bool), entries: make(map[outbox.UUID]*entry), expected: make(map[pair]*entry),
		owed: make(map[string]map[pair]*entry),
	}
}

func (o *oracle) begin(e *entry) {
	o.mu.Lock()
	o.entries[e.id] = e
	o.mu.Unlock()
}

func (o *oracle) commit(list []*entry, end pglogrepl.LSN) {
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	for _, e := range list {
		e.committed, e.committedAt, e.end = true, now, end
		o.events++
		for _, r := range o.rules[e.tenant] {
			if e.excused || !r.matches(e.kind, e.amount) {
				continue
			}
			p := pair{r.endpoint, e.id}
			o.expected[p] = e
			if o.owed[e.tenant] == nil {
				o.owed[e.tenant] = make(map[pair]*entry)
			}
			o.owed[e.tenant][p] = e
		}
	}
}

// excuse says of events that they may be sent or not.
func (o *oracle) excuse(list []*entry) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range list {
		e.excused = true
	}
}

func (o *oracle) due() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.expected)
}

// all tells whether everything that is expected is in a set.
func (o *oracle) all(set map[pair]bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	for p := range o.expected {
		if !set[p] {
			return false
		}
	}
	return true
}

// begunAfter tells whether the event's transaction was begun after t.
func (o *oracle) begunAfter(event outbox.UUID, t time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	e := o.entries[event]
	return e != nil && e.begun.After(t)
}

// addRule makes an endpoint with one subscription, and the rule that says what it means.
func (o *oracle) addRule(tenant string, endpoint outbox.UUID, matches func(kind string, amount int) bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rules[tenant] = append(o.rules[tenant], rule{endpoint, matches})
}

// inversions counts arrivals that came before an earlier event of their key was accepted, at endpoints that promise an order.
func (o *oracle) inversions(log []*hit) (n int, first string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	type lane struct {
		endpoint, key outbox.UUID
		writer        int
	}
	accepted := make(map[pair]int) // the moment of the first time
	for _, h := range log {
		if t, ok := accepted[h.pair]; h.accepted && (!ok || h.ended < t) {
			accepted[h.pair] = h.ended
		}
	}
	laneOf := func(p pair, e *entry) (lane, bool) {
		strict, ordered := o.ordered[p.endpoint]
		if strict {
			return lane{endpoint: p.endpoint, writer: e.writer}, true
		}
		return lane{p.endpoint, e.key, e.writer}, ordered
	}
	before := make(map[lane][]*entry)
	for p, e := range o.expected {
		if l, ordered := laneOf(p, e); ordered {
			before[l] = append(before[l], e)
		}
	}
	for _, h := range log {
		e := o.entries[h.event]
		if e == nil || !e.committed {
			continue
		}
		l, ordered := laneOf(h.pair, e)
		if !ordered {
			continue
		}
		for _, other := range before[l] {
			if other.place >= e.place {
				continue
			}
			if t, ok := accepted[pair{h.endpoint, other.id}]; !ok || t > h.begun {
				if n++; n == 1 {
					first = fmt.Sprintf("at %s, %s: number %d of writer %d, event %s, came before number %d, event %s, was accepted", h.endpoint, h.at.UTC().Format("15:04:05.000"),
						e.place, e.writer, e.id, other.place, other.id)
				}
				break
			}
		}
	}
	return n, first
}

// pairsOf lists what a query of two columns, endpoint and event, finds.
func pairsOf(ctx context.Context, pool *pgxpool.Pool, sql string, args ...any) (map[pair]bool, error) {
	found := make(map[pair]bool)
	rows, err := pool.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	var p pair
	_, err = pgx.ForEachRow(rows, []any{&p.endpoint, &p.event}, func() error {
		found[p] = true
		return nil
	})
	return found, err
}
