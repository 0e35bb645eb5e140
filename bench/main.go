// Command bench measures outbox-relay side by side with what limits it and with what could be used in its place, in one interleaved run.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"syscall"
	"time"
)

func main() {
	if role := os.Getenv(roleVar); role != "" {
		os.Exit(runChild(role))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const about = `Usage, in the folder bench: go run . [flags]
                            go run . cost -h      what the relay costs the application
                            go run . growth -h    what a delivery costs as one thing grows

Measures outbox-relay side by side with its limits and its alternatives, in one interleaved run, and
prints tables in Markdown. The ratios are the result; the rates depend on the machine. Each run of a
contender has a new PostgreSQL with fsync on, and a receiver, a process of its own, which counts.

drain   Events are committed, then the contender starts. Its rate is that between the first and the
        last receipt. In each round every contender runs once, in rotating order.
steady  Events are committed at a rate from 4 connections, or more above 1,000 a second. The latency
        is the time from the return of COMMIT to the receipt. It can be less than zero, as others see a
        commit before its client does. A rate below the one asked for says that the contender's way of
        inserting slows the writers. The rounds are like those of the drain, and each number is the
        median of theirs.

A contender that has not delivered every event, or has not recorded every outcome of a drain, is an
error. The CPU time is that of the contender's process, without the database and the receiver.

Contenders:
`

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	switch {
	case len(args) > 0 && args[0] == "growth":
		return runGrowth(ctx, args[1:], stdout, stderr)
	case len(args) > 0 && args[0] == "cost":
		return runCost(ctx, args[1:], stdout, stderr)
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o options
	flags.IntVar(&o.events, "events", 50_000, "`number` of events of a drain")
	flags.IntVar(&o.rounds, "rounds", 5, "`number` of rounds of the drain, 0 for none")
	flags.Float64Var(&o.rate, "rate", 1000, "`events` a second of the steady load")
	flags.IntVar(&o.each, "each", 1, "`number` of events in a transaction")
	flags.DurationVar(&o.steady, "steady", 10*time.Second, "`time` of a steady load, 0s for none")
	flags.IntVar(&o.steadyRounds, "steady-rounds", 3, "`number` of rounds of the steady load")
	apart := flags.Bool("apart", false, "keep half of the processors for PostgreSQL, as on a machine of its own (Linux)")
	only := flags.String("only", "", "`regexp` of the contenders to run, all if empty")
	file := flags.String("json", "", "`file` for the raw numbers")
	flags.Usage = func() {
		_, _ = io.WriteString(stderr, about)
		for _, c := range candidates() {
			fmt.Fprintf(stderr, "  %-8s %s\n", c.name, c.about)
		}
		_, _ = io.WriteString(stderr, "\nFlags:\n")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if o.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if err := o.validate(); err != nil {
		return err
	}
	if *apart {
		if err := leaveProcessors(); err != nil {
			return err
		}
	}
	r, err := runSuite(ctx, o, stderr)
	err = errors.Join(err, report(stdout, r))
	if *file != "" {
		err = errors.Join(err, writeJSON(*file, r))
	}
	return err
}

func (o *options) validate() error {
	var faults []error
	if o.events < 2 {
		faults = append(faults, fmt.Errorf("-events %d: at least 2, or there is no time between the first and the last", o.events))
	}
	if o.rounds < 0 {
		faults = append(faults, fmt.Errorf("-rounds %d: 0 or more", o.rounds))
	}
	if o.rate <= 0 {
		faults = append(faults, fmt.Errorf("-rate %g: more than 0", o.rate))
	}
	if o.each < 1 {
		faults = append(faults, fmt.Errorf("-each %d: 1 or more", o.each))
	}
	if o.steadyRounds < 0 {
		faults = append(faults, fmt.Errorf("-steady-rounds %d: 0 or more", o.steadyRounds))
	}
	if o.steady < 0 {
		faults = append(faults, fmt.Errorf("-steady %s: 0s or more", o.steady))
	}
	return errors.Join(faults...)
}

func writeJSON(file string, r any) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode raw numbers: %w", err)
	}
	if err := os.WriteFile(file, append(text, '\n'), 0o644); err != nil { //nolint:gosec // for everybody to read
		return fmt.Errorf("write raw numbers: %w", err)
	}
	return nil
}
