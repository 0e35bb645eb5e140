package relay

import (
	"slices"

	"github.com/sony/gobreaker/v2"
)

// What tenants, lanes and hosts may have of what there is.

// party is a tenant in the dispatcher. Its lanes take turns within it, and parties take turns with each other, so that a tenant with a thousand
// endpoints gets no more of the workers than one with a single endpoint, while both have work.
type party struct {
	ring     fifo[*lane] // those that may start an attempt
	ready    bool        // stands in the dispatcher's ring
	running  int
	windowed room // deliveries in the window
	active   int  // lanes that had an arrival from the stream lately
	busy     int  // lanes with something queued or running
	lanes    int
}

// host is the place that endpoints lead to.
type host struct {
	name    string
	running int
	waiting fifo[*lane] // stalled: as many attempts run as the host may have
	lanes   int
}

// fifo is a queue that reuses its array.
type fifo[T comparable] struct {
	items []T
	head  int
}

func (q *fifo[T]) len() int { return len(q.items) - q.head }

func (q *fifo[T]) push(v T) {
	if q.head > 64 && q.head > len(q.items)/2 {
		n := copy(q.items, q.items[q.head:])
		clear(q.items[n:])
		q.items, q.head = q.items[:n], 0
	}
	q.items = append(q.items, v)
}

func (q *fifo[T]) pop() T {
	var zero T
	v := q.items[q.head]
	q.items[q.head] = zero
	q.head++
	return v
}

// remove takes an element out, and tells whether it was there.
func (q *fifo[T]) remove(v T) bool {
	i := slices.Index(q.items[q.head:], v)
	if i < 0 {
		return false
	}
	q.items = slices.Delete(q.items, q.head+i, q.head+i+1)
	return true
}

func (d *dispatcher) partyOf(tenant string) *party {
	p := d.parties[tenant]
	if p == nil {
		p = &party{}
		d.parties[tenant] = p
	}
	return p
}

// setHost counts the lane to the host that its endpoint has now.
func (d *dispatcher) setHost(l *lane, name string) {
	if l.host != nil && l.host.name == name {
		return
	}
	d.leaveHost(l)
	h := d.hosts[name]
	if h == nil {
		h = &host{name: name}
		d.hosts[name] = h
	}
	h.lanes++
	l.host = h
	d.rouse(l) // it may have waited for a place at the other one
}

func (d *dispatcher) leaveHost(l *lane) {
	h := l.host
	if h == nil {
		return
	}
	if l.stalled && h.waiting.remove(l) {
		l.stalled = false
	}
	h.lanes--
	if l.ready { // its turn there is somebody else's
		d.retry(&h.waiting, 1)
	}
	d.dropHost(h)
}

// dropHost forgets a host that has nothing any more: one with attempts under way would be counted from nothing when an endpoint comes back to it.
func (d *dispatcher) dropHost(h *host) {
	if h.lanes == 0 && h.running == 0 {
		delete(d.hosts, h.name)
	}
}

// forget drops a lane that is idle.
func (d *dispatcher) forget(key laneKey, l *lane) {
	d.metrics.breakerChanged(l.breakerState(), gobreaker.StateClosed)
	d.leaveHost(l)
	if l.party.lanes--; l.party.lanes == 0 {
		delete(d.parties, key.tenant)
	}
	delete(d.lanes, key)
	delete(d.watched, key)
}

// overShare tells whether a lane or its tenant has all it may have of the window. Shares count once three quarters are in use: what is left is for
// those below theirs, and until then a burst is better off in memory than as rows.
func (d *dispatcher) overShare(l *lane) bool {
	p, size, bytes := l.party, d.cfg.Window.Deliveries, int64(d.cfg.Window.Bytes)
	if d.rooms[inWindow].n < size-size/4 && d.bytes() < bytes*3/4 {
		return false
	}
	parties := max(d.activeParties, 1)
	mine := max(size/parties, size/100, 16) // a hundredth costs nobody anything, and a row costs much more than room
	if p.windowed.n >= mine || parties > 1 && p.windowed.bytes >= bytes/int64(parties) {
		return true
	}
	return l.windowed >= max(mine/max(p.active, 1), 16)
}

// starves tells whether the lane waits for what stands behind others' events in the stream. One that refuses what comes does not: its breaker is open,
// say, and its events become rows however soon the stream brings them.
func (l *lane) starves() bool { return l.active && !l.busy && !l.refuses }

// starve counts the lanes that starve over a change of one.
func (d *dispatcher) starve(l *lane, change func()) {
	before := l.starves()
	change()
	switch after := l.starves(); {
	case before && !after:
		d.starving--
	case !before && after:
		if d.starving++; d.starving == 1 {
			signal(d.room) // what waits because nobody starves need not any more
		}
	}
}

// reserveFactor is how many times the window the reserve is.
const reserveFactor = 4

// useReserve admits a delivery of a lane that has its share while others have nothing to do: their events may stand behind a burst of this one, so
// that the stream has to be read on, and a place in memory costs little beside a row. It does not if it ends as a row all the same: what the lane does not
// come to in half the time that it may wait is refused. Like the shares, the reserve keeps clear of the last quarter of the bytes.
func (d *dispatcher) useReserve(j *job) bool {
	if l := j.lane; l.speed > 0 && float64(l.queue.n) > l.speed*d.cfg.Window.Hold.Seconds()/2 {
		return false
	}
	if d.rooms[inReserve].n >= reserveFactor*d.cfg.Window.Deliveries || d.exceeds(int64(d.cfg.Window.Bytes)*3/4, j) {
		return false
	}
	d.hold(j, inReserve)
	d.enqueue(j)
	return true
}

// mayStart tells whether a lane with work may start an attempt now. If not, it notes who will ask again.
func (d *dispatcher) mayStart(l *lane) bool {
	if l.running >= l.allowance() {
		return false // one that ends will ask
	}
	if wait := l.wait(d.now); wait > 0 {
		d.rouseIn(l, wait)
		return false
	}
	if l.host.running >= d.cfg.Delivery.HostConcurrency {
		l.stalled = true
		l.host.waiting.push(l)
		return false
	}
	if !d.workerFor(l) {
		l.stalled = true
		d.stalled.push(l)
		return false
	}
	return true
}

// workerFor keeps a quarter of the workers for those that have less than their part of them: lanes whose receivers hang must not take them all.
func (d *dispatcher) workerFor(l *lane) bool {
	workers := d.cfg.Delivery.Workers
	if d.running.n < workers-workers/4 {
		return true
	}
	part := max(workers/max(d.busyParties, 1), 1)
	return l.party.running < part && l.running < max(part/max(l.party.busy, 1), 1)
}

// stalledTries is how many lanes that wait for a worker may try whenever one is free. Where each of a thousand may have one attempt under way most of those that wait have
// it already, and the others would come to their turn after the receiver's time to answer only.
const stalledTries = 8

// freed lets those try that waited for a worker, or for a place at the host: when an attempt has ended, or a lane that had its turn begins none after all. More
// than one, since the first may have to wait on.
func (d *dispatcher) freed(h *host) {
	d.retry(&h.waiting, 2)
	d.retry(&d.stalled, stalledTries)
}

// retry has the first lanes of a list ask again whether they may start. One that waits for something else, or has nothing any more, leaves its turn to the next.
func (d *dispatcher) retry(q *fifo[*lane], tries int) {
	for left := q.len(); tries > 0 && left > 0; left-- {
		l := q.pop()
		l.stalled = false
		if d.rouse(l); l.ready || l.stalled {
			tries--
		}
	}
}
