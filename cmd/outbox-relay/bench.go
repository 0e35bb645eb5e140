package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

const (
	benchWriters  = 4
	benchPatience = 30 * time.Second // without any progress
)

// benchOptions are the flags of the command.
type benchOptions struct {
	events             int
	rate               float64 // events per second; zero: a backlog is drained
	tenants, endpoints int     // endpoints in each tenant
	size               int     // of event_data, in bytes, about
	answer             time.Duration
	tls                bool
	dsn, output        string
}

func (o *benchOptions) deliveries() int { return o.events * o.endpoints }

func (o *benchOptions) check() error {
	switch {
	case o.events < 2:
		return usage("--events %d: must be at least 2", o.events)
	case o.rate < 0 || math.IsNaN(o.rate) || math.IsInf(o.rate, 0):
		return usage("--rate %v: must be 0 or more", o.rate)
	case o.tenants < 1 || o.endpoints < 1:
		return usage("--tenants %d --endpoints %d: must be at least 1 each", o.tenants, o.endpoints)
	case o.size < 0 || o.size > 10<<20:
		return usage("--size %d: must be 0 to 10485760 bytes", o.size)
	case o.answer < 0:
		return usage("--answer %v: must be 0 or more", o.answer)
	default:
		return nil
	}
}

func (a *app) benchCommand() *cobra.Command {
	o := benchOptions{output: "table"}
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure the relay on this machine",
		Long: `Measure the relay, a process of its own, between a PostgreSQL and a receiver that this command starts.

Without --rate a backlog is drained: events are committed first, one per transaction, and the rate is
that of the deliveries between the first and the last. With --rate they are committed while the relay
works, and what is measured is the time from the return of COMMIT to the request at the receiver.

The receiver is as many hosts as there are endpoints, at most 16: ports of its own, each of which has
delivery.host_concurrency and max_connections_per_host to itself.

CPU and memory are those of the relay alone. Writes are the rows that were inserted, updated or
deleted beside the application's own. All of it is counted to the end: every delivery has to be
received and recorded, or the command fails.

PostgreSQL is a throw-away server with fsync on, or with --dsn a database of its own on a server of
yours, which is dropped at the end. On one machine receiver, writers and PostgreSQL share the cores
with the relay: compare runs with each other rather than with the figures of other machines.

The relay's configuration comes from --config and the environment as usual, apart from the keys under
database, server and network, and verification.method, which this command sets, and with --tls
delivery.tls.ca_file.`,
		Example: `  outbox-relay bench
  outbox-relay bench --rate 1000 --events 30000
  outbox-relay bench --answer 100ms --tenants 10 --endpoints 10 --events 5000
  outbox-relay bench --tls
  OUTBOX_RELAY_RECORD_BATCH=4000 outbox-relay bench -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("database-url") {
				return usage("--database-url: name the server with --dsn; a database of its own is made there")
			}
			if err := o.check(); err != nil {
				return err
			}
			return a.bench(cmd.Context(), o)
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&o.events, "events", 50_000, "commit this many events, `N`, in all")
	flags.Float64Var(&o.rate, "rate", 0, "commit `R` events per second; 0: all before the relay starts")
	flags.IntVar(&o.tenants, "tenants", 1, "spread them over `N` tenants")
	flags.IntVar(&o.endpoints, "endpoints", 1, "send each to `N` endpoints of its tenant")
	flags.IntVar(&o.size, "size", 300, "write event_data of about `BYTES`")
	flags.DurationVar(&o.answer, "answer", 0, "have the receiver answer after `TIME`, such as 100ms")
	flags.BoolVar(&o.tls, "tls", false, "have the receiver speak TLS")
	flags.StringVar(&o.dsn, "dsn", "", "use the server of this `DSN`, in a database of its own that is dropped at the end")
	flags.VarP(oneOf(&o.output, "FORM", "table", "json"), "output", "o", "`FORM` of the result: table or json")
	return cmd
}

// bench is one measurement.
type bench struct {
	benchOptions
	config   string // file
	db       *throwaway
	receiver *benchReceiver
	view     *demoView
	relay    *benchRelay
	commits  benchCommits
}

func (a *app) bench(ctx context.Context, o benchOptions) (err error) {
	view := newDemoView(a.err)
	db, err := openThrowaway(ctx, o.dsn, "bench", benchWriters+1, a.err)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.close(ctx)) }()
	view.step("%s", db.about)
	b := &bench{benchOptions: o, config: a.file(), db: db, view: view, relay: &benchRelay{log: a.err}}
	if b.receiver, err = newBenchReceiver(ctx, o); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.receiver.close()) }()
	defer func() { err = errors.Join(err, b.relay.kill()) }() // while the receiver is still there
	report, err := b.run(ctx)
	switch {
	case ctx.Err() != nil:
		return errInterrupted
	case err != nil:
		return err
	}
	return a.print(&inquiry{output: o.output}, report, report.table)
}

// run does it all in turn. A backlog is there before the relay is; otherwise the relay is there first.
func (b *bench) run(ctx context.Context) (*benchReport, error) {
	if err := b.install(ctx); err != nil {
		return nil, err
	}
	if b.rate == 0 {
		b.view.step("committing %s events of %d bytes", thousands(b.events), b.size)
		if err := b.write(ctx); err != nil {
			return nil, err
		}
	}
	before, err := b.counters(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.relay.start(b); err != nil {
		return nil, err
	}
	b.view.step("%s deliveries are to be made", thousands(b.deliveries()))
	if err := b.deliver(ctx); err != nil {
		return nil, err
	}
	if err := b.relay.stop(ctx); err != nil {
		return nil, err
	}
	after, err := b.counters(ctx)
	if err != nil {
		return nil, err
	}
	if err := b.verify(ctx); err != nil {
		return nil, err
	}
	return b.report(before, after), nil
}

// deliver waits until all has been received, and writes meanwhile what is to be written.
func (b *bench) deliver(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	if b.rate > 0 {
		if err := b.db.awaitStream(ctx); err != nil {
			return err
		}
		group.Go(func() error { return b.write(ctx) })
	}
	group.Go(func() error { return b.watch(ctx) })
	return group.Wait()
}

// watch tells how it goes until all has been received, or nothing moves any more.
func (b *bench) watch(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	last, moved := 0, time.Now()
	for began := time.Now(); ; {
		select {
		case <-b.receiver.complete:
			return nil
		case <-b.relay.ended:
			return fmt.Errorf("the relay ended before the last delivery: %w", b.relay.exit)
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		n := int(b.receiver.count.Load())
		b.view.step("%3.0fs  %s of %s received, %s/s", time.Since(began).Seconds(), thousands(n), thousands(b.deliveries()), thousands(n-last))
		if n > last || b.rate > 0 && b.commits.n() < b.events {
			last, moved = n, time.Now()
		}
		if time.Since(moved) > benchPatience {
			return fmt.Errorf("nothing has been received for %v: %s of %s deliveries were", benchPatience, thousands(n), thousands(b.deliveries()))
		}
	}
}
