package relay

import (
	"errors"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// rouse puts the lane into the ring if it has work that may start.
func (d *dispatcher) rouse(l *lane) {
	if l.ready || l.stalled || l.queue.n == 0 {
		return
	}
	d.busy(l)
	if !d.mayStart(l) {
		return
	}
	l.ready = true
	l.party.ring.push(l)
	if !l.party.ready {
		l.party.ready = true
		d.ring.push(l.party)
	}
	d.wake()
}

// rouseIn asks again when the lane's rate limit allows another attempt.
func (d *dispatcher) rouseIn(l *lane, wait time.Duration) {
	if l.timer != nil {
		l.timer.Reset(wait)
		return
	}
	l.timer = time.AfterFunc(wait, func() {
		d.mu.Lock()
		d.rouse(l)
		d.mu.Unlock()
	})
}

// busy counts a lane among those with work, or takes it out.
func (d *dispatcher) busy(l *lane) {
	is := l.queue.n > 0 || l.running > 0
	if is == l.busy {
		return
	}
	d.starve(l, func() { l.busy = is })
	before := l.party.busy
	if is {
		l.party.busy++
	} else {
		l.party.busy--
	}
	if before == 0 {
		d.busyParties++
	} else if l.party.busy == 0 {
		d.busyParties--
	}
}

// wake gives a worker something to do.
func (d *dispatcher) wake() {
	if n := len(d.resting); n > 0 {
		d.resting[n-1] <- struct{}{}
		d.resting = d.resting[:n-1]
	} else if d.workers < d.cfg.Delivery.Workers && !d.closed {
		d.workers++
		d.spawn()
	}
}

// rally wakes a worker for each lane that may start: those that became ready while nothing was to begin have woken nobody who is still awake.
func (d *dispatcher) rally() {
	for _, p := range d.ring.items[d.ring.head:] {
		for range p.ring.len() {
			d.wake()
		}
	}
}

// take waits for a delivery to attempt. It returns nil once the dispatcher is closed.
func (d *dispatcher) take() *job {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.closed {
		if j := d.nextJob(); j != nil {
			return j
		}
		d.rest()
	}
	return nil
}

// nextJob starts the next delivery that may start; nil: there is none. There is none either while a window of outcomes is not durable: they would be
// sent again after a crash, and more of them would only wait longer, since it is the database then that sets the pace.
func (d *dispatcher) nextJob() *job {
	if d.unrecorded >= d.cfg.Window.Deliveries {
		d.choked = true
		return nil
	}
	for d.ring.len() > 0 {
		l := d.turn()
		d.dropLost(l)
		if l.queue.n == 0 {
			d.busy(l)
			d.freed(l.host)
			continue
		}
		if !d.mayStart(l) {
			d.busy(l)
			continue
		}
		now := d.now()
		if of := l.queue.head.ledger; of != nil && !of.tenure.holds(now) {
			d.doubt() // sure waits for the answer, or the session ends
			d.freed(l.host)
			continue
		}
		if left := l.until.Sub(now); left > 0 {
			d.deferQueue(l, store.DeferThrottled, spread(left))
			d.freed(l.host)
			continue
		}
		settle, err := l.breaker.Allow()
		if err != nil {
			d.refuse(l, err)
			d.freed(l.host)
			continue
		}
		return d.start(l, settle)
	}
	return nil
}

// sure lets begin what had to wait since its leader was not sure to be the only one.
func (d *dispatcher) sure() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.watched {
		d.rouse(l)
	}
}

// rest waits for wake, or for the end.
func (d *dispatcher) rest() {
	var bell chan struct{}
	if n := len(d.spare); n > 0 {
		bell = d.spare[n-1]
		d.spare = d.spare[:n-1]
	} else {
		bell = make(chan struct{}, 1)
	}
	d.resting = append(d.resting, bell)
	d.mu.Unlock()
	<-bell
	d.mu.Lock()
	d.spare = append(d.spare, bell)
}

// turn returns the next lane of the next tenant.
func (d *dispatcher) turn() *lane {
	p := d.ring.pop()
	l := p.ring.pop()
	l.ready = false
	if p.ring.len() > 0 {
		d.ring.push(p)
	} else {
		p.ready = false
	}
	return l
}

func (d *dispatcher) start(l *lane, settle func(error)) *job {
	j := l.queue.pop()
	l.running++
	l.begun++
	l.filled(l.running)
	l.party.running++
	l.host.running++
	l.started(d.now)
	j.running, j.settle, j.host = true, settle, l.host
	d.running.push(j)
	d.rouse(l)
	return j
}

// refuse empties the queue of a lane whose breaker lets nothing through. While it is half-open the probes under way decide soon.
func (d *dispatcher) refuse(l *lane, err error) {
	due, _ := l.blockedFor(d)
	if errors.Is(err, gobreaker.ErrTooManyRequests) {
		due = spread(time.Second)
	}
	d.deferQueue(l, store.DeferBreaker, max(due, 100*time.Millisecond))
}

// deferQueue defers all that waits in a lane, in order.
func (d *dispatcher) deferQueue(l *lane, reason string, due time.Duration) {
	for key, ch := range l.chains {
		d.deferChain(l, key, ch, reason, due)
	}
	for j := l.queue.pop(); j != nil; j = l.queue.pop() {
		d.defers(j, reason, due)
	}
	d.busy(l)
}

// A verdict is what an attempt says about its receiver.
type verdict struct {
	attempted  bool          // it counts
	failure    error         // nil: success; errNoVerdict: nothing
	overloaded bool          // it asks for less, by its answer or by its silence
	pause      time.Duration // it asks to be left alone for so long
	again      bool          // there will be another attempt
}

// finish takes a delivery whose attempt has ended off its lane and hands its outcome to the recorder.
func (d *dispatcher) finish(j *job, v verdict, o store.Outcome) {
	d.mu.Lock()
	l := j.lane
	d.leave(j, v)
	turned, open := l.turned(v.failure == nil), l.broken
	if j.ordered() {
		// Nothing of the key may come between its end, its outcome, and what waits behind it: rows are recorded in this order.
		d.ended(j, o)
		d.settle(j, v.again)
		d.mu.Unlock()
	} else {
		d.mu.Unlock()
		d.ended(j, o) // the job is the recorder's
	}
	if turned {
		d.turned(l.key, open, o.Result.Class, o.Result.Err)
	}
}

func (d *dispatcher) leave(j *job, v verdict) {
	l := j.lane
	d.running.remove(j)
	j.running = false
	j.unrecorded = true
	d.unrecorded++
	if v.attempted {
		j.Attempts++
		j.counted = true
	}
	switch {
	case v.failure == nil:
		l.failures = 0
		l.succeeded()
	case !errors.Is(v.failure, errNoVerdict):
		l.failures++
	}
	l.running--
	l.party.running--
	j.host.running--
	if v.overloaded {
		l.overloaded(d.now())
	}
	if v.pause > 0 {
		l.until = d.now().Add(v.pause)
	}
	j.settle(v.failure)
	if v.again {
		d.blocks(j) // before its row is written
	}
	j.Queued = j.Queued || j.leased // the retry queue has taken it over meanwhile
	d.busy(l)
	d.rouse(l)
	d.freed(j.host)
	d.dropHost(j.host)
}

// release gives back the room of deliveries whose outcome is durable.
func (d *dispatcher) release(jobs []*job) {
	d.mu.Lock()
	before := d.claimed
	for _, j := range jobs {
		if j.unrecorded {
			d.unrecorded--
		}
		if j.ledger == nil || j.leased {
			delete(d.held, j.ID)
		}
		if j.reclaimed != nil {
			d.regain(j.reclaimed.job)
			d.accept(*j.reclaimed, false)
		}
		if j.ledger == nil {
			d.claimed--
			d.claimedBytes -= j.bytes
			continue
		}
		d.leaveRoom(j)
		if b := j.lane.blocked[j.Order.Key]; j.blocking && b != nil && b.of == j.ledger {
			if b.unrecorded--; b.unrecorded == 0 && j.lane.crowd != nil && !j.lane.crowd.asking {
				delete(j.lane.blocked, j.Order.Key)
			}
		}
	}
	if d.unrecorded < d.cfg.Window.Deliveries {
		if d.choked {
			d.choked, d.relieved = false, d.now()
		}
		d.rally()
	}
	d.checkDrained()
	fewer := d.claimed < before
	d.mu.Unlock()
	signal(d.room)
	if fewer {
		d.claimedDone()
	}
}
