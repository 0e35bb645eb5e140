package relay

import (
	"math"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"
	"go.opentelemetry.io/otel/trace"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// A job is one delivery in memory, from the match to the durable outcome. Its fields belong to whoever holds the job, but for those named under
// the dispatcher's lock.
type job struct {
	store.Delivery

	endpoint  *delivery.Endpoint
	committed time.Time  // COMMIT of the event by the server's clock; zero: it is not known
	span      trace.Span // nil: there are no traces
	ledger    *ledger    // of the session that read it; nil for a delivery from the retry queue
	commit    int        // its entry in the ledger
	judged    digest     // of the row that the endpoint was made of, for what is claimed and ordered
	refused   refusal    // why it is a dead letter from the start; zero: it is to be attempted

	owed atomic.Bool // counted for the objective

	// Under the dispatcher's lock.
	lane       *lane
	host       *host // that the attempt under way counts for
	bytes      int64
	sharing    *sharing // nil: it has its body for itself
	room       int      // where it is held, once it is
	unrecorded bool     // attempted, and not durable
	admitted   time.Time
	running    bool
	mine       time.Time   // until when a claimed delivery is leased to us, at least
	leased     bool        // the retry queue has taken it over from the ledger; the attempt goes on
	counted    bool        // it has been attempted, and Attempts has that
	reclaimed  *offered    // its row, claimed anew before release; nil: it is not
	blocking   bool        // counted among what keeps its key blocked until it is recorded
	settle     func(error) // tells the breaker
	next, prev *job
}

// ordered tells whether the delivery has a place among others.
func (j *job) ordered() bool { return !j.Order.Key.IsZero() }

// jobList is a queue of jobs linked through themselves.
type jobList struct {
	head, tail *job
	n          int
}

func (q *jobList) push(j *job) {
	j.next, j.prev = nil, q.tail
	if q.tail == nil {
		q.head = j
	} else {
		q.tail.next = j
	}
	q.tail = j
	q.n++
}

func (q *jobList) remove(j *job) {
	if j.prev == nil {
		q.head = j.next
	} else {
		j.prev.next = j.next
	}
	if j.next == nil {
		q.tail = j.prev
	} else {
		j.next.prev = j.prev
	}
	j.next, j.prev = nil, nil
	q.n--
}

func (q *jobList) pop() *job {
	j := q.head
	if j != nil {
		q.remove(j)
	}
	return j
}

type laneKey struct {
	tenant   string
	endpoint outbox.UUID
}

// A lane is an endpoint's place in the dispatcher: its queue, its limits, its breaker and its order. All of it is under the dispatcher's lock.
type lane struct {
	key      laneKey
	party    *party
	host     *host              // nil until an endpoint is known
	endpoint *delivery.Endpoint // of the latest delivery; nil until then
	queue    jobList            // may start, as far as their order goes
	behind   int                // jobs in chains that may not
	running  int
	begun    int     // attempts since the last sweep
	dry      bool    // had nothing queued at some time since
	speed    float64 // attempts a second while it has work for all its capacity; zero: it has none, or has not had it for long
	used     int     // jobs of the stream: queued, running, or not yet recorded
	windowed int     // those of them that are in the window
	ready    bool    // stands in its party's ring
	busy     bool    // counts among its party's lanes with work
	watched  bool    // stands among the dispatcher's watched
	stalled  bool    // stands in a list of those that wait for a worker or for the host

	active    bool      // had an arrival from the stream lately
	refuses   bool      // did not take the last one
	last      time.Time // of the last arrival
	committed time.Time // of the last event from the stream

	ramp
	pace
	breaker  *gobreaker.TwoStepCircuitBreaker[struct{}]
	state    gobreaker.State // of the breaker, as it was told last
	broken   bool            // it has opened, and not closed since: what was said of it last
	failures int             // in a row
	opened   time.Time       // when the breaker opened
	until    time.Time       // nothing is sent before: the receiver asked for it, or a breaker of before the start

	chains  map[outbox.UUID]*chain
	blocked map[outbox.UUID]*block
	crowd   *crowd // all its keys are blocked; nil: those in the map
}

// ramp is how many attempts run at the same time. It begins low, grows by one for every success that used all of it up to a threshold, and by
// one a round from there: a receiver that hangs from the start never gets more than the first few, and one that comes back is not knocked over by
// its backlog. An answer that says "too much" halves it, at most once a second. It is TCP's congestion control (RFC 5681), counted in attempts.
type ramp struct {
	limit     int // what configuration or row allow
	allowed   int
	threshold int
	grown     int
	credit    int // successes that may let it grow, since all of it was in use
	cut       time.Time
}

const firstAllowed = 8

func (r *ramp) allowance() int { return min(r.limit, r.allowed) }

// filled is told how many run when one more has started.
func (r *ramp) filled(running int) {
	if running >= r.allowed {
		r.credit = r.allowed
	}
}

func (r *ramp) succeeded() {
	if r.credit == 0 || r.allowed >= r.limit {
		return
	}
	r.credit--
	if r.grown++; r.allowed < r.threshold || r.grown >= r.allowed {
		r.allowed++
		r.grown = 0
	}
}

func (r *ramp) overloaded(now time.Time) {
	if now.Sub(r.cut) < time.Second {
		return
	}
	r.allowed = max(min(r.allowed, r.limit)/2, 1)
	r.threshold, r.grown, r.credit, r.cut = r.allowed, 0, 0, now
}

func (r *ramp) restart(first int) {
	r.threshold = max(r.allowance()/2, 1)
	r.allowed, r.grown, r.credit = first, 0, 0
}

// pace spaces attempts for a rate limit (the generic cell rate algorithm, ITU-T I.371): next is when the next attempt would come if all before
// it had kept their distance. Up to burstTime of attempts may come early.
type pace struct {
	rate  float64 // attempts a second; zero: no limit
	next  time.Time
	slot  time.Time // due time of what was deferred last for the rate
	timer *time.Timer
}

const burstTime = 20 * time.Millisecond

// interval stops at half of what a Duration holds: a rate may be so low that it takes longer.
func (p *pace) interval() time.Duration {
	return time.Duration(min(float64(time.Second)/p.rate, math.MaxInt64/2))
}

// wait tells how long until an attempt may start. The clock is looked at where there is a limit.
func (p *pace) wait(now func() time.Time) time.Duration {
	if p.rate == 0 {
		return 0
	}
	return max(p.next.Add(-burstTime).Sub(now()), 0)
}

func (p *pace) started(now func() time.Time) {
	if p.rate == 0 {
		return
	}
	if now := now(); p.next.Before(now) {
		p.next = now
	}
	p.next = p.next.Add(p.interval())
}

// fits tells how many deliveries start within d; math.MaxInt: more than there can be.
func (p *pace) fits(d time.Duration) int {
	n := p.rate * d.Seconds()
	if p.rate == 0 || n > math.MaxInt32 {
		return math.MaxInt
	}
	return max(int(n), 1)
}

// later returns when the next one that does not fit is due. What is deferred comes back at the rate, not all at once.
func (p *pace) later(now time.Time, hold time.Duration) time.Duration {
	if earliest := now.Add(hold); p.slot.Before(earliest) {
		p.slot = earliest
	}
	p.slot = p.slot.Add(p.interval())
	return p.slot.Sub(now)
}

func (d *dispatcher) newLane(key laneKey) *lane {
	l := &lane{key: key, party: d.partyOf(key.tenant)}
	l.party.lanes++
	l.allowed, l.threshold = firstAllowed, math.MaxInt
	l.breaker = d.newBreaker(l)
	return l
}

func (d *dispatcher) newBreaker(l *lane) (b *gobreaker.TwoStepCircuitBreaker[struct{}]) {
	cfg := d.cfg.Breaker
	b = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests:  uint32(cfg.HalfOpen), //nolint:gosec // validated
		Timeout:      cfg.OpenFor,
		Interval:     cfg.Window,
		BucketPeriod: cfg.Window / 10,
		ReadyToTrip: func(c gobreaker.Counts) bool {
			cfg := &d.cfg.Breaker // as it is now
			made := c.TotalSuccesses + c.TotalFailures
			return l.failures >= cfg.Failures || // its own count of these ends with the window
				cfg.FailureRatio > 0 && int(made) >= cfg.MinAttempts && float64(c.TotalFailures) >= cfg.FailureRatio*float64(made)
		},
		IsExcluded: func(err error) bool { return err == errNoVerdict }, //nolint:errorlint // our own value, given to settle
		// Runs under the breaker's own lock, which is only ever taken under the dispatcher's.
		OnStateChange: func(_ string, from, to gobreaker.State) {
			if l.breaker != b { // another one has taken its place, see renewBreaker
				return
			}
			l.state = to
			if to == gobreaker.StateOpen {
				l.opened = d.now()
				l.restart(cfg.HalfOpen)
				d.breakerOpened(l.key, cfg.OpenFor)
			}
			d.metrics.breakerChanged(from, to)
		},
	})
	return b
}

// breakerState is the state of the breaker. A closed one is not asked, which would have it look at the clock: that it has opened, it tells.
func (l *lane) breakerState() gobreaker.State {
	if l.state == gobreaker.StateClosed {
		return l.state
	}
	return l.breaker.State()
}

// turned tells whether, with its last attempt, the lane has turned from one that works into one that does not, or back. succeeded is how that ended.
func (l *lane) turned(succeeded bool) bool {
	if l.broken && succeeded && l.state == gobreaker.StateClosed || !l.broken && l.state == gobreaker.StateOpen {
		l.broken = !l.broken
		return true
	}
	return false
}

// blockedFor tells how long nothing should be sent through the lane, and why. Zero: it is open for attempts.
func (l *lane) blockedFor(d *dispatcher) (time.Duration, string) {
	if !l.until.IsZero() {
		if left := l.until.Sub(d.now()); left > 0 {
			return spread(max(left, 100*time.Millisecond)), store.DeferThrottled
		}
	}
	if l.breakerState() != gobreaker.StateOpen {
		return 0, ""
	}
	left := l.opened.Add(d.cfg.Breaker.OpenFor).Sub(d.now())
	return spread(max(left, 100*time.Millisecond)), store.DeferBreaker
}

// measure notes how fast the lane is, after some time without a measure. One that had nothing to do for a part of it has shown nothing: where a thousand
// lanes take turns, each gets its events in bursts.
func (l *lane) measure(spell time.Duration) {
	begun, dry := l.begun, l.dry
	l.begun, l.dry = 0, false
	switch speed := max(float64(begun), 1) / spell.Seconds(); {
	case l.queue.n == 0, dry:
		l.speed = 0
	case l.speed == 0:
		l.speed = speed
	default:
		l.speed = (l.speed + speed) / 2
	}
}

// idle tells whether the lane can be forgotten. A receiver that has asked for an hour, or gets an attempt an hour, must not be asked before because nothing
// else came for it meanwhile; and of one that has failed it is known for a day that it has, so that an answer is told of, and closes its breaker.
func (l *lane) idle(now time.Time) bool {
	after := forgetAfter
	if l.broken {
		after = forgetBrokenAfter
	}
	return now.Sub(l.last) > after && l.used == 0 && !l.active && l.rests(now) && l.breakerState() != gobreaker.StateOpen
}

// rests tells whether there is nothing in the lane, nor anything to wait for. A chain has its head in the queue, or running.
func (l *lane) rests(now time.Time) bool {
	return l.queue.n == 0 && l.running == 0 && !l.ready && !l.stalled && !l.until.After(now) && !l.next.After(now) &&
		len(l.blocked) == 0 && l.crowd == nil
}

// isQuiet tells whether the lane need not be watched: it rests, and nothing of it is to be measured, or to be told to those who claim.
func (l *lane) isQuiet(now time.Time) bool {
	return l.rests(now) && l.begun == 0 && l.speed == 0 && l.rate == 0 && l.state == gobreaker.StateClosed
}
