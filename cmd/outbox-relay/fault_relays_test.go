package main

import (
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// start starts a relay, with a bug if this run has one planted, and with more in its environment.
func (r *faultRun) start(env ...string) *relayProcess {
	if r.bug != "" {
		env = append(env, "OUTBOX_RELAY_PLANTED="+string(r.bug))
	}
	p := startBinary(r.t, faultyBinary(r.t), r.config, env...)
	r.mu.Lock()
	r.relays = append(r.relays, p)
	r.mu.Unlock()
	return p
}

// lead starts a relay and waits until it leads.
func (r *faultRun) lead(env ...string) *relayProcess {
	p := r.start(env...)
	r.leads(p)
	return p
}

func (r *faultRun) leads(p *relayProcess) {
	r.await("a leader", func() bool { return strings.Contains(p.said(r.t), `"msg":"leading"`) })
}

// alive lists the relays that run.
func (r *faultRun) alive() (list []*relayProcess) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.relays {
		select {
		case <-p.done:
		default:
			list = append(list, p)
		}
	}
	return list
}

// kill ends a relay and notes what may be repeated.
func (r *faultRun) kill(p *relayProcess) {
	_ = p.cmd.Process.Kill()
	<-p.done
	r.died()
}

// died notes what may be repeated after the only relay has died.
func (r *faultRun) died() {
	r.await("the end of its connections", func() bool { return r.front.connections() == 0 })
	r.interrupted()
}

// fault counts one.
func (r *faultRun) fault() {
	r.mu.Lock()
	r.result.faults++
	r.mu.Unlock()
}

// interrupted notes which deliveries have arrived and are not recorded: they may come again.
func (r *faultRun) interrupted() { r.interrupting()() }

// interrupting is interrupted for a fault that lasts: what arrives until the end of it may come again, unless it was recorded at its beginning.
func (r *faultRun) interrupting() (end func()) {
	var recorded map[pair]bool
	r.await("the recorded deliveries", func() bool {
		var err error
		recorded, err = r.successes()
		return err == nil
	})
	r.fault()
	return func() {
		moment := r.front.now()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.interruptions = append(r.interruptions, interruption{moment, recorded})
	}
}

// schemas lists the tenants, of which there may come to be more.
func (r *faultRun) schemas() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tenants
}

// successes lists the deliveries that are recorded as such.
func (r *faultRun) successes() (map[pair]bool, error) {
	all := make(map[pair]bool)
	for _, tenant := range r.schemas() {
		found, err := pairsOf(r.ctx, r.pool, `SELECT webhook_endpoint_id, webhook_event_id FROM `+pgx.Identifier{tenant, "webhook_deliveries"}.Sanitize()+
			` WHERE relayed AND delivery_status = 'success'`)
		if err != nil {
			return nil, err
		}
		for p := range found {
			all[p] = true
		}
	}
	return all, nil
}

// over says that a fault has ended, and recovery waits for the first delivery of an event that was begun after that.
func (r *faultRun) over() {
	r.mu.Lock()
	r.since, r.recovered = time.Now(), time.Time{}
	r.mu.Unlock()
}

func (r *faultRun) noteAccepted(p pair, _ hit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.recovered.IsZero() && !r.since.IsZero() && r.o.begunAfter(p.event, r.since) {
		r.recovered = time.Now()
	}
}

func (r *faultRun) recovery(into *[]time.Duration, limit time.Duration) {
	r.await("recovery", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return !r.recovered.IsZero()
	})
	r.mu.Lock()
	took := r.recovered.Sub(r.since)
	*into = append(*into, took)
	r.mu.Unlock()
	if took > bound(limit) {
		r.violate("I6", "recovery took %v, more than %v", took.Round(time.Millisecond), limit)
	}
}

// recover is over and recovery in one.
func (r *faultRun) recover(limit time.Duration) {
	r.over()
	r.recovery(&r.result.recoveries, limit)
}

// close stops the relays that still run.
func (r *faultRun) close() {
	for _, p := range r.alive() {
		if r.violated() {
			_ = p.cmd.Process.Kill()
			<-p.done
			continue
		}
		took, exit := p.stop(r.t)
		if exit != nil {
			r.violate("I6", "a relay that was told to stop ended with %v", exit)
		}
		if took > 6*time.Second {
			r.violate("I6", "a relay took %v to stop", took)
		}
	}
}
