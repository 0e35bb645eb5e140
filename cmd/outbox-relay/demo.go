package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/relay"
)

const (
	demoEvents = 20_000
	demoRate   = 1_000 // events per second: half a load on two cores, so that the latency is not that of a queue
	demoFrame  = 200 * time.Millisecond
	// demoPatience is how long the demo waits without any progress, for the relay to start and for the last deliveries.
	demoPatience = 30 * time.Second
)

// demoOptions are the flags of the command.
type demoOptions struct {
	events int
	rate   float64 // events per second; zero: as fast as they go
	seed   uint64
	dsn    string // of an existing server; empty: a throw-away one
}

func (a *app) demoCommand() *cobra.Command {
	var o demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "See it work: a throw-away PostgreSQL, an application, three receivers",
		Long: `Start a throw-away PostgreSQL with three tenants, a relay, three receivers and an application that
inserts events; then count.

The receivers verify every signature. One is healthy; one is flaky: a fifth of its answers is a 500,
503 or 429, or a dropped connection; one is dead and answers 500 to everything, so that its
deliveries end as dead letters. The application also rolls back transactions and savepoints.

The demo ends by itself when every committed event has reached the endpoints that subscribe to it, or
is a dead letter there. It fails if anything was lost, was sent though it had been rolled back, came
with a bad signature or is not recorded. Nothing is left behind, also when it is interrupted. A
command that it prints shows in a second terminal, while it runs, what an operator would see.

--log-level shows the relay's log.`,
		Example: `  outbox-relay demo
  outbox-relay demo --events 100000 --rate 0
  outbox-relay demo --dsn postgres://postgres@localhost:5432/postgres   # in a database of its own there`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, name := range []string{"config", "database-url"} {
				if cmd.Flags().Changed(name) {
					return usage("--%s: the demo has a configuration of its own; name an existing server with --dsn", name)
				}
			}
			if o.events < 1 || o.rate < 0 || math.IsNaN(o.rate) || math.IsInf(o.rate, 0) {
				return usage("--events %d --rate %v: write at least 1 event, and a rate that is 0 or more", o.events, o.rate)
			}
			log, err := a.demoLog(cmd)
			if err != nil {
				return err
			}
			return a.demo(cmd.Context(), o, log)
		},
	}
	flags := cmd.Flags()
	flags.IntVar(&o.events, "events", demoEvents, "insert this many events, `N`, those that are rolled back included")
	flags.Float64Var(&o.rate, "rate", demoRate, "insert `R` events per second; 0: as fast as they go")
	flags.Uint64Var(&o.seed, "seed", 1, "choose events, rollbacks and the moods of the flaky receiver by this `NUMBER`")
	flags.StringVar(&o.dsn, "dsn", "", "use the server of this `DSN`, in a database of its own that is dropped at the end")
	return cmd
}

// demoLog shows the relay's log to those who ask for it; to the others it would tear up the view.
func (a *app) demoLog(cmd *cobra.Command) (*slog.Logger, error) {
	level, _ := cmd.Flags().GetString("log-level")
	format, _ := cmd.Flags().GetString("log-format")
	if level == "" {
		return slog.New(slog.DiscardHandler), nil
	}
	if _, ok := logLevel(level); !ok {
		return nil, usage("--log-level %q: must be debug, info, warn or error", level)
	}
	log, _ := newLogger(a.err, logging{Level: level, Format: format}, &a.level)
	return log, nil
}

// errInterrupted is all there is to say when a person has ended the demo.
var errInterrupted = errors.New("interrupted")

// demo is one demonstration.
type demo struct {
	demoOptions
	site      *demoSite
	receivers []*demoReceiver
	endpoints []*demoEndpoint
	oracle    *demoOracle
	view      *demoView
	log       *slog.Logger
	abort     <-chan struct{}
}

func (a *app) demo(ctx context.Context, o demoOptions, log *slog.Logger) (err error) {
	// A terminal or a reader that has gone (demo | head) must not end the process before it has cleaned up.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP)
	defer stop()
	view := newDemoView(a.out)
	db, err := openThrowaway(ctx, o.dsn, "demo", demoWriters+1, a.err)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.close(ctx)) }()
	site := &demoSite{db}
	view.step("%s", site.about)
	d := &demo{demoOptions: o, site: site, oracle: newDemoOracle(), view: view, log: log, abort: a.abort}
	result, err := d.play(ctx)
	switch {
	case ctx.Err() != nil:
		return errInterrupted
	case err != nil:
		return err
	}
	view.report(result)
	return result.err()
}

// play sets everything up, lets it run and takes stock.
func (d *demo) play(ctx context.Context) (_ *demoResult, err error) {
	d.receivers = newDemoReceivers(d.seed, d.oracle)
	defer func() { err = errors.Join(err, d.closeReceivers()) }()
	for _, r := range d.receivers {
		if err := r.listen(ctx); err != nil {
			return nil, err
		}
	}
	if d.endpoints, err = demoEndpoints(d.receivers); err != nil {
		return nil, err
	}
	if err := d.site.install(ctx, d.endpoints, func(step string) { d.view.step("%s", step) }); err != nil {
		return nil, err
	}
	command, forget, err := d.site.guide()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, forget()) }()
	d.introduce()
	d.view.step("in a second terminal: %s", command)
	if err := d.run(ctx); err != nil {
		return nil, err
	}
	deliveries, err := d.site.deliveries(ctx)
	if err != nil {
		return nil, err
	}
	dead, err := d.site.deadLetters(ctx)
	if err != nil {
		return nil, err
	}
	return d.oracle.judge(deliveries, dead), nil
}

func (d *demo) introduce() {
	d.view.step("tenants: %s", strings.Join(demoTenants(), ", "))
	for _, r := range d.receivers {
		d.view.step("receiver %s: %s", r.name, r.about)
	}
	pace := "as fast as they go"
	if d.rate > 0 {
		pace = fmt.Sprintf("%g a second", d.rate)
	}
	d.view.step("an application inserts %s events, %s, and rolls some back", thousands(d.events), pace)
}

// run holds the relay, the receivers, the application and the spectator together. The first that fails ends them all.
func (d *demo) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	relaying, stopRelay := context.WithCancel(ctx)
	defer stopRelay()
	status := new(relay.Status)
	written := make(chan struct{})
	for _, r := range d.receivers {
		group.Go(r.serve)
	}
	group.Go(func() error {
		// Receivers answer until the relay has drained.
		defer func() { _ = d.closeReceivers() }()
		err := relay.Run(relaying, relay.Options{
			Config: d.relayConfig(), Version: version(), Log: d.log, Registry: prometheus.NewRegistry(), Status: status, Abort: d.abort,
		})
		if err != nil {
			return fmt.Errorf("run the relay: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		if err := awaitRelay(ctx, status); err != nil {
			return err
		}
		defer close(written)
		return d.write(ctx)
	})
	group.Go(func() error {
		defer stopRelay()
		return d.watch(ctx, written)
	})
	return group.Wait()
}

// relayConfig is the default but for what would make a demo long: a breaker that leaves a dead receiver alone for a minute, and that takes a
// flaky one for dead once in a few thousand requests and then asks for successes in a row.
func (d *demo) relayConfig() relay.Config {
	c := relay.DefaultConfig()
	c.Database.URL, c.Database.Slot = d.site.dsn, d.site.slot
	c.Network.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	c.Breaker.Failures, c.Breaker.OpenFor, c.Breaker.HalfOpen = 10, 250*time.Millisecond, 32
	c.Queue.Poll = 100 * time.Millisecond
	c.Shutdown.Drain = 5 * time.Second
	return c
}

// closeReceivers may be called again.
func (d *demo) closeReceivers() error {
	var errs []error
	for _, r := range d.receivers {
		errs = append(errs, r.close())
	}
	return errors.Join(errs...)
}

// awaitRelay waits until the relay reads the log: the latency of what was committed earlier would be that of its start.
func awaitRelay(ctx context.Context, status *relay.Status) error {
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		ready, what := status.Ready()
		if ready {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the relay, which says %q: %w", what, ctx.Err())
		case <-tick.C:
		}
	}
}

// watch shows how it goes until everything written has come to its end, or nothing moves any more.
func (d *demo) watch(ctx context.Context, written <-chan struct{}) error {
	tick := time.NewTicker(demoFrame)
	defer tick.Stop()
	settled, moved := 0, time.Now()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		dead, err := d.site.deadLetters(ctx)
		if err != nil {
			return err
		}
		waiting, err := d.site.waiting(ctx)
		if err != nil {
			return err
		}
		s := d.oracle.sample()
		s.waiting, s.dead = waiting, len(dead)
		d.view.show(time.Now(), s)
		if now := s.received + s.dead; now > settled || !isClosed(written) {
			settled, moved = now, time.Now()
		}
		if isClosed(written) && d.oracle.settled(dead) {
			return nil
		}
		if time.Since(moved) > demoPatience {
			d.view.step("nothing has moved for %v: this is how it stands", demoPatience)
			return nil
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
