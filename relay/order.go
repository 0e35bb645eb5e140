package relay

import (
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// How order is kept. Deliveries of an endpoint that promises one carry a key: the endpoint itself, or the aggregate. Of one key only the first
// may be attempted, and the rest waits:
//
//	in memory    chain:  head (queued or running) ◄─ waiting ◄─ waiting
//	in the queue rows of the key by place: first (due or leased) ◄─ parked ◄─ parked
//
// Once a delivery of a key has become a row, the key is blocked, and what the stream brings goes behind that row until no row of the key is left.
// So a delivery of the stream that is deferred takes those of its key that came with it along, in order: what runs is leased, what waits is
// deferred. Rows come back into a chain by a claim, always the first ones of their key; an operator's replay may put them behind what the stream
// has brought meanwhile. Only the leader brings new deliveries, so only its keys need blocking; it learns them from the database when it begins to
// lead.

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
	l.dry = l.dry || l.queue.n == 0
	l.queue.push(j)
	d.rouse(l)
}

// isBlocked tells whether a delivery of the stream has to go behind a row.
func (l *lane) isBlocked(j *job) bool {
	return j.ordered() && (l.crowd != nil || l.blocked[j.Order.Key] != nil)
}

// blockKey makes rows of what the stream has brought of a key, in order, before one more of it is deferred. What was claimed stays: it has rows,
// with places before those of all that the stream brings.
func (d *dispatcher) blockKey(l *lane, key outbox.UUID) {
	d.blocking(l, key)
	ch := l.chains[key]
	if ch == nil {
		return
	}
	head := ch.head
	switch {
	case head.ledger == nil || head.leased:
	case head.running:
		d.leaseRunning(head)
	default:
		l.queue.remove(head)
		d.defers(head, store.DeferOrder, 0)
	}
	for j, next := ch.waiting.head, (*job)(nil); j != nil; j = next {
		if next = j.next; j.ledger != nil {
			ch.waiting.remove(j)
			l.behind--
			d.defers(j, store.DeferOrder, 0)
		}
	}
	if head.ledger != nil && !head.running && l.promote(key, ch) {
		d.rouse(l)
	}
}

// firstOfStream returns the first delivery of the chain that still holds back the log; nil: none does.
func (ch *chain) firstOfStream() *job {
	if j := ch.head; j.ledger != nil && !j.leased {
		return j
	}
	for j := ch.waiting.head; j != nil; j = j.next {
		if j.ledger != nil {
			return j
		}
	}
	return nil
}

// firstClaimed returns the first delivery of the chain that was claimed and waits; nil: there is none.
func (ch *chain) firstClaimed() *job {
	if j := ch.head; j.ledger == nil && !j.running {
		return j
	}
	for j := ch.waiting.head; j != nil; j = j.next {
		if j.ledger == nil {
			return j
		}
	}
	return nil
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
		if l.crowd == nil {
			d.keys++
		}
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

// deferChain defers all that waits of a key, in order.
func (d *dispatcher) deferChain(l *lane, key outbox.UUID, ch *chain, reason string, due time.Duration) {
	if ch.head.running && ch.waiting.n > 0 && ch.firstOfStream() != nil {
		d.blockKey(l, key)
	}
	if !ch.head.running {
		l.queue.remove(ch.head)
		d.defers(ch.head, reason, due)
		delete(l.chains, key)
	}
	d.deferWaiting(l, ch, reason)
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
		d.deferWaiting(l, ch, store.DeferOrder)
	}
	if l.promote(j.Order.Key, ch) {
		d.rouse(l)
	}
}

// promote makes the next delivery of a key its head and puts it into the lane's queue. It returns false if there is none: the chain has ended.
func (l *lane) promote(key outbox.UUID, ch *chain) bool {
	next := ch.waiting.pop()
	if next == nil {
		delete(l.chains, key)
		return false
	}
	l.behind--
	ch.head = next
	l.queue.push(next)
	return true
}

// maxBlockedKeys is how many keys are asked about at once. A map is walked in random order: each gets its turn.
const maxBlockedKeys = 2000

// blockedKeys lists keys that may be free again: everything that was in memory of them is recorded. Stamps tell whether they have changed when the
// database has been asked.
func (d *dispatcher) blockedKeys() (keys []store.OrderedKey, stamps []uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.watched {
		if l.crowd != nil {
			continue
		}
		for key, b := range l.blocked {
			if len(keys) == maxBlockedKeys {
				return keys, stamps
			}
			if b.unrecorded == 0 {
				keys = append(keys, store.OrderedKey{Tenant: l.key.tenant, Endpoint: l.key.endpoint, Key: key})
				stamps = append(stamps, b.stamp)
			}
		}
	}
	return keys, stamps
}

// unblock frees the keys that have no rows, unless they have been blocked again since they were listed. It returns how many those are.
func (d *dispatcher) unblock(keys []store.OrderedKey, stamps []uint64, still []bool) (freed int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, k := range keys {
		l := d.lanes[laneKey{k.Tenant, k.Endpoint}]
		if l == nil || still[i] { //nolint:gosec // one answer a key
			continue
		}
		if b := l.blocked[k.Key]; b != nil && b.stamp == stamps[i] {
			delete(l.blocked, k.Key)
			d.keys--
			freed++
		}
	}
	return freed
}

// block takes over what the database knows of blocked keys.
func (d *dispatcher) block(keys []store.OrderedKey) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.blockKeys(keys)
}

func (d *dispatcher) blockKeys(keys []store.OrderedKey) {
	for _, k := range keys {
		if l := d.laneOf(laneKey{k.Tenant, k.Endpoint}); l.crowd == nil || l.crowd.asking {
			d.blocking(l, k.Key)
		}
	}
}

// sweepChains hands over the keys whose first delivery of the stream has been in memory since before old.
func (d *dispatcher) sweepChains(l *lane, old time.Time) {
	for key, ch := range l.chains {
		if first := ch.firstOfStream(); first != nil && first.admitted.Before(old) {
			d.blockKey(l, key)
		}
	}
}
