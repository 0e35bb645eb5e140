package main

import (
	"context"
	"time"

	"github.com/stretchr/testify/require"
)

// serverFaults are the scenarios in which the server goes, or does not answer as it should.
func serverFaults() []*scenario {
	return []*scenario{
		{name: "server-fast", row: "server stopped", server: map[string]string{}, run: serverStops("fast")},
		{name: "server-immediate", row: "server stopped", server: map[string]string{}, quick: true, run: serverStops("immediate")},
		{name: "server-killed", row: "server stopped", server: map[string]string{}, run: serverStops("kill")},
		{name: "walsender-terminated", row: "walsender terminated", run: walsenderTerminated},
		{name: "standby-missing", row: "sync-replication stall", server: map[string]string{}, run: standbyMissing},
		{name: "table-locked", row: "a table locked", run: tableLocked},
	}
}

// serverStops stops the server, or kills its postmaster, under load, and starts it again.
func serverStops(mode string) func(*faultRun) {
	return func(r *faultRun) {
		r.lead()
		for range 1 + r.rnd.IntN(2) {
			r.more(20 + r.rnd.IntN(100))
			end := r.interrupting()
			r.stopServer(mode)
			r.outage()
			if err := r.server.Restart(r.ctx); err != nil {
				r.violate("harness", "the server does not start again: %v", err)
				return
			}
			end()
			r.pool.Reset()
			r.site.pool.Reset()
			r.recover(15 * time.Second)
		}
		r.more(20)
	}
}

// outage lasts for some requests that the relay still makes, or for a moment if it makes none.
func (r *faultRun) outage() {
	wait := time.NewTimer(time.Duration(r.rnd.IntN(500)) * time.Millisecond)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-r.ctx.Done():
	}
}

func (r *faultRun) stopServer(mode string) {
	began := time.Now()
	if mode == "kill" {
		if err := r.server.Kill(r.ctx); err != nil {
			r.violate("harness", "kill the server: %v", err)
		}
		return
	}
	patience, cancel := context.WithTimeout(r.ctx, 6*time.Second)
	defer cancel()
	err := r.server.Stop(patience, mode)
	if took := time.Since(began); err != nil || mode == "fast" && took > 2*time.Second {
		r.violate("I6", "the server took %v to stop in mode %s: %v", took.Round(time.Millisecond), mode, err)
		for _, p := range r.alive() { // then it can
			_ = p.cmd.Process.Kill()
		}
		if err := r.server.Stop(r.ctx, "immediate"); err != nil {
			r.violate("harness", "stop the server at last: %v", err)
		}
		panic(abortRun{})
	}
}

// walsenderTerminated ends the server's side of the stream while everything else goes on.
func walsenderTerminated(r *faultRun) {
	r.lead()
	for range 1 + r.rnd.IntN(2) {
		r.more(20 + r.rnd.IntN(100))
		r.interrupted()
		r.terminateWalsender()
		r.recover(10 * time.Second)
	}
	r.more(20)
}

func (r *faultRun) terminateWalsender() {
	r.await("a walsender to end", func() bool {
		var n int
		err := r.pool.QueryRow(r.ctx, `SELECT count(pg_terminate_backend(active_pid)) FROM pg_replication_slots WHERE slot_name = $1 AND active`, r.slot).Scan(&n)
		return err == nil && n > 0
	})
}

// standbyMissing has every commit wait for a standby that is not there: the log carries events before anybody sees them, and outcomes cannot be recorded.
func standbyMissing(r *faultRun) {
	r.lead()
	for range 1 + r.rnd.IntN(2) {
		r.more(20 + r.rnd.IntN(100))
		end := r.interrupting()
		r.reload("ALTER SYSTEM SET synchronous_standby_names = 'nosuch'")
		began := r.front.requests()
		patience := time.Now().Add(time.Second)
		r.await("what the log carries meanwhile", func() bool { return r.front.requests() > began+20 || time.Now().After(patience) })
		if r.rnd.IntN(2) == 0 {
			for _, p := range r.alive() {
				_ = p.cmd.Process.Kill()
				<-p.done
			}
			r.await("the end of its connections", func() bool { return r.front.connections() == 0 })
			r.start()
		}
		r.reload("ALTER SYSTEM RESET synchronous_standby_names")
		end()
		r.recover(10 * time.Second)
	}
	r.more(20)
}

// reload changes a setting of the run's own server. The statement writes no log, so that nothing keeps it.
func (r *faultRun) reload(sql string) {
	_, err := r.pool.Exec(r.ctx, sql)
	if err == nil {
		_, err = r.pool.Exec(r.ctx, "SELECT pg_reload_conf()")
	}
	if err != nil {
		r.violate("harness", "%s: %v", sql, err)
	}
}

// tableLocked keeps outcomes from being written for a while, as a migration would, and kills the relay meanwhile or not.
func tableLocked(r *faultRun) {
	p := r.lead()
	for range 1 + r.rnd.IntN(2) {
		r.more(20 + r.rnd.IntN(100))
		end := r.interrupting()
		p = r.locked(p)
		end()
		r.recover(10 * time.Second)
	}
	r.more(20)
}

func (r *faultRun) locked(p *relayProcess) *relayProcess {
	tx, err := r.pool.Begin(r.ctx)
	require.NoError(r.t, err)
	defer func() { _ = tx.Rollback(context.WithoutCancel(r.ctx)) }()
	_, err = tx.Exec(r.ctx, "LOCK TABLE "+r.tenants[r.rnd.IntN(2)]+".webhook_deliveries IN EXCLUSIVE MODE") // which lets the sampler read
	require.NoError(r.t, err)
	began := r.front.requests()
	patience := time.Now().Add(time.Second)
	r.await("deliveries that cannot be recorded", func() bool { return r.front.requests() > began+100 || time.Now().After(patience) })
	if r.rnd.IntN(2) == 0 {
		return p
	}
	_ = p.cmd.Process.Kill()
	<-p.done
	r.await("the end of its connections", func() bool { return r.front.connections() == 0 })
	return r.start()
}
