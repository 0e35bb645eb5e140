package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"syscall"
	"time"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// unsteady is a mood in which one of n requests fails, and none takes longer than slow.
func unsteady(n int, slow time.Duration) func(*rand.Rand, pair) (int, time.Duration, mischief) {
	return func(rnd *rand.Rand, _ pair) (int, time.Duration, mischief) {
		status := http.StatusOK
		if n > 0 && rnd.IntN(n) == 0 {
			status = http.StatusServiceUnavailable
		}
		return status, time.Duration(rnd.Int64N(int64(slow) + 1)), nil
	}
}

// kills are the scenarios in which the relay dies at a place of its own, over and over.
func kills() []*scenario {
	const row = "relay killed"
	list := []*scenario{
		killedAt(failpoint.Decoded, 150), killedAt(failpoint.Sending, 150), killedAt(failpoint.Answered, 150), killedAt(failpoint.Recording, 15),
		killedAt(failpoint.Committing, 15), killedAt(failpoint.Persisted, 15), killedAt(failpoint.Acked, 10), killedAt(failpoint.Deferred, 20),
		killedAt(failpoint.Claimed, 6), killedAt(failpoint.Taken, 1), killedAt(failpoint.Draining, 1), killedAt(failpoint.Audited, 1),
		{name: "killed-sent", quick: true, run: func(r *faultRun) {
			for range 1 + r.rnd.IntN(3) {
				p, n := r.start(), r.front.requests()+1+r.rnd.IntN(150)
				r.front.mu.Lock()
				r.front.arrived = func(i int) {
					if i == n {
						_ = p.cmd.Process.Kill()
					}
				}
				r.front.mu.Unlock()
				r.dies(p)
			}
			r.resume()
		}},
	}
	list = append(list, &scenario{name: "restarted", run: func(r *faultRun) {
		for range 1 + r.rnd.IntN(3) { // what was recorded is not sent again
			p := r.lead()
			r.more(20 + r.rnd.IntN(50))
			if _, exit := p.stop(r.t); exit != nil {
				r.violate("I6", "a relay that was told to stop ended with %v", exit)
			}
			r.died()
		}
		r.resume()
	}})
	for _, at := range []failpoint.Point{
		failpoint.HealLed, failpoint.HealDropped, failpoint.HealRenewed, failpoint.HealSettled, failpoint.HealMarked, failpoint.HealQueued,
	} {
		list = append(list, killedHealing(at))
	}
	for _, sc := range list {
		sc.row = row
	}
	return list
}

// killedAt kills the relay at one of the first passings of a place.
func killedAt(at failpoint.Point, passings int) *scenario {
	sc := &scenario{name: "killed-" + string(at)}
	switch at {
	case failpoint.Committing:
		sc.quick = true
	case failpoint.Deferred: // by a window that is soon full
		sc.window = 20
	default:
	}
	sc.run = func(r *faultRun) {
		switch at {
		case failpoint.Deferred:
			r.calm(unsteady(4, 40*time.Millisecond))
		case failpoint.Claimed:
			r.calm(unsteady(4, 8*time.Millisecond))
		default:
			r.calm(unsteady(r.rnd.IntN(2)*20, time.Duration(1+r.rnd.IntN(10))*time.Millisecond))
		}
		kills := 1 + r.rnd.IntN(3)
		if at == failpoint.Persisted { // what has been recorded is not sent again: that depends on what the last batch covers
			kills += 5
		}
		for range kills {
			p := r.start(fmt.Sprintf("OUTBOX_RELAY_FAILPOINT=%s:%d", at, 1+r.rnd.IntN(passings)))
			if at == failpoint.Draining {
				r.leads(p)
				r.more(r.rnd.IntN(100))
				_ = p.cmd.Process.Signal(syscall.SIGTERM)
			}
			r.dies(p)
		}
		r.resume()
	}
	return sc
}

// calm sets the mood of the receivers.
func (r *faultRun) calm(mood func(*rand.Rand, pair) (int, time.Duration, mischief)) {
	r.front.mu.Lock()
	r.front.mood = mood
	r.front.mu.Unlock()
}

// dies waits until a relay has killed itself.
func (r *faultRun) dies(p *relayProcess) {
	r.await("the relay to die", func() bool {
		select {
		case <-p.done:
			return true
		default:
			return false
		}
	})
	if p.exit == nil || p.exit.Error() != "signal: killed" {
		r.violate("harness", "the relay ended with %v", p.exit)
	}
	r.died()
}

// resume starts a relay that stays.
func (r *faultRun) resume() {
	r.over()
	r.start()
	r.recovery(&r.result.recoveries, 10*time.Second)
	r.more(20)
}

// killedHealing drops the slot while no relay runs, and kills the one that heals.
func killedHealing(at failpoint.Point) *scenario {
	return &scenario{name: "killed-" + string(at), heals: true, quick: at == failpoint.HealRenewed, run: func(r *faultRun) {
		p := r.lead()
		r.more(20 + r.rnd.IntN(100))
		r.kill(p)
		r.committed(20 + r.rnd.IntN(100))
		r.dropSlot()
		for i, point := range []failpoint.Point{at, r.anyHealing()}[:1+r.rnd.IntN(2)] {
			p := r.start(fmt.Sprintf("OUTBOX_RELAY_FAILPOINT=%s:1", point))
			if i == 0 {
				r.dies(p)
				continue
			}
			r.await("the relay to die, or to have nothing more to heal", func() bool {
				select {
				case <-p.done:
					return true
				default:
					return r.backfilled() && r.front.pairs() >= r.o.due()/2
				}
			})
			r.kill(p)
		}
		r.resume()
	}}
}

func (r *faultRun) anyHealing() failpoint.Point {
	points := []failpoint.Point{failpoint.HealLed, failpoint.HealDropped, failpoint.HealRenewed, failpoint.HealSettled, failpoint.HealMarked, failpoint.HealQueued}
	return points[r.rnd.IntN(len(points))]
}

// committed waits until n more events have been committed.
func (r *faultRun) committed(n int) {
	count := func() int {
		r.o.mu.Lock()
		defer r.o.mu.Unlock()
		return r.o.events
	}
	enough := count() + n
	r.await("commits", func() bool { return count() >= enough })
}

// dropSlot drops the slot, whoever streams from it.
func (r *faultRun) dropSlot() {
	r.await("the slot to be dropped", func() bool {
		_, _ = r.pool.Exec(r.ctx, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", r.slot)
		_, err := r.pool.Exec(r.ctx, "SELECT pg_drop_replication_slot($1)", r.slot)
		return err == nil
	})
}

// backfilled tells whether nothing is left to be queued.
func (r *faultRun) backfilled() bool {
	var open bool
	err := r.pool.QueryRow(r.ctx, `SELECT EXISTS (SELECT FROM outbox_relay.tenants WHERE backfill IS NOT NULL AND backfill_done_at IS NULL)
		OR NOT EXISTS (SELECT FROM pg_replication_slots r JOIN outbox_relay.progress p ON p.slot = r.slot_name WHERE r.slot_name = $1 AND r.confirmed_flush_lsn <= p.lsn)`, r.slot).Scan(&open)
	return err == nil && !open
}
