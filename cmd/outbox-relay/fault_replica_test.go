package main

import (
	"strings"
	"syscall"
	"time"

	"github.com/stretchr/testify/require"
)

// replicaFaults are the scenarios of two relays, and of everything at once.
func replicaFaults() []*scenario {
	return []*scenario{
		{name: "leader-killed", row: "two relays, the leader killed", quick: true, run: leaderKilled},
		{name: "leader-stopped", row: "two relays, SIGSTOP the leader, then CONT", server: map[string]string{"wal_sender_timeout": "2s"}, run: leaderStopped},
		{name: "medley", row: "composed at random", heals: true, run: medley},
	}
}

// standby starts a relay beside the leader.
func (r *faultRun) standby() *relayProcess {
	p := r.start()
	r.await("a relay to stand by", func() bool { return strings.Contains(p.said(r.t), "standing by") })
	return p
}

// leaderKilled kills the leader beside a relay that stands by, twice.
func leaderKilled(r *faultRun) {
	leader := r.lead()
	for range 1 + r.rnd.IntN(2) {
		next := r.standby()
		r.more(20 + r.rnd.IntN(100))
		require.NoError(r.t, leader.cmd.Process.Signal(syscall.SIGSTOP)) // it records nothing more while we look
		end := r.interrupting()
		_ = leader.cmd.Process.Kill()
		<-leader.done
		r.over()
		r.leads(next)
		end()
		r.recovery(&r.result.takeovers, 2*time.Second)
		leader = next
	}
	r.more(20)
}

// leaderStopped stops the leader until another relay leads, and lets it go on then.
func leaderStopped(r *faultRun) {
	leader := r.lead()
	next := r.standby()
	r.slack += held // what the old leader had not sent yet, and sends before it learns of the new one
	r.more(20 + r.rnd.IntN(100))
	require.NoError(r.t, leader.cmd.Process.Signal(syscall.SIGSTOP))
	end := r.interrupting()
	r.over()
	r.leads(next)
	r.recovery(&r.result.takeovers, 4*time.Second)
	r.more(r.rnd.IntN(100))
	require.NoError(r.t, leader.cmd.Process.Signal(syscall.SIGCONT))
	end()
	r.await("the old leader to notice", func() bool { return strings.Contains(leader.said(r.t), "standing by") })
	r.recover(10 * time.Second)
	r.more(20)
	var epoch int64
	require.NoError(r.t, r.pool.QueryRow(r.ctx, `SELECT epoch FROM outbox_relay.progress WHERE slot = $1`, r.slot).Scan(&epoch))
	if epoch != 2 {
		r.violate("fence", "the epoch is %d after one takeover", epoch)
	}
}

// medley does what comes to the seed's mind, to one or two relays.
func medley(r *faultRun) {
	r.calm(unsteady(r.rnd.IntN(2)*20, time.Duration(1+r.rnd.IntN(10))*time.Millisecond))
	r.slack += held // two relays whose interruptions overlap
	relays := []*relayProcess{r.lead()}
	if r.rnd.IntN(2) == 0 {
		relays = append(relays, r.start())
	}
	kill := func() {
		i := r.rnd.IntN(len(relays))
		_ = relays[i].cmd.Process.Kill()
		<-relays[i].done
		relays[i] = r.start()
	}
	pause := func() {
		p := relays[r.rnd.IntN(len(relays))]
		_ = p.cmd.Process.Signal(syscall.SIGSTOP)
		r.outage()
		_ = p.cmd.Process.Signal(syscall.SIGCONT)
	}
	things := []func(){kill, kill, pause, r.dropSlot, r.terminateWalsender, func() { r.insist("DROP PUBLICATION outbox_relay_events") }}
	for range 2 + r.rnd.IntN(3) {
		r.more(10 + r.rnd.IntN(60))
		end := r.interrupting()
		things[r.rnd.IntN(len(things))]()
		if r.rnd.IntN(3) > 0 {
			r.over()
			r.recovery(&r.result.recoveries, 20*time.Second)
		}
		end()
	}
	r.recover(20 * time.Second)
	r.await("the slot to be sound", r.backfilled)
	r.more(20)
}
