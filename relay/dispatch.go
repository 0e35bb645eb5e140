package relay

import (
	"context"
	"sync"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/neo-commons/outbox-relay/outbox"
)

// jobOverhead is what a delivery costs in memory besides its share of the body, in bytes.
const jobOverhead = 1024

// activeFor is how long after its last event from the stream a lane counts as one of those that want a share of the window. It is measured in the
// time of the commits: while a huge transaction is read, the others do not cease to matter because their events stand behind it.
const activeFor = 10 * time.Second

// Why a delivery was deferred; kept with the pending row and as a label of the metric.
const (
	deferWindow   = "window"   // no room in memory
	deferShare    = "share"    // its lane has its share of the window, others would have to wait
	deferBreaker  = "breaker"  // the endpoint's breaker is open
	deferPaused   = "paused"   // the tenant is paused
	deferInactive = "inactive" // the endpoint is not active
	deferInvalid  = "invalid"  // the endpoint's row cannot be used
	deferHold     = "hold"     // it held back the confirmed LSN for too long
	deferDrain    = "drain"    // the relay stops
	deferBackfill = "backfill" // an event from before the stream
)

// The dispatcher shares out the workers among the lanes.
//
//	stream ──admit──► lane queue ─┐                      ┌─► finish ─► recorder ─► release
//	queue  ──admit──► lane queue ─┼─► ring ─► take ─► attempt
//	                  lane queue ─┘                      └─► (held too long) ─► lease ─► recorder
//
// A lane stands in the ring while it has both work and capacity, so every lane gets its turn whatever stands in the others. Deliveries of the
// stream are bounded in number and bytes by the window; those of the retry queue are bounded by the claim.
type dispatcher struct {
	cfg     *Config
	metrics *metrics
	now     func() time.Time
	// deferred takes a job that is not attempted now. It is called under the lock.
	deferred func(j *job, reason string, due time.Duration)
	// lease takes a running job over into the retry queue. It is called under the lock.
	lease func(j *job)
	// claimedDone is called after deliveries of the retry queue have left memory.
	claimedDone func()

	mu       sync.Mutex
	work     sync.Cond // a lane entered the ring, or the dispatcher closed
	room     chan struct{}
	closed   bool
	drained  chan struct{} // not nil: nothing more is started
	empty    bool          // drained is closed
	lanes    map[laneKey]*lane
	ring     []*lane // FIFO; ring[ringHead:] are waiting
	ringHead int
	running  jobList
	queued   int

	used     int   // deliveries of the stream in memory
	bytes    int64 // and what they occupy
	claimed  int   // deliveries of the retry queue in memory
	active   int   // lanes that had an arrival lately
	starving int   // of these, lanes without any work

	committed time.Time // the latest commit that the stream has come to
}

func newDispatcher(cfg *Config, m *metrics) *dispatcher {
	d := &dispatcher{cfg: cfg, metrics: m, now: time.Now, lanes: make(map[laneKey]*lane), room: make(chan struct{}, 1)}
	d.work.L = &d.mu
	return d
}

func (d *dispatcher) lane(j *job) *lane {
	key := laneKey{j.Tenant, j.EndpointID}
	l := d.lanes[key]
	if l == nil {
		l = d.newLane(key)
		d.lanes[key] = l
	}
	l.limit = j.endpoint.Concurrency
	if l.limit <= 0 {
		l.limit = d.cfg.Delivery.Workers
	}
	l.last = d.now()
	j.lane = l
	return l
}

// admit puts a delivery of the stream into its lane. Where there is no room it waits, as long as the wait costs nobody but the lane itself and
// not longer than a second; else it defers the delivery.
func (d *dispatcher) admit(ctx context.Context, j *job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.lane(j)
	j.admitted = l.last
	if d.drained != nil {
		d.shed(ctx, j, deferDrain, 0)
		return
	}
	d.arrive(l, j.committed)
	var deadline <-chan time.Time
	for {
		if t := l.blockedFor(d); t > 0 {
			d.shed(ctx, j, deferBreaker, t)
			return
		}
		over := l.used >= d.share()
		if over && d.starving > 0 {
			d.shed(ctx, j, deferShare, 0)
			return
		}
		full := d.used >= d.cfg.Window.Deliveries || d.used > 0 && d.bytes+j.bytes > int64(d.cfg.Window.Bytes)
		if !over && !full {
			d.hold(j)
			d.enqueue(j)
			return
		}
		if deadline == nil {
			t := time.NewTimer(time.Second)
			defer t.Stop()
			deadline = t.C
		}
		if !d.waitRoom(ctx, deadline) {
			d.shed(ctx, j, deferWindow, 0)
			return
		}
	}
}

// waitRoom gives the lock away until there may be room. It returns false when the wait is over without.
func (d *dispatcher) waitRoom(ctx context.Context, deadline <-chan time.Time) bool {
	d.mu.Unlock()
	defer d.mu.Lock()
	select {
	case <-d.room:
		return true
	case <-deadline:
		return false
	case <-ctx.Done():
		return false
	}
}

// share is what one lane may have of the window while others want theirs.
func (d *dispatcher) share() int {
	return max(d.cfg.Window.Deliveries/max(d.active, 1), 16)
}

func (d *dispatcher) arrive(l *lane, committed time.Time) {
	l.committed = committed
	if committed.After(d.committed) {
		d.committed = committed
	}
	if !l.active {
		l.active = true
		d.active++
		if l.used == 0 {
			d.starving++
		}
	}
}

// hold takes room in the window; release gives it back.
func (d *dispatcher) hold(j *job) {
	l := j.lane
	if l.used == 0 && l.active {
		d.starving--
	}
	l.used++
	d.used++
	d.bytes += j.bytes
}

// shed defers a delivery of the stream. What is deferred may exceed the window by a quarter until it is recorded; beyond that the stream waits
// for the database.
func (d *dispatcher) shed(ctx context.Context, j *job, reason string, due time.Duration) {
	for d.used >= d.cfg.Window.Deliveries*5/4 || d.used > 0 && d.bytes+j.bytes > int64(d.cfg.Window.Bytes)*5/4 {
		if !d.waitRoom(ctx, nil) {
			break // the session is over: drain records what there is
		}
	}
	d.hold(j)
	d.deferred(j, reason, due)
}

// postpone defers a delivery of the stream without asking its lane.
func (d *dispatcher) postpone(ctx context.Context, j *job, reason string, due time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	j.admitted = d.lane(j).last
	d.shed(ctx, j, reason, due)
}

// offer puts a claimed delivery into its lane, or back into the retry queue if the lane is blocked. Nothing more is claimed for a lane that has
// work for all its capacity, see busy.
func (d *dispatcher) offer(j *job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.lane(j)
	j.admitted = l.last
	d.claimed++
	if d.drained != nil {
		d.deferred(j, deferDrain, 0)
		return
	}
	if t := l.blockedFor(d); t > 0 {
		d.deferred(j, deferBreaker, t)
		return
	}
	d.enqueue(j)
}

// putOff gives a claimed delivery back without offering it to its lane.
func (d *dispatcher) putOff(j *job, reason string, due time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.claimed++
	d.deferred(j, reason, due)
}

func (d *dispatcher) enqueue(j *job) {
	j.lane.queue.push(j)
	d.queued++
	d.rouse(j.lane)
}

// rouse puts the lane into the ring if it has work that may start.
func (d *dispatcher) rouse(l *lane) {
	if l.ready || l.queue.n == 0 || !l.capacity() {
		return
	}
	l.ready = true
	if d.ringHead > 64 && d.ringHead > len(d.ring)/2 {
		d.ring = d.ring[:copy(d.ring, d.ring[d.ringHead:])]
		d.ringHead = 0
	}
	d.ring = append(d.ring, l)
	d.work.Signal()
}

// take waits for a delivery to attempt. It returns nil once the dispatcher is closed.
func (d *dispatcher) take() *job {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		for d.ringHead == len(d.ring) && !d.closed {
			d.work.Wait()
		}
		if d.closed {
			return nil
		}
		l := d.ring[d.ringHead]
		d.ring[d.ringHead] = nil
		d.ringHead++
		l.ready = false
		if l.queue.n == 0 || !l.capacity() {
			continue
		}
		settle, err := l.breaker.Allow()
		if err != nil {
			d.refuse(l, err)
			continue
		}
		j := l.queue.pop()
		d.queued--
		l.running++
		j.running, j.settle = true, settle
		d.running.push(j)
		d.rouse(l)
		return j
	}
}

// refuse empties the queue of a lane whose breaker lets nothing through. While it is half-open the probes under way decide soon.
func (d *dispatcher) refuse(l *lane, err error) {
	due := l.blockedFor(d)
	if err == gobreaker.ErrTooManyRequests { //nolint:errorlint // gobreaker returns the bare value
		due = spread(time.Second)
	}
	for j := l.queue.pop(); j != nil; j = l.queue.pop() {
		d.queued--
		d.deferred(j, deferBreaker, max(due, 100*time.Millisecond))
	}
}

// finish takes a delivery whose attempt has ended off its lane. failure is what the breaker should count, nil a success. It tells whether the
// retry queue has taken the delivery over meanwhile.
func (d *dispatcher) finish(j *job, failure error) (leased bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := j.lane
	d.running.remove(j)
	j.running = false
	l.running--
	j.settle(failure)
	d.rouse(l)
	return j.leased
}

// release gives back the room of deliveries whose outcome is durable.
func (d *dispatcher) release(jobs []*job) {
	d.mu.Lock()
	before := d.claimed
	for _, j := range jobs {
		if j.ledger == nil {
			d.claimed--
			continue
		}
		l := j.lane
		l.used--
		d.used--
		d.bytes -= j.bytes
		if l.used == 0 && l.active {
			d.starving++
		}
	}
	d.checkDrained()
	fewer := d.claimed < before
	d.mu.Unlock()
	signal(d.room)
	if fewer {
		d.claimedDone()
	}
}

// sweep looks after what has been in memory for longer than hold: what waits in a queue is deferred, what runs is handed to the retry queue
// under a lease, so that no receiver holds back the confirmed LSN. It also forgets lanes that nobody uses.
func (d *dispatcher) sweep(hold time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	for key, l := range d.lanes {
		for j := l.queue.head; j != nil && now.Sub(j.admitted) > hold; j = l.queue.head {
			l.queue.remove(j)
			d.queued--
			if j.ledger == nil {
				d.deferred(j, deferHold, spread(hold)) // others may be faster than this lane
			} else {
				d.deferred(j, deferHold, 0)
			}
		}
		idle := now.Sub(l.last)
		if l.active && d.committed.Sub(l.committed) > activeFor {
			l.active = false
			d.active--
			if l.used == 0 {
				d.starving--
			}
		}
		if !l.active && l.used == 0 && l.queue.n == 0 && l.running == 0 && !l.ready && idle > 10*time.Minute &&
			l.breaker.State() == gobreaker.StateClosed {
			delete(d.lanes, key)
		}
	}
	for j := d.running.head; j != nil; j = j.next {
		if j.ledger != nil && !j.leased && now.Sub(j.admitted) > hold {
			j.leased = true
			d.lease(j)
		}
	}
}

// busy lists the endpoints for which nothing should be claimed now.
func (d *dispatcher) busy() []outbox.UUID {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ids []outbox.UUID
	for key, l := range d.lanes {
		if l.queue.n >= 2*l.limit || l.breaker.State() == gobreaker.StateOpen {
			ids = append(ids, key.endpoint)
		}
	}
	return ids
}

// abandon takes what a session has not started out of the queues, for the log has it still. It returns how many that were.
func (d *dispatcher) abandon(of *ledger) int {
	d.mu.Lock()
	var left []*job
	for _, l := range d.lanes {
		for j, next := l.queue.head, (*job)(nil); j != nil; j = next {
			next = j.next
			if j.ledger == of {
				l.queue.remove(j)
				d.queued--
				left = append(left, j)
			}
		}
	}
	d.mu.Unlock()
	d.release(left)
	return len(left)
}

// drain starts nothing more: what waits, and all that still comes, is deferred. The channel is closed once every outcome is durable.
func (d *dispatcher) drain() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.drained = make(chan struct{})
	for _, l := range d.lanes {
		for j := l.queue.pop(); j != nil; j = l.queue.pop() {
			d.queued--
			d.deferred(j, deferDrain, 0)
		}
	}
	d.checkDrained()
	return d.drained
}

func (d *dispatcher) checkDrained() {
	if d.drained != nil && !d.empty && d.used == 0 && d.claimed == 0 {
		d.empty = true
		close(d.drained)
	}
}

// load counts the deliveries in memory: those of the stream, their bytes, those of the retry queue, and how many of both are in flight.
func (d *dispatcher) load() (stream int, bytes int64, claimed, running int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used, d.bytes, d.claimed, d.running.n
}

// leases lists the deliveries in memory that are leased in the retry queue.
func (d *dispatcher) leases() []outbox.UUID {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ids []outbox.UUID
	for j := d.running.head; j != nil; j = j.next {
		if j.ledger == nil || j.leased {
			ids = append(ids, j.ID)
		}
	}
	for _, l := range d.lanes {
		for j := l.queue.head; j != nil; j = j.next {
			if j.ledger == nil {
				ids = append(ids, j.ID)
			}
		}
	}
	return ids
}

// close ends take. What still waits stays where it is.
func (d *dispatcher) close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.work.Broadcast()
}
