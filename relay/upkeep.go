package relay

import (
	"iter"
	"math"
	"slices"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// sweep looks after what has been in memory for longer than hold: what waits in a queue is deferred, what runs is handed to the retry queue
// under a lease, so that no receiver holds back the confirmed LSN. It also forgets lanes that nobody uses.
func (d *dispatcher) sweep(hold time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	old, spell := now.Add(-hold), now.Sub(d.swept)
	d.swept = now
	for key, l := range d.watched {
		if !d.waitsForDatabase(l, now.Sub(d.relieved) < hold) {
			d.sweepQueue(l, old, hold)
		}
		l.measure(spell)
		d.busy(l)
		if l.isQuiet(now) {
			l.watched = false
			delete(d.watched, key)
		}
	}
	for j := d.running.head; j != nil; j = j.next {
		if j.ledger != nil && !j.leased && j.admitted.Before(old) {
			d.leaseRunning(j)
		}
	}
	d.calm()
	d.tidy(now)
}

// watch has a lane looked at from now on, until sweep finds it quiet. There may be ten thousand of them, in which something happens once in a few minutes: to look at
// all of them several times a second took more of an idle relay's time than all else, and others waited for the lock meanwhile.
func (d *dispatcher) watch(l *lane) {
	if !l.watched {
		l.watched = true
		d.watched[l.key] = l
	}
}

// tidyEvery is the time between two looks for lanes to forget.
const tidyEvery = time.Minute

func (d *dispatcher) tidy(now time.Time) {
	if now.Sub(d.tidied) < tidyEvery {
		return
	}
	d.tidied = now
	for key, l := range d.lanes {
		if l.idle(now) {
			d.forget(key, l)
		}
	}
}

// waitsForDatabase tells whether what waits in a lane waits for the database to make outcomes durable, and not for its receiver. Rows would only be more
// of these. lately: there were too many of them less than hold ago.
func (d *dispatcher) waitsForDatabase(l *lane, lately bool) bool {
	return d.choked || lately && l.begun > 0
}

func (d *dispatcher) sweepQueue(l *lane, old time.Time, hold time.Duration) {
	d.sweepChains(l, old)
	for j := l.queue.head; j != nil && j.admitted.Before(old); {
		next := j.next
		if !j.ordered() {
			l.queue.remove(j)
			d.defers(j, store.DeferHold, d.comeBack(j, hold))
		}
		j = next
	}
}

// comeBack tells when a delivery that has waited for too long is due again. Other replicas may be faster than this lane.
func (d *dispatcher) comeBack(j *job, hold time.Duration) time.Duration {
	switch {
	case j.lane.rate > 0:
		return j.lane.later(d.now(), 0)
	case j.ledger == nil:
		return spread(hold)
	default:
		return 0
	}
}

// calm takes those out of the active lanes that have had no event for long. Where nothing is committed none of them becomes older, and none is looked at: a relay at
// rest after a busy hour has as many as it has endpoints.
func (d *dispatcher) calm() {
	if d.committed.Sub(d.calmed) < time.Second {
		return
	}
	d.calmed = d.committed
	d.active = slices.DeleteFunc(d.active, func(l *lane) bool {
		if d.committed.Sub(l.committed) <= activeFor {
			return false
		}
		d.starve(l, func() { l.active = false })
		if l.party.active--; l.party.active == 0 {
			d.activeParties--
		}
		return true
	})
}

// caps tells how many deliveries may be claimed for the endpoints whose lanes cannot take any number.
func (d *dispatcher) caps() map[store.Endpoint]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	caps := make(map[store.Endpoint]int)
	for key, l := range d.watched {
		n := l.queue.n + l.behind
		takes := l.fits(time.Second)
		if n > 0 || l.breakerState() == gobreaker.StateHalfOpen { // a lane that has run dry may be a fast one
			few := 2 * l.allowance()
			if len(l.chains) > 0 {
				few = max(few, runLength)
			}
			takes = min(takes, few)
		}
		if t, _ := l.blockedFor(d); t > 0 {
			takes = 0
		}
		if takes < math.MaxInt {
			caps[store.Endpoint{Tenant: key.tenant, ID: key.endpoint}] = max(takes-n, 0)
		}
	}
	return caps
}

// abandon takes what a session has not started out of the queues, for the log has it still. It returns how many that were. What the session knew
// of blocked keys, the next one learns from the database.
func (d *dispatcher) abandon(of *ledger) int {
	d.mu.Lock()
	var left []*job
	take := func(q *jobList) {
		for j, next := q.head, (*job)(nil); j != nil; j = next {
			next = j.next
			if j.ledger == of {
				q.remove(j)
				left = append(left, j)
			}
		}
	}
	for _, l := range d.watched {
		for key, ch := range l.chains {
			n := ch.waiting.n
			take(&ch.waiting)
			l.behind -= n - ch.waiting.n
			if ch.head.ledger == of && !ch.head.running {
				l.promote(key, ch) // what was claimed behind it stays
			}
		}
		take(&l.queue)
		l.blocked, l.crowd = nil, nil
		d.busy(l)
		d.rouse(l)
	}
	d.keys = 0
	d.mu.Unlock()
	d.release(left)
	return len(left)
}

// drain starts nothing more: what waits, and all that still comes, is deferred. The channel is closed once every outcome is durable.
func (d *dispatcher) drain() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drained = make(chan struct{})
	for _, l := range d.watched {
		d.deferQueue(l, store.DeferDrain, 0)
	}
	d.checkDrained()
	return d.drained
}

func (d *dispatcher) checkDrained() {
	if d.drained != nil && !d.empty && d.used() == 0 && d.claimed == 0 {
		d.empty = true
		close(d.drained)
	}
}

// load counts the deliveries in memory: those of the stream, their bytes, those of the retry queue, and how many of both are in flight.
func (d *dispatcher) load() (stream int, bytes int64, claimed, running int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used(), d.bytes(), d.claimed, d.running.n
}

// dropLost takes claimed deliveries from the front of a lane whose lease has run out: this process was stopped for a while, or cut off from the
// database, and another replica has them by now.
func (d *dispatcher) dropLost(l *lane) {
	for j := l.queue.head; j != nil && j.ledger == nil && d.now().After(j.mine); j = l.queue.head {
		l.queue.remove(j)
		if ch := l.chains[j.Order.Key]; j.ordered() && ch != nil && ch.head == j {
			l.promote(j.Order.Key, ch)
		}
		d.claimed--
		d.claimedBytes -= j.bytes
		delete(d.held, j.ID)
		d.checkDrained()
		d.claimedDone()
	}
}

// renewed notes until when leases run.
func (d *dispatcher) renewed(ids []outbox.UUID, until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	set := make(map[outbox.UUID]struct{}, len(ids))
	for _, id := range ids {
		set[id] = struct{}{}
	}
	for j := range d.leasedJobs() {
		if _, ok := set[j.ID]; ok {
			j.mine = until
		}
	}
}

// claimRoom tells how many deliveries of the retry queue are in memory, and how many bytes of them still fit: they may have half of what the window
// gives those of the stream.
func (d *dispatcher) claimRoom() (deliveries int, left int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.claimed, int64(d.cfg.Window.Bytes)/2 - d.claimedBytes
}

// leases lists the deliveries in memory that are leased in the retry queue.
func (d *dispatcher) leases() []outbox.UUID {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ids []outbox.UUID
	for j := range d.leasedJobs() {
		ids = append(ids, j.ID)
	}
	return ids
}

// leasedJobs yields what leases lists. It runs under the lock.
func (d *dispatcher) leasedJobs() iter.Seq[*job] {
	return func(yield func(*job) bool) {
		all := func(q *jobList) bool {
			for j := q.head; j != nil; j = j.next {
				if (j.ledger == nil || j.leased) && !yield(j) {
					return false
				}
			}
			return true
		}
		if !all(&d.running) {
			return
		}
		for _, l := range d.watched {
			if !all(&l.queue) {
				return
			}
			for _, ch := range l.chains {
				if !all(&ch.waiting) {
					return
				}
			}
		}
	}
}

// keepShut is told at the start, and whenever this replica begins to lead, which breakers an earlier process, or another replica, has opened, and for how long they stay open.
func (d *dispatcher) keepShut(key laneKey, left time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.laneOf(key)
	if until := d.now().Add(left); until.After(l.until) { // its receiver may have asked for more since
		l.until = until
	}
	l.limit = max(l.limit, 1)
	l.broken = true
	l.restart(d.cfg.Breaker.HalfOpen)
}

// close ends take. What still waits stays where it is.
func (d *dispatcher) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	for _, bell := range d.resting {
		bell <- struct{}{}
	}
	d.resting = nil
	for _, l := range d.lanes {
		if l.timer != nil {
			l.timer.Stop()
		}
	}
}
