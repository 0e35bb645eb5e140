package relay

import (
	"math/rand/v2"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// A job is one delivery in memory, from the match to the durable outcome. Its fields belong to whoever holds the job, but for those named under
// the dispatcher's lock.
type job struct {
	store.Delivery

	endpoint  *delivery.Endpoint
	committed time.Time // COMMIT of the event by the server's clock; zero for a delivery from the retry queue
	ledger    *ledger   // of the session that read it; nil for a delivery from the retry queue
	commit    int       // its entry in the ledger

	// Under the dispatcher's lock.
	lane       *lane
	bytes      int64
	admitted   time.Time
	running    bool
	leased     bool        // the retry queue has taken it over from the ledger; the attempt goes on
	settle     func(error) // tells the breaker
	next, prev *job
}

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

// A lane is an endpoint's place in the dispatcher: its queue, its concurrency and its breaker. All of it is under the dispatcher's lock.
type lane struct {
	key       laneKey
	queue     jobList
	running   int
	used      int       // jobs of the stream: queued, running, or not yet recorded
	limit     int       // attempts at the same time
	ready     bool      // stands in the dispatcher's ring
	active    bool      // had an arrival from the stream lately
	last      time.Time // of the last arrival
	committed time.Time // of the last event from the stream
	breaker   *gobreaker.TwoStepCircuitBreaker[struct{}]
	opened    time.Time // when the breaker opened
}

func (d *dispatcher) newLane(key laneKey) *lane {
	l := &lane{key: key}
	cfg := d.cfg.Breaker
	l.breaker = gobreaker.NewTwoStepCircuitBreaker[struct{}](gobreaker.Settings{
		MaxRequests: uint32(cfg.HalfOpen), //nolint:gosec // validated
		Timeout:     cfg.OpenFor,
		ReadyToTrip: func(c gobreaker.Counts) bool { return int64(c.ConsecutiveFailures) >= int64(cfg.Failures) },
		// Runs under the breaker's own lock, which is only ever taken under the dispatcher's.
		OnStateChange: func(_ string, from, to gobreaker.State) {
			if to == gobreaker.StateOpen {
				l.opened = d.now()
			}
			d.metrics.breakerChanged(from, to)
		},
	})
	return l
}

// blockedFor tells how long nothing should be sent through the lane. Zero: it is open for attempts.
func (l *lane) blockedFor(d *dispatcher) time.Duration {
	if l.breaker.State() != gobreaker.StateOpen {
		return 0
	}
	left := l.opened.Add(d.cfg.Breaker.OpenFor).Sub(d.now())
	return spread(max(left, 100*time.Millisecond))
}

// spread adds up to a quarter, so that what waits for the same moment does not come back at the same moment.
func spread(t time.Duration) time.Duration {
	return t + time.Duration(rand.Int64N(int64(t)/4+1)) //nolint:gosec // jitter needs no secrecy
}

// capacity tells whether one more attempt may start.
func (l *lane) capacity() bool { return l.running < l.limit }
