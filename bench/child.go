package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
)

// The environment tells a child its role and what it needs for it. Flags would collide with those of a test binary.
const (
	roleVar   = "OUTBOX_RELAY_BENCH_ROLE"
	dsnVar    = "OUTBOX_RELAY_BENCH_DSN"
	urlVar    = "OUTBOX_RELAY_BENCH_URL"
	eventsVar = "OUTBOX_RELAY_BENCH_EVENTS"

	roleReceiver = "receiver"
	rolePost     = "post"
	rolePoller   = "poller"
	roleRiver    = "river"
)

// runChild plays a role until the standard input ends, and returns the exit code.
func runChild(role string) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() { // lives as long as the process: there is nothing to wait for
		_, _ = io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	if err := play(ctx, role); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func play(ctx context.Context, role string) error {
	dsn, url := os.Getenv(dsnVar), os.Getenv(urlVar)
	switch role {
	case roleReceiver:
		return serveReceiver(ctx, os.Stdout)
	case rolePost:
		n, err := strconv.Atoi(os.Getenv(eventsVar))
		if err != nil {
			return fmt.Errorf("%s: %w", eventsVar, err)
		}
		return postLoop(ctx, url, n)
	case rolePoller:
		return poll(ctx, dsn, url)
	case roleRiver:
		return workRiver(ctx, dsn, url)
	default:
		return fmt.Errorf("%s=%s: no such role", roleVar, role)
	}
}
