package relay

import (
	"context"
	"math"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/neo-commons/outbox-relay/delivery"
)

// How a running relay takes on another configuration.
//
//	Options.Updates ──► engine.cfg ──► whoever asks for it next
//	                        ├──► client: addresses, hosts, answers
//	                        ├──► routing tables: endpoints with the new defaults, for what is matched from now on
//	                        └──► dispatcher: limits of lanes and hosts, breakers
//
// What is in memory keeps its endpoint as it was when it was matched or claimed, with the timeout and the retries of then; limits count for it at once. What
// waits in the retry queue keeps its due time, and is sent by the configuration of then.

// cfg is the configuration as it is now, with the slot of the shard. It is never written to.
func (e *engine) cfg() *Config { return e.config.Load() }

// follow takes on what comes, until ctx is done.
func (e *engine) follow(ctx context.Context, updates <-chan Config) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case next, open := <-updates:
			if !open {
				return nil
			}
			e.reconfigure(next)
		}
	}
}

func (e *engine) reconfigure(next Config) {
	next = e.cfg().Reloaded(next)
	defaults := next.EndpointDefaults()
	e.config.Store(&next)
	e.defaults.Store(&defaults) // before the routing tables are looked through: one that is being loaded looks for it afterwards
	e.recorder.cfg.Store(&next)
	e.client.Reconfigure(next.ClientConfig(e.version))
	if s := e.leading.Load(); s != nil {
		for _, t := range s.served() {
			s.setDefaults(t)
		}
	}
	e.dispatcher.reconfigure(&next, defaults)
	signal(e.claim) // it may be waiting for as long as queue.poll was
}

// setDefaults has the endpoints of a tenant follow the configuration. It counts as a change of the routing table, since one that could not be used may match
// from now on, or the other way round.
func (s *session) setDefaults(t *tenant) {
	t.mu.Lock()
	invalid := t.table.SetDefaults(*s.defaults.Load())
	t.now.changes++
	t.mu.Unlock()
	signal(s.verify)
	for _, row := range invalid {
		s.complain(t, row.Table, row.ID, row.Err)
	}
}

// reconfigure has the lanes follow, those with work at once.
func (d *dispatcher) reconfigure(cfg *Config, defaults delivery.Defaults) {
	d.mu.Lock()
	defer d.mu.Unlock()
	was := d.cfg.Breaker
	d.cfg = cfg
	for _, h := range d.hosts { // they will ask again, now that the host may have more
		for h.waiting.len() > 0 {
			h.waiting.pop().stalled = false
		}
	}
	for _, l := range d.lanes {
		if l.endpoint != nil {
			concurrency, rate := l.endpoint.Limits(defaults)
			d.setLimits(l, concurrency, rate)
		}
		if was.Window != cfg.Breaker.Window || was.OpenFor != cfg.Breaker.OpenFor || was.HalfOpen != cfg.Breaker.HalfOpen {
			d.renewBreaker(l)
		}
		d.watch(l)
		d.rouse(l)
	}
}

// setLimits gives a lane the limits that its endpoint has now.
func (d *dispatcher) setLimits(l *lane, concurrency int, rate float64) {
	l.limit = concurrency
	if l.limit <= 0 {
		l.limit = d.cfg.Delivery.Workers
	}
	if l.endpoint.Order == delivery.OrderStrict {
		l.limit = 1
	}
	if l.rate != rate {
		l.setRate(d.now(), rate)
	}
}

// setRate changes the rate. Places that were given away at the old one are moved to where they are at the new one.
func (p *pace) setRate(now time.Time, rate float64) {
	old := p.rate
	p.rate = rate
	if old == 0 || rate == 0 {
		p.next, p.slot = time.Time{}, time.Time{}
		return
	}
	if wait := p.next.Sub(now); wait > 0 {
		p.next = now.Add(min(wait, p.interval()))
	}
	if wait := p.slot.Sub(now); wait > 0 {
		p.slot = now.Add(time.Duration(min(float64(wait)*old/rate, math.MaxInt64/2)))
	}
}

// renewBreaker puts another breaker into the place of a lane's, whose times cannot be changed. One that is open or probes begins to be open anew. What is
// under way tells the old one, which nobody listens to any more; failures in a row are the lane's own count.
func (d *dispatcher) renewBreaker(l *lane) {
	was := l.breakerState()
	l.breaker, l.state = d.newBreaker(l), gobreaker.StateClosed
	d.metrics.breakerChanged(was, gobreaker.StateClosed)
	if was == gobreaker.StateClosed {
		return
	}
	if settle, err := l.breaker.Allow(); err == nil {
		failures := l.failures
		l.failures = math.MaxInt // opens it whatever its settings
		settle(errAttempt)
		l.failures = failures
	}
}
