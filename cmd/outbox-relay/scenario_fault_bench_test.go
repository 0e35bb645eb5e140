package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkScenarioHeal: 100,000 events are committed after the slot was dropped, then a relay starts: how long until the last of them has arrived, while
// new events of the same tenant are committed at 200 a second, and how late those are meanwhile.
func BenchmarkScenarioHeal(b *testing.B) {
	const missed, rate = 100_000, 200
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
		c := newCrowd(b, 1, 2)
		s := newScene(b, "", "acme")
		s.join(b, "acme", []string{c.url(1, 0, "ok"), c.url(1, 1, "ok")}, own, "")
		first := startRelay(b, s.config)
		require.NoError(b, s.burst(ctx, "acme", 1, 1, []string{own(0)}))
		c.await(ctx, b, 1)
		_, exit := first.stop(b)
		require.NoError(b, exit)
		s.exec(b, "SELECT pg_drop_replication_slot($1)", s.slot)
		require.NoError(b, s.burst(ctx, "acme", missed, 500, []string{own(0)}))

		run, stop := context.WithCancel(ctx)
		c.arrivals(true)
		var committed map[string]time.Time
		var wg sync.WaitGroup
		wg.Go(func() { committed = s.pace(run, b, "acme", rate, []string{own(1)}) })
		began := time.Now()
		p := startRelay(b, s.config)
		s.awaitLeader(ctx, b)
		leading := time.Now()
		for c.accepted[0].Load() <= missed {
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
				require.FailNow(b, "gave up waiting", "%d of %d have arrived", c.accepted[0].Load(), missed)
			}
		}
		took := time.Since(began)
		stop()
		wg.Wait()
		c.awaitQuiet(ctx, b, 1+missed+int64(len(committed)))
		for waiting := 1; waiting > 0; {
			require.NoError(b, s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&waiting))
		}
		_, exit = p.stop(b)
		require.NoError(b, exit)
		arrived := c.arrivals(false)
		for id, at := range committed { // what was committed before there was a slot is not live
			if at.Before(leading) {
				delete(committed, id)
			}
		}
		list, missing := delays(committed, arrived)
		require.Zero(b, missing)
		var outcomes int64
		require.NoError(b, s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_deliveries WHERE relayed AND delivery_status = 'success'`).Scan(&outcomes))
		require.Equal(b, c.total.Load(), outcomes, "outcomes and requests")
		require.Len(b, arrived, int(outcomes)-1, "all but the first")
		cancel()
		b.ReportMetric(took.Seconds(), "healed-s")
		b.ReportMetric(missed/took.Seconds(), "missed/s")
		b.ReportMetric(float64(len(list)), "live")
		b.ReportMetric(quantile(list, .5), "live-p50-ms")
		b.ReportMetric(quantile(list, .99), "live-p99-ms")
		b.ReportMetric(float64(p.peakOrZero()), "peak-MB")
	}
}

// peakOrZero is the peak memory of a process that has ended, in MB.
func (p *relayProcess) peakOrZero() int64 {
	if usage, ok := p.cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		return usage.Maxrss >> 10 // Linux counts KiB
	}
	return 0
}

// BenchmarkScenarioTakeover: two relays, and the leader is killed, or frozen until the server's wal_sender_timeout of 5 s: how long until an event arrives
// that was committed just after. A frozen one is woken afterwards and must not record anything.
func BenchmarkScenarioTakeover(b *testing.B) {
	const kills, freezes, senderTimeout = 10, 3, 5 * time.Second
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), 10*time.Minute)
		c := newCrowd(b, 1, 1)
		s := newScene(b, "", "acme")
		s.join(b, "acme", []string{c.url(1, 0, "ok")}, own, "")
		s.exec(b, fmt.Sprintf("ALTER SYSTEM SET wal_sender_timeout = '%dms'", senderTimeout.Milliseconds()))
		s.exec(b, "SELECT pg_reload_conf()")
		leader, standby := startRelay(b, s.config), (*relayProcess)(nil)
		s.awaitLeader(ctx, b)
		insert := func() (took time.Duration) {
			n, began := c.total.Load(), time.Now()
			require.NoError(b, s.burst(ctx, "acme", 1, 1, []string{own(0)}))
			c.await(ctx, b, n+1)
			took = time.Since(began)
			for recorded := int64(0); recorded <= n; { // what is not would be sent again after a kill, as it should
				require.NoError(b, s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_deliveries WHERE delivery_status = 'success'`).Scan(&recorded))
			}
			return took
		}
		insert()
		var killed, frozen []time.Duration
		for range kills {
			standby = startRelay(b, s.config)
			for !strings.Contains(standby.said(b), "standing by") {
				require.NoError(b, ctx.Err())
			}
			leader.kill(b)
			killed = append(killed, insert())
			leader = standby
		}
		for range freezes {
			standby = startRelay(b, s.config)
			for !strings.Contains(standby.said(b), "standing by") {
				require.NoError(b, ctx.Err())
			}
			leader.freeze(b)
			frozen = append(frozen, insert())
			epoch := s.epoch(ctx, b)
			require.NoError(b, leader.cmd.Process.Signal(syscall.SIGCONT))
			for !strings.Contains(leader.said(b), "the stream has ended") {
				require.NoError(b, ctx.Err())
			}
			insert()
			require.Equal(b, epoch, s.epoch(ctx, b), "the old leader began an epoch")
			leader.kill(b)
			leader = standby
		}
		cancel()
		slices.Sort(killed)
		slices.Sort(frozen)
		require.Equal(b, int64(1+kills+2*freezes), c.total.Load(), "each event once")
		b.ReportMetric(quantile(killed, .5), "killed-p50-ms")
		b.ReportMetric(quantile(killed, 1), "killed-max-ms")
		b.ReportMetric(quantile(frozen, .5), "frozen-p50-ms")
		b.ReportMetric(quantile(frozen, 1), "frozen-max-ms")
		b.ReportMetric(float64(senderTimeout.Milliseconds()), "sender-timeout-ms")
	}
}

// freeze stops the process and waits until it has stopped: a signal takes its time, in which an event could pass.
func (p *relayProcess) freeze(b testing.TB) {
	b.Helper()
	require.NoError(b, p.cmd.Process.Signal(syscall.SIGSTOP))
	for state := ""; state != "T"; {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		require.NoError(b, err)
		_, rest, _ := strings.Cut(string(stat), ") ")
		state = rest[:1]
	}
}

func (s *site) epoch(ctx context.Context, b testing.TB) (n int64) {
	b.Helper()
	require.NoError(b, s.pool.QueryRow(ctx, `SELECT epoch FROM outbox_relay.progress WHERE slot = $1`, s.slot).Scan(&n))
	return n
}

// BenchmarkScenarioAudit: 1,000,000 events with their deliveries, OUTBOX_RELAY_BENCH_EVENTS for another number; ten deliveries are removed by hand. How
// long the command takes to find them, to compare every event, and to repair, and what that costs the server in seconds of a processor.
func BenchmarkScenarioAudit(b *testing.B) {
	events, removed := int64(1_000_000), 10
	if n, err := strconv.ParseInt(os.Getenv("OUTBOX_RELAY_BENCH_EVENTS"), 10, 64); err == nil {
		events = n
	}
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), time.Hour)
		c := newCrowd(b, 1, 1)
		s := newScene(b, "", "acme")
		s.join(b, "acme", []string{c.url(1, 0, "ok")}, own, "")
		p := startRelay(b, s.config)
		s.awaitLeader(ctx, b)
		require.NoError(b, s.burst(ctx, "acme", int(events), 1000, []string{own(0)}))
		c.await(ctx, b, events)
		var now string
		require.NoError(b, s.pool.QueryRow(ctx, "SELECT pg_current_snapshot()::text").Scan(&now))
		for saved := false; !saved; {
			require.NoError(b, s.pool.QueryRow(ctx, `SELECT coalesce(pg_snapshot_xmax(snapshot) >= pg_snapshot_xmax($1::pg_snapshot), false)
				FROM outbox_relay.progress WHERE slot = $2`, now, s.slot).Scan(&saved))
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
				require.NoError(b, ctx.Err())
			}
		}
		s.exec(b, `DELETE FROM acme.webhook_deliveries WHERE id IN (SELECT id FROM acme.webhook_deliveries ORDER BY md5(id::text) LIMIT $1)`, removed)
		audit := func(name string, want int, missing int64, args ...string) auditResult {
			cpu, began := s.serverCPU(ctx, b), time.Now()
			out, errors, code := s.desk(b, append([]string{"audit", "-o", "json"}, args...)...)
			require.Equal(b, want, code, errors)
			b.ReportMetric(time.Since(began).Seconds(), name+"-s")
			b.ReportMetric((s.serverCPU(ctx, b) - cpu).Seconds(), name+"-server-cpu-s")
			var r auditResult
			require.NoError(b, json.Unmarshal([]byte(out), &r))
			require.Equal(b, events, r.Tenants[0].Events)
			require.Equal(b, missing, r.Tenants[0].Missing)
			return r
		}
		audit("find", exitFailure, int64(removed))
		audit("thorough", exitFailure, int64(removed), "--thorough")
		r := audit("repair", exitOK, int64(removed), "--repair")
		require.Equal(b, int64(removed), r.Tenants[0].Queued)
		c.await(ctx, b, events+int64(removed))
		for waiting := 1; waiting > 0; {
			require.NoError(b, s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&waiting))
		}
		audit("again", exitOK, 0)
		cancel()
		_, exit := p.stop(b)
		require.NoError(b, exit)
		require.Equal(b, events+int64(removed), c.total.Load(), "exactly those were sent again")
	}
}

// serverCPU is the processor time of all the server's processes so far, those that have ended included.
func (s *site) serverCPU(ctx context.Context, b testing.TB) time.Duration {
	b.Helper()
	var folder string
	require.NoError(b, s.pool.QueryRow(ctx, "SHOW data_directory").Scan(&folder))
	text, err := os.ReadFile(folder + "/postmaster.pid")
	require.NoError(b, err)
	server, _, _ := strings.Cut(string(text), "\n")
	processes, err := os.ReadDir("/proc")
	require.NoError(b, err)
	ticks := 0
	for _, p := range processes {
		stat, err := os.ReadFile("/proc/" + p.Name() + "/stat")
		if err != nil {
			continue // no process, or not any more
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		fields := strings.Fields(rest)
		last := 13
		if p.Name() == server {
			last = 15 // with its children that have ended
		} else if fields[1] != server {
			continue
		}
		for _, f := range fields[11:last] {
			n, err := strconv.Atoi(f)
			require.NoError(b, err)
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}
