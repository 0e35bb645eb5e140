package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// diskFaults are the scenarios in which the server's disk has no room left.
func diskFaults() []*scenario {
	room := map[string]string{"min_wal_size": "32MB", "max_wal_size": "64MB"}
	return []*scenario{
		{name: "disk-full", row: "disk of the server full", server: room, disk: 192, run: diskFull},
	}
}

// smallDisk is a file system in memory, which can be filled without harm to anybody else.
type smallDisk struct{ dir, data string }

// mountDisk makes one of so many MiB. It is gone after the test, but not after one that was killed.
func mountDisk(t *testing.T, size int) *smallDisk {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "outbox-relay-disk-") // not the test's own folder, which the server's user cannot reach
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.Remove(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	out, err := exec.CommandContext(t.Context(), "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%dm,mode=755", size), "outbox-relay-test", dir).CombinedOutput()
	require.NoError(t, err, "a scenario that fills the disk of its server needs one of its own: run it on Linux as a user who may mount a tmpfs\n%s", out)
	t.Cleanup(func() {
		out, err := exec.CommandContext(context.WithoutCancel(t.Context()), "umount", dir).CombinedOutput()
		require.NoError(t, err, string(out))
	})
	d := &smallDisk{dir: dir, data: filepath.Join(dir, "data")}
	require.NoError(t, os.Mkdir(d.data, 0o700))
	return d
}

func (d *smallDisk) filler() string { return filepath.Join(d.dir, "filler") }

// fill leaves no room for a single page.
func (d *smallDisk) fill() (err error) {
	f, err := os.Create(d.filler())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for block := make([]byte, 1<<20); ; {
		_, err := f.Write(block)
		switch {
		case err == nil:
		case !errors.Is(err, syscall.ENOSPC):
			return err
		case len(block) <= 4<<10:
			return nil
		default:
			block = block[:len(block)/2]
		}
	}
}

// free gives the room back.
func (d *smallDisk) free() error { return os.Remove(d.filler()) }

// diskFull leaves no room for what applications and relay write, and in every other run none for the log either, which ends the server.
func diskFull(r *faultRun) {
	r.lead()
	for range 1 + r.rnd.IntN(2) {
		r.more(20 + r.rnd.IntN(100))
		end := r.interrupting()
		r.fillDisk()
		if r.rnd.IntN(2) == 0 {
			r.fillLog()
		}
		r.outage()
		if r.rnd.IntN(3) == 0 { // leases run out, while what was claimed under them cannot be recorded
			select {
			case <-time.After(4 * time.Second):
			case <-r.ctx.Done():
			}
		}
		if err := r.disk.free(); err != nil {
			r.violate("harness", "free the disk: %v", err)
		}
		r.revive()
		end()
		r.recover(15 * time.Second)
	}
	r.more(20)
	if n := len(r.alive()); n != len(r.relays) {
		r.violate("exit", "%d of %d relays have not come through", len(r.relays)-n, len(r.relays))
	}
}

// fillDisk fills it while deliveries are under way, so that the relay has something to record that finds no room.
func (r *faultRun) fillDisk() {
	answer := r.withhold()
	defer answer()
	enough := r.front.requests() + 20
	r.await("deliveries that wait for an answer", func() bool { return r.front.requests() >= enough })
	met := r.saidOf("SQLSTATE 53100")
	if err := r.disk.fill(); err != nil {
		r.violate("harness", "fill the disk: %v", err)
	}
	answer()
	r.await("a relay that cannot record", func() bool { return r.saidOf("SQLSTATE 53100") > met })
}

// withhold keeps receivers from answering until a second call, which has to come before the relay's patience is over.
func (r *faultRun) withhold() (answer func()) {
	gate := make(chan struct{})
	r.front.mu.Lock()
	r.front.arrived = func(int) { <-gate }
	r.front.mu.Unlock()
	return sync.OnceFunc(func() {
		close(gate)
		r.front.mu.Lock()
		r.front.arrived = func(int) {}
		r.front.mu.Unlock()
	})
}

// saidOf counts how often relays have logged a text.
func (r *faultRun) saidOf(text string) (n int) {
	r.mu.Lock()
	relays := r.relays
	r.mu.Unlock()
	for _, p := range relays {
		n += strings.Count(p.said(r.t), text)
	}
	return n
}

// fillLog has the server ask for the next segment of its log, which it cannot do without.
func (r *faultRun) fillLog() {
	r.await("the end of the log", func() bool {
		_, err := r.pool.Exec(r.ctx, "SELECT pg_switch_wal(), pg_logical_emit_message(true, 'e2e', '')")
		return err != nil
	})
}

// revive waits until the server answers, and starts it again if it has given up.
func (r *faultRun) revive() {
	r.await("a server that answers", func() bool {
		if errors.Is(syscall.Kill(r.server.PID(), 0), syscall.ESRCH) {
			if err := r.server.Restart(r.ctx); err != nil {
				r.violate("harness", "the server does not start again: %v", err)
			}
		}
		return r.pool.Ping(r.ctx) == nil
	})
	r.pool.Reset()
	r.site.pool.Reset()
}
