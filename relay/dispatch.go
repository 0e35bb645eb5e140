package relay

import (
	"context"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// jobOverhead is what a delivery costs in memory besides its share of the body, in bytes.
const jobOverhead = 768

// activeFor is how long after its last event from the stream a lane counts as one of those that want a share of the window. It is measured in the
// time of the commits: while a huge transaction is read, the others do not cease to matter because their events stand behind it.
const activeFor = 10 * time.Second

// forgetAfter is how long a lane without anything is kept, and forgetBrokenAfter one whose endpoint fails.
const (
	forgetAfter       = 10 * time.Minute
	forgetBrokenAfter = 24 * time.Hour
)

// beatEvery is how often a stream that waits for room gives a sign of life.
const beatEvery = 500 * time.Millisecond

// parked is the due time of what waits until somebody wakes it.
const parked = time.Duration(math.MaxInt64)

// A room holds deliveries of the stream, each from its admission until its outcome is durable.
type room struct {
	n     int
	bytes int64
}

// The rooms. All that is in memory is in the window, but for the surplus of lanes that have their share of it while others have nothing to do, and
// for what was deferred on arrival.
const (
	inWindow = iota
	inReserve
	inDeferral
	roomsNumber
)

// The dispatcher shares out the workers among the lanes.
//
//	stream ──admit──► lane queue ─┐                      ┌─► finish ─► recorder ─► release
//	queue  ──admit──► lane queue ─┼─► ring ─► take ─► attempt
//	                  lane queue ─┘                      └─► (held too long) ─► lease ─► recorder
//
// A lane stands in the ring of its tenant, and the tenant in that of the dispatcher, while it has both work and leave to start (mayStart): so
// every tenant and every lane gets its turn whatever stands in the others. Deliveries of the stream are bounded in number and bytes by the
// window; those of the retry queue are bounded by the claim.
type dispatcher struct {
	cfg     *Config // under the lock, see reconfigure
	metrics *metrics
	now     func() time.Time
	// deferred takes a job that is not attempted now. It is called under the lock.
	deferred func(j *job, reason string, due time.Duration)
	// ended takes the outcome of an attempt. For a delivery with an order it is called under the lock.
	ended func(j *job, o store.Outcome)
	// lease takes a running job over into the retry queue. It is called under the lock.
	lease func(j *job)
	// claimedDone is called after deliveries of the retry queue have left memory.
	claimedDone func()
	// breakerOpened is told when a lane's breaker opens, and for how long. It is called under the lock.
	breakerOpened func(key laneKey, openFor time.Duration)
	// turned is told that a lane's endpoint does not work any more (open), or does again, with the attempt that showed it. It is called without the lock.
	turned func(key laneKey, open bool, class delivery.Class, fault string)
	// beat keeps the stream alive while admit and postpone make it wait. It is called in their goroutine, without the lock.
	beat func(context.Context)
	// doubt is called when a tenure has run out while there is work of it. It is called under the lock.
	doubt func()
	// spawn starts one more worker. It is called under the lock, Config.Delivery.Workers times at most.
	spawn func()

	// mu is of all that follows, and of lanes, parties and hosts. The methods that others call take it themselves, in their first lines; all the rest is called
	// under it, and waitRoom and rest give it away while they wait.
	mu      sync.Mutex
	workers int             // started
	resting []chan struct{} // the bells of workers that wait for work; the last one is woken first, for its stack is warm
	spare   []chan struct{} // bells that nobody waits for
	room    chan struct{}   // there may be room for what the stream brings, see waitRoom
	closed  bool
	drained chan struct{} // not nil: nothing more is started
	empty   bool          // drained is closed

	lanes    map[laneKey]*lane
	watched  map[laneKey]*lane // those of them that sweep and its like look at, see watch
	parties  map[string]*party
	hosts    map[string]*host
	ring     fifo[*party]
	stalled  fifo[*lane] // those that wait for a worker
	running  jobList
	stamp    uint64
	keys     int // blocked ones of lanes that are not crowded
	mostKeys int // of them

	rooms        [roomsNumber]room
	unrecorded   int       // deliveries that were attempted and whose outcome is not durable
	choked       bool      // by these: nothing is started before they are fewer
	relieved     time.Time // when they were
	swept        time.Time // when lanes were last looked after, or this was made
	tidied       time.Time // when lanes that nobody uses were last looked for
	claimed      int       // deliveries of the retry queue in memory
	claimedBytes int64     // and what they occupy
	// held are the deliveries in memory that are leased in the retry queue, until their outcome is durable.
	held          map[outbox.UUID]*job
	active        []*lane // that had an arrival lately
	activeParties int     // tenants with such
	busyParties   int     // tenants with something queued or running
	starving      int     // active lanes that could do something and have nothing queued or running

	committed time.Time // the latest commit that the stream has come to
	calmed    time.Time // what it was when the active lanes were last looked at
}

func newDispatcher(cfg *Config, m *metrics) *dispatcher {
	return &dispatcher{
		cfg: cfg, metrics: m, now: time.Now, swept: time.Now(), mostKeys: mostKeys, room: make(chan struct{}, 1),
		deferred: func(*job, string, time.Duration) {}, lease: func(*job) {}, claimedDone: func() {},
		breakerOpened: func(laneKey, time.Duration) {}, turned: func(laneKey, bool, delivery.Class, string) {}, doubt: func() {}, spawn: func() {}, beat: func(context.Context) {},
		held: make(map[outbox.UUID]*job), lanes: make(map[laneKey]*lane), watched: make(map[laneKey]*lane), parties: make(map[string]*party), hosts: make(map[string]*host),
	}
}

func (d *dispatcher) laneOf(key laneKey) *lane {
	l := d.lanes[key]
	if l == nil {
		l = d.newLane(key)
		d.lanes[key] = l
		l.last = d.now()
	}
	d.watch(l)
	return l
}

// lane returns the lane of a job, with the limits that its endpoint has now.
func (d *dispatcher) lane(j *job) *lane {
	l := d.laneOf(laneKey{j.Tenant, j.EndpointID})
	l.last = d.now()
	j.lane, j.admitted = l, l.last
	if ep := j.endpoint; ep != nil {
		l.endpoint = ep
		d.setLimits(l, ep.Concurrency, ep.Rate)
		d.setHost(l, ep.Host)
	}
	return l
}

// regain has a job that has waited in no queue stand in a lane that is watched: meanwhile a sweep may have found it quiet, or even forgotten it.
func (d *dispatcher) regain(j *job) {
	if d.laneOf(j.lane.key) != j.lane {
		d.lane(j)
	}
}

// admit puts a delivery of the stream into its lane. Where there is no room it waits, as long as the wait costs nobody but the lane itself and
// not longer than a second; else it defers the delivery.
func (d *dispatcher) admit(ctx context.Context, j *job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.lane(j)
	d.arrive(l, j.committed)
	var deadline <-chan time.Time
	for {
		reason, due := d.refusal(j)
		d.starve(l, func() { l.refuses = reason != "" })
		if reason != "" {
			d.shed(ctx, j, reason, due)
			return
		}
		over := d.overShare(l)
		if over && d.starving > 0 {
			if !d.useReserve(j) {
				d.shed(ctx, j, store.DeferShare, 0)
			}
			return
		}
		full := d.rooms[inWindow].n >= d.cfg.Window.Deliveries || d.exceeds(int64(d.cfg.Window.Bytes), j)
		if !over && !full {
			d.hold(j, inWindow)
			d.enqueue(j)
			return
		}
		if deadline == nil {
			t := time.NewTimer(time.Second)
			defer t.Stop()
			deadline = t.C
		}
		if !d.waitRoom(ctx, j, deadline) {
			d.shed(ctx, j, store.DeferWindow, 0)
			return
		}
	}
}

// refusal tells why a delivery of the stream cannot even wait in its lane, and when it is due then.
func (d *dispatcher) refusal(j *job) (reason string, due time.Duration) {
	l := j.lane
	if d.drained != nil { // since it waits for room, perhaps
		return store.DeferDrain, 0
	}
	if l.isBlocked(j) {
		return store.DeferOrder, 0
	}
	if t, reason := l.blockedFor(d); t > 0 {
		return reason, t
	}
	if l.queue.n >= l.fits(d.cfg.Window.Hold) {
		return store.DeferRate, l.later(d.now(), d.cfg.Window.Hold)
	}
	return "", 0
}

// waitRoom gives the lock away until there may be room, or it is time to look again. It returns false when the wait is over without.
func (d *dispatcher) waitRoom(ctx context.Context, j *job, deadline <-chan time.Time) bool {
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.regain(j)
	}()
	t := time.NewTimer(beatEvery)
	defer t.Stop()
	select {
	case <-d.room:
	case <-t.C:
		d.beat(ctx)
	case <-deadline:
		return false
	case <-ctx.Done():
		return false
	}
	return true
}

func (d *dispatcher) arrive(l *lane, committed time.Time) {
	l.committed = committed
	if committed.After(d.committed) {
		d.committed = committed
	}
	if l.active {
		return
	}
	d.active = append(d.active, l)
	d.starve(l, func() { l.active = true })
	if l.party.active++; l.party.active == 1 {
		d.activeParties++
	}
}

// used is how many deliveries of the stream are in memory, bytes what they occupy.
func (d *dispatcher) used() int {
	return d.rooms[inWindow].n + d.rooms[inReserve].n + d.rooms[inDeferral].n
}

func (d *dispatcher) bytes() int64 {
	return d.rooms[inWindow].bytes + d.rooms[inReserve].bytes + d.rooms[inDeferral].bytes
}

// exceeds tells whether a delivery would take the bodies in window and reserve beyond a limit. A single one may.
func (d *dispatcher) exceeds(limit int64, j *job) bool {
	w, r := d.rooms[inWindow], d.rooms[inReserve]
	return w.n+r.n > 0 && w.bytes+r.bytes+j.bytes > limit
}

// shed defers a delivery of the stream on its arrival. A quarter of the window is there for such until they are recorded; beyond that the stream waits
// for the database.
func (d *dispatcher) shed(ctx context.Context, j *job, reason string, due time.Duration) {
	d.awaitDeferral(ctx, j)
	d.hold(j, inDeferral)
	if j.ordered() {
		d.blockKey(j.lane, j.Order.Key)
	}
	d.defers(j, reason, due)
}

func (d *dispatcher) awaitDeferral(ctx context.Context, j *job) {
	for r := &d.rooms[inDeferral]; r.n > 0 && (r.n >= d.cfg.Window.Deliveries/4 || r.bytes+j.bytes > int64(d.cfg.Window.Bytes)/4); {
		if !d.waitRoom(ctx, j, nil) {
			break // the session is over: drain records what there is
		}
	}
}

// defers hands a job to the recorder as a row that is due later.
func (d *dispatcher) defers(j *job, reason string, due time.Duration) {
	d.blocks(j)
	d.deferred(j, reason, due)
}

func (d *dispatcher) leaseRunning(j *job) {
	j.leased = true
	d.held[j.ID] = j
	d.blocks(j)
	d.lease(j)
}

// postpone defers a delivery of the stream without asking its lane.
func (d *dispatcher) postpone(ctx context.Context, j *job, reason string, due time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lane(j)
	d.shed(ctx, j, reason, due)
}

// reject makes a dead letter of a delivery of the stream without asking its lane. Others of its key neither wait for it, nor it for them: nothing is sent.
func (d *dispatcher) reject(ctx context.Context, j *job) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lane(j)
	d.awaitDeferral(ctx, j)
	d.hold(j, inDeferral)
	d.ended(j, store.Outcome{Delivery: &j.Delivery, Status: store.Failed, Code: j.refused.code, Reason: j.refused.reason})
}

// offered is a claimed delivery. One with a reason goes back into the retry queue without being offered to its lane.
type offered struct {
	*job
	reason string
	due    time.Duration
}

// offer puts claimed deliveries into their lanes, or back into the retry queue where the lane is blocked. Nothing more is claimed for a lane that
// has work for all its capacity, see caps. All of a claim is offered at once: were the first of a key to fail before the last is here, that one
// would find nothing in front of it.
func (d *dispatcher) offer(list []offered) {
	d.mu.Lock()
	defer d.mu.Unlock()
	type laneOrder struct {
		lane *lane
		key  outbox.UUID
	}
	back := make(map[laneOrder]bool) // the keys of which one has gone back, as must all that follow it
	for _, o := range list {
		key := laneOrder{d.lane(o.job), o.Order.Key}
		own := d.held[o.ID]
		switch {
		case own == nil:
			if !d.accept(o, back[key]) && o.ordered() {
				back[key] = true
			}
			continue
		case own.counted && o.Attempts == own.Attempts:
			// Its outcome is durable, which we are about to hear, and has made the row due at once. What was put back without an attempt cannot be told from the
			// case below, and waits for the lease.
			own.reclaimed = &o
		default:
			// Its outcome could not be recorded before the lease ran out. To attempt it again would only repeat it; and the lease is renewed now.
			own.mine = o.mine
		}
		back[key] = back[key] || o.ordered()
	}
}

// accept puts a claimed delivery into its lane, or back into the retry queue: then it returns false. behind: one before it in its order has gone back.
func (d *dispatcher) accept(o offered, behind bool) bool {
	d.held[o.ID] = o.job
	d.claimed++
	d.claimedBytes += o.bytes
	if o.reason == "" {
		o.reason, o.due = d.refusalOfClaimed(o.lane)
	}
	if o.reason == "" && behind {
		o.reason, o.due = store.DeferOrder, 0
	}
	if o.reason != "" {
		d.defers(o.job, o.reason, o.due)
		return false
	}
	d.enqueue(o.job)
	return true
}

func (d *dispatcher) refusalOfClaimed(l *lane) (reason string, due time.Duration) {
	if d.drained != nil {
		return store.DeferDrain, 0
	}
	if t, reason := l.blockedFor(d); t > 0 {
		return reason, t
	}
	return "", 0
}

// spread adds up to a quarter, so that what waits for the same moment does not come back at the same moment.
func spread(t time.Duration) time.Duration {
	return t + time.Duration(rand.Int64N(int64(t)/4+1)) //nolint:gosec // jitter needs no secrecy
}
