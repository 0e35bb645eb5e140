package main

import (
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
)

// demoPair is one delivery.
type demoPair struct{ endpoint, event outbox.UUID }

// demoFate is what became of a delivery, as far as application and receivers know.
type demoFate struct {
	committed time.Time // when COMMIT had returned; zero: it has not, and must not be sent if it never does
	taken     time.Time // when the receiver first took it; zero: not yet
	healthy   bool      // and it was the healthy receiver
	requests  int
	takes     int // requests answered with 2xx
}

// demoOracle knows what must arrive and what has arrived without asking the relay or its tables. It is safe for concurrent use.
type demoOracle struct {
	mu                  sync.Mutex
	began, last         time.Time // of inserting; latest receipt at the healthy receiver
	events, rolled      int
	expected, delivered int // pairs
	forgeries           int
	fates               map[demoPair]*demoFate
	latencies           []time.Duration
}

func newDemoOracle() *demoOracle { return &demoOracle{fates: make(map[demoPair]*demoFate)} }

func (o *demoOracle) begin(at time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.began = at
}

// committed takes note of a transaction whose COMMIT returned at that time. Its events may have been received before.
func (o *demoOracle) committed(at time.Time, events int, pairs []demoPair) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events += events
	o.expected += len(pairs)
	for _, p := range pairs {
		f := o.fate(p)
		f.committed = at
		if f.takes > 0 {
			o.deliver(f)
		}
	}
}

func (o *demoOracle) rolledBack(events int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rolled += events
}

// received takes note of a request that came at that time, and whether it was answered with 2xx.
func (o *demoOracle) received(p demoPair, at time.Time, taken, healthy bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f := o.fate(p)
	f.requests++
	if !taken {
		return
	}
	f.takes++
	if f.takes > 1 {
		return
	}
	f.taken, f.healthy = at, healthy
	if !f.committed.IsZero() {
		o.deliver(f)
	}
}

// forged takes note of a request without a good signature, or for nobody.
func (o *demoOracle) forged() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.forgeries++
}

func (o *demoOracle) fate(p demoPair) *demoFate {
	f := o.fates[p]
	if f == nil {
		f = new(demoFate)
		o.fates[p] = f
	}
	return f
}

// deliver counts a pair that is both committed and taken. The receiver may have it before COMMIT returns to the application: the latency is zero then.
func (o *demoOracle) deliver(f *demoFate) {
	o.delivered++
	if f.healthy {
		o.latencies = append(o.latencies, max(f.taken.Sub(f.committed), 0))
		if f.taken.After(o.last) {
			o.last = f.taken
		}
	}
}

// demoSample is how it stands at a moment.
type demoSample struct {
	committed, rolled  int // events
	expected, received int // deliveries
	waiting, dead      int // deliveries
	median, slowest    time.Duration
}

// inFlight counts what is neither received nor waiting nor dead. The parts are not counted at the same moment.
func (s *demoSample) inFlight() int { return max(s.expected-s.received-s.waiting-s.dead, 0) }

// recent is how many deliveries the latency of a sample is taken from.
const recent = 2000

// sample leaves waiting and dead to be filled in.
func (o *demoOracle) sample() demoSample {
	o.mu.Lock()
	defer o.mu.Unlock()
	last := slices.Clone(o.latencies[max(0, len(o.latencies)-recent):])
	slices.Sort(last)
	return demoSample{
		committed: o.events, rolled: o.rolled, received: o.delivered, expected: o.expected,
		median: percentile(last, 50), slowest: percentile(last, 99),
	}
}

// settled tells whether everything committed has been received or is a dead letter.
func (o *demoOracle) settled(dead map[demoPair]bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.expected-o.delivered > len(dead) {
		return false
	}
	for p, f := range o.fates {
		if !f.committed.IsZero() && f.takes == 0 && !dead[p] {
			return false
		}
	}
	return true
}

// demoResult is what the demo ends with.
type demoResult struct {
	events, rolled           int // committed and rolled back
	expected, delivered      int // deliveries, as all below
	retried, dead            int
	lost, ghosts, duplicates int
	forgeries                int
	recorded, unrecorded     int
	perSecond                float64 // events, up to the last receipt at the healthy receiver
	measured                 int     // deliveries that the latency is taken from
	median, slowest          time.Duration
}

// err says which promise the relay has not kept. Duplicates are no breach of it.
func (r *demoResult) err() error {
	if r.lost+r.ghosts+r.forgeries+r.unrecorded == 0 {
		return nil
	}
	return fmt.Errorf("%d lost, %d ghosts, %d bad signatures, %d unrecorded: none of these may be", r.lost, r.ghosts, r.forgeries, r.unrecorded)
}

// judge compares, once everything has come to rest, what was to happen with what has happened and with what the database says of it.
func (o *demoOracle) judge(recorded map[demoPair]string, dead map[demoPair]bool) *demoResult {
	o.mu.Lock()
	defer o.mu.Unlock()
	slices.Sort(o.latencies)
	r := &demoResult{
		events: o.events, rolled: o.rolled, expected: o.expected, delivered: o.delivered, forgeries: o.forgeries, recorded: len(recorded),
		measured: len(o.latencies), median: percentile(o.latencies, 50), slowest: percentile(o.latencies, 99),
	}
	if took := o.last.Sub(o.began); took > 0 {
		r.perSecond = float64(o.events) / took.Seconds()
	}
	for p, f := range o.fates {
		if f.requests > 1 {
			r.retried++
		}
		if f.takes > 1 {
			r.duplicates++
		}
		switch {
		case f.committed.IsZero():
			r.ghosts++
		case f.takes > 0 && recorded[p] != "success":
			r.unrecorded++
		case f.takes > 0:
		case !dead[p]:
			r.lost++
		default:
			r.dead++
			if recorded[p] != "failed" {
				r.unrecorded++
			}
		}
	}
	for p := range recorded {
		if o.fates[p] == nil {
			r.ghosts++ // the relay meant to send it
		}
	}
	return r
}

// percentile is the nearest rank: the least value that p per cent are not above. Of nothing it is zero.
func percentile(sorted []time.Duration, p float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[max(rank, 1)-1]
}
