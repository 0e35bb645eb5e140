package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// benchRelay is the relay as a process of its own, so that what it costs can be told from what writers and receiver do.
type benchRelay struct {
	log   io.Writer
	cmd   *exec.Cmd
	ended chan struct{}
	exit  error // once ended is closed
	peak  int64 // bytes of memory; zero where the system does not tell
	cpu   time.Duration
}

// start runs this executable again.
func (r *benchRelay) start(b *bench) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the executable: %w", err)
	}
	args := []string{"run", "--log-level", "warn"}
	if b.config != "" {
		args = append(args, "--config", b.config)
	}
	r.cmd = exec.Command(self, args...) //nolint:gosec,noctx // ourselves; stop and kill end it, in that order
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, envPrefix+"_DATABASE") && !strings.HasPrefix(v, envPrefix+"_SERVER") && !strings.HasPrefix(v, envPrefix+"_NETWORK") {
			r.cmd.Env = append(r.cmd.Env, v)
		}
	}
	r.cmd.Env = append(r.cmd.Env, envPrefix+"_DATABASE_URL="+b.db.dsn, envPrefix+"_DATABASE_SLOT="+b.db.slot,
		envPrefix+"_NETWORK_ALLOW=127.0.0.0/8", envPrefix+"_SERVER_LISTEN=127.0.0.1:0",
		envPrefix+"_VERIFICATION_METHOD=none") // the receiver takes each request for a delivery
	if b.receiver.caFile != "" {
		r.cmd.Env = append(r.cmd.Env, envPrefix+"_DELIVERY_TLS_CA_FILE="+b.receiver.caFile)
	}
	r.cmd.Stdout, r.cmd.Stderr = r.log, r.log
	if err := r.cmd.Start(); err != nil {
		return fmt.Errorf("start the relay: %w", err)
	}
	r.ended = make(chan struct{})
	go func() {
		defer close(r.ended)
		r.exit = r.cmd.Wait()
	}()
	return nil
}

// stop has the relay record what it knows, and notes what it has used.
func (r *benchRelay) stop(ctx context.Context) error {
	r.peak = peakMemory(r.cmd.Process.Pid)
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop the relay: %w", err)
	}
	select {
	case <-r.ended:
		r.cpu = r.cmd.ProcessState.UserTime() + r.cmd.ProcessState.SystemTime()
		if r.exit != nil {
			return fmt.Errorf("stop the relay: %w", r.exit)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// kill ends a relay that has not been stopped.
func (r *benchRelay) kill() error {
	if r.ended == nil || isClosed(r.ended) {
		return nil
	}
	if err := r.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill the relay: %w", err)
	}
	<-r.ended
	return nil
}

// peakMemory is the greatest resident size of a process so far. What the kernel reports of a process that has ended is no use: it counts what its
// parent occupied when it was started.
func peakMemory(pid int) int64 {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			kib, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 10, 64)
			return kib << 10
		}
	}
	return 0
}

// awaitStream waits until somebody reads the slot.
func (s *throwaway) awaitStream(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, benchPatience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var active bool
		err := s.pool.QueryRow(ctx, "SELECT coalesce(bool_or(active), false) FROM pg_replication_slots WHERE slot_name = $1", s.slot).Scan(&active)
		if err != nil {
			return fmt.Errorf("wait for the relay: %w", err)
		}
		if active {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the relay: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

// benchCounters are what the server has counted so far.
type benchCounters struct {
	wal    int64 // bytes
	writes int64 // rows inserted, updated or deleted
}

// counters waits until the server's own counts are complete: its sessions report theirs at the end, or now and then.
func (b *bench) counters(ctx context.Context) (benchCounters, error) {
	b.db.pool.Reset()
	var c benchCounters
	tick := time.NewTicker(600 * time.Millisecond) // PostgreSQL 14 writes its statistics every half second
	defer tick.Stop()
	for last := int64(-1); ; last = c.writes {
		err := b.db.pool.QueryRow(ctx, `SELECT (pg_current_wal_insert_lsn() - '0/0')::int8, (SELECT coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::int8
			FROM pg_stat_user_tables)`).Scan(&c.wal, &c.writes)
		if err != nil {
			return c, fmt.Errorf("read the server's statistics: %w", err)
		}
		if c.writes == last {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return c, ctx.Err()
		case <-tick.C:
		}
	}
}
