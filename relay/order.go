package relay

import (
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// How order is kept. Deliveries of an endpoint that promises one carry a key: the endpoint itself, or the aggregate. Of one key only the first
// may be attempted, and the rest waits:
//
//	in memory    chain:  head (queued or running) ◄─ waiting ◄─ waiting        of the stream, or of one claim
//	in the queue rows of the key by place: first (due or leased) ◄─ parked ◄─ parked
//
// Never both: once a delivery of a key has become a row, the key is blocked, and what the stream brings goes behind that row until no row of the
// key is left. So a delivery that is deferred takes those of its key that are in memory along, in order: what runs is leased, what waits is
// deferred. Only the leader brings new deliveries, so only its keys need blocking; it learns them from the database when it begins to lead.

// chain is the deliveries of one key in memory.
type chain struct {
	head    *job
	waiting jobList
}

// block says that a key has rows in the retry queue, or will have.
type block struct {
	of         *ledger // of the session whose jobs are counted
	unrecorded int     // jobs in memory that will be rows, or are and will go
	stamp      uint64  // of the last change, for what the database said meanwhile
}

// enqueue puts a job into its lane, at its place.
func (d *dispatcher) enqueue(j *job) {
	l := j.lane
	if j.ordered() {
		if ch := l.chains[j.Order.Key]; ch != nil {
			ch.waiting.push(j)
			l.behind++
			return
		}
		if l.chains == nil {
			l.chains = make(map[outbox.UUID]*chain)
		}
		l.chains[j.Order.Key] = &chain{head: j}
	}
	l.queue.push(j)
	d.rouse(l)
}

// isBlocked tells whether a delivery of the stream has to go behind a row.
func (l *lane) isBlocked(j *job) bool { return j.ordered() && l.blocked[j.Order.Key] != nil }

// blockKey makes rows of what the stream has brought of a key, in order, before one more of it is deferred.
func (d *dispatcher) blockKey(l *lane, key outbox.UUID) {
	d.blocking(l, key)
	ch := l.chains[key]
	if ch == nil {
		return
	}
	if head := ch.head; head.running {
		if head.ledger != nil && !head.leased {
			d.leaseRunning(head)
		}
	} else {
		l.queue.remove(head)
		d.defers(head, deferOrder, 0)
		delete(l.chains, key)
	}
	d.deferWaiting(l, ch, deferOrder)
}

// blocking returns the block of a key.
func (d *dispatcher) blocking(l *lane, key outbox.UUID) *block {
	b := l.blocked[key]
	if b == nil {
		if l.blocked == nil {
			l.blocked = make(map[outbox.UUID]*block)
		}
		b = &block{}
		l.blocked[key] = b
	}
	d.stamp++
	b.stamp = d.stamp
	return b
}

// blocks counts a delivery of the stream among what keeps its key blocked, until it is recorded.
func (d *dispatcher) blocks(j *job) {
	if j.ordered() && j.ledger != nil && !j.blocking {
		j.blocking = true
		b := d.blocking(j.lane, j.Order.Key)
		b.of = j.ledger
		b.unrecorded++
	}
}

// deferWaiting defers what waits behind the head of a chain.
func (d *dispatcher) deferWaiting(l *lane, ch *chain, reason string) {
	for j := ch.waiting.pop(); j != nil; j = ch.waiting.pop() {
		l.behind--
		d.defers(j, reason, 0)
	}
}

// settle goes on with the key of a job whose outcome has been handed to the recorder: the next one may start, or, if there will be another attempt,
// all that wait behind it become rows, too.
func (d *dispatcher) settle(j *job, again bool) {
	l := j.lane
	ch := l.chains[j.Order.Key]
	if ch == nil || ch.head != j {
		return
	}
	if again || d.drained != nil {
		d.deferWaiting(l, ch, deferOrder)
	}
	next := ch.waiting.pop()
	if next == nil {
		delete(l.chains, j.Order.Key)
		return
	}
	l.behind--
	ch.head = next
	l.queue.push(next)
	d.rouse(l)
}

// blockedKeys lists the keys that may be free again: everything that was in memory of them is recorded. Stamps tell whether they have changed
// when the database has been asked.
func (d *dispatcher) blockedKeys() (keys []store.OrderedKey, stamps []uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.lanes {
		for key, b := range l.blocked {
			if b.unrecorded == 0 {
				keys = append(keys, store.OrderedKey{Tenant: l.key.tenant, Endpoint: l.key.endpoint, Key: key})
				stamps = append(stamps, b.stamp)
			}
		}
	}
	return keys, stamps
}

// unblock frees the keys that have no rows, unless they have been blocked again since they were listed.
func (d *dispatcher) unblock(keys []store.OrderedKey, stamps []uint64, still []bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, k := range keys {
		l := d.lanes[laneKey{k.Tenant, k.Endpoint}]
		if l == nil || still[i] { //nolint:gosec // one answer a key
			continue
		}
		if b := l.blocked[k.Key]; b != nil && b.stamp == stamps[i] {
			delete(l.blocked, k.Key)
		}
	}
}

// block takes over what the database knows of blocked keys when a session begins.
func (d *dispatcher) block(keys []store.OrderedKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range keys {
		d.blocking(d.laneOf(laneKey{k.Tenant, k.Endpoint}), k.Key)
	}
}

// sweepChains hands over the keys whose first delivery of the stream has been in memory since before old.
func (d *dispatcher) sweepChains(l *lane, old time.Time) {
	for key, ch := range l.chains {
		first := ch.head
		if first.ledger == nil || first.leased {
			if first = ch.waiting.head; first == nil || first.ledger == nil {
				continue
			}
		}
		if first.admitted.Before(old) {
			d.blockKey(l, key)
		}
	}
}
