package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// apartVar holds the processors of PostgreSQL, in the environment of a program that has left them.
const apartVar = "OUTBOX_RELAY_BENCH_POSTGRES_CPUS"

// leaveProcessors starts this program anew with one half of the processors that it may use; the other half is for PostgreSQL. It returns where that has been done
// already, or cannot be.
func leaveProcessors() error {
	if os.Getenv(apartVar) != "" {
		return nil
	}
	runtime.LockOSThread() // what a thread may use goes to the program that it becomes, and to what that starts
	defer runtime.UnlockOSThread()
	var all, ours unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("-apart: read processors: %w", err)
	}
	if all.Count() < 2 {
		return errors.New("-apart: there is only one processor")
	}
	var theirs []string
	for cpu := 0; len(theirs) < all.Count()/2; cpu++ {
		if all.IsSet(cpu) {
			theirs = append(theirs, strconv.Itoa(cpu))
		}
	}
	ours = all
	for _, cpu := range theirs {
		n, _ := strconv.Atoi(cpu)
		ours.Clear(n)
	}
	if err := unix.SchedSetaffinity(0, &ours); err != nil {
		return fmt.Errorf("-apart: leave processors: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("-apart: find own binary: %w", err)
	}
	return fmt.Errorf("-apart: start anew: %w", syscall.Exec(self, os.Args, append(os.Environ(), apartVar+"="+strings.Join(theirs, ",")))) //nolint:gosec // this program
}

// moveApart has the server of the stage use only the processors that are left to it, if any are.
func (s *stage) moveApart(ctx context.Context) error {
	list := os.Getenv(apartVar)
	if list == "" {
		return nil
	}
	var theirs unix.CPUSet
	for cpu := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(cpu)
		if err != nil {
			return fmt.Errorf("%s: %w", apartVar, err)
		}
		theirs.Set(n)
	}
	var backend int
	if err := s.pool.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&backend); err != nil {
		return fmt.Errorf("ask for the server's process: %w", err)
	}
	postmaster := parent(strconv.Itoa(backend))
	processes := []string{postmaster}
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	for _, entry := range entries {
		if pid := filepath.Base(entry); parent(pid) == postmaster {
			processes = append(processes, pid)
		}
	}
	for _, pid := range processes {
		n, err := strconv.Atoi(pid)
		if err == nil {
			err = unix.SchedSetaffinity(n, &theirs)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %q of the server: %w", pid, err)
		}
	}
	return nil
}

// parent is the process that has started another one; empty: there is none.
func parent(pid string) string {
	fields := statOf(pid)
	if len(fields) < 2 {
		return ""
	}
	return fields[1]
}
