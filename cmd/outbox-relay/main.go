// Command outbox-relay delivers the events of a database's outbox tables as webhooks.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	ctx, cancel := context.WithCancel(context.Background())
	abort := make(chan struct{})
	go func() { // lives as long as the process: there is nothing to wait for
		<-signals
		cancel()
		<-signals
		close(abort)
	}()
	a := app{in: os.Stdin, out: os.Stdout, err: os.Stderr, abort: abort}
	os.Exit(a.execute(ctx, os.Args[1:]))
}
