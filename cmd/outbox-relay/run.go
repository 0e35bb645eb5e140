package main

import (
	"context"
	"io"
	stdlog "log"
	"os"
	"os/signal"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/relay/admin"
)

func (a *app) runCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Relay until told to stop",
		Long: `Relay events until SIGTERM or SIGINT. Attempts in flight may then finish within shutdown.drain, what
is left is deferred, and what is known is recorded; a second signal skips the wait. Nothing is lost
by killing the relay: it delivers again what was not recorded.

Any number of relays may run on one database. One reads the log, the others stand by for it; all
work the retry queue. One relay serves several databases where the configuration has the list
databases: then one that is away, or not set up, is waited for, while the others go on. With
database.shards, each shard of a database has a reader of its own, which may be in any relay.

A database that is away at the start, or that only a person can mend, ends the process, unless it is
one of several. With --patient it never does: /readyz and the log say what is missing. That is for
who restarts what ends with growing pauses, and for a sidecar, which must not take its pod along.

SIGHUP, or another content of the file of --config (a mounted ConfigMap as well), has it read its
configuration afresh: flags and environment as they were, file and secrets as they are. One with a
fault changes nothing: the log, /readyz and outbox_relay_config_reload_success say so, and a later
good one ends that. Some keys need a restart; config.example.yaml has their list, and the log and
/readyz name those that wait for one.

While it runs, server.listen serves
  /livez    200 as long as the process works
  /readyz   200 when the relay works, as leader or standing by; 503 and the reason otherwise, with a
            line for each of several databases or shards, of which all have to work, and more
            where the configuration was not reloaded or needs a restart, which does not count
  /metrics  for Prometheus

With OTEL_TRACES_EXPORTER=otlp it sends traces to a collector, which OpenTelemetry's other variables
name.`,
		Example: `  outbox-relay run --config /etc/outbox-relay/config.yaml
  outbox-relay run --database-url postgres://relay@db/app --listen :9464 --log-format json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			hangups := make(chan os.Signal, 1)
			signal.Notify(hangups, syscall.SIGHUP) // before anything is read: what it asks for is not to be missed
			defer signal.Stop(hangups)
			r := &reloader{file: a.file(), load: func() (config, error) { return a.load(cmd) }}
			if err := r.first(); err != nil {
				return err
			}
			return a.run(cmd.Context(), r, hangups)
		},
	}
	cmd.Flags().BoolVar(&a.patient, "patient", false, "wait for a database that is away or not set up, instead of ending")
	cmd.Flags().String("listen", "", "serve health and metrics on `HOST:PORT`, empty for nowhere (server.listen)")
	return cmd
}

func (a *app) run(ctx context.Context, r *reloader, hangups <-chan os.Signal) error {
	stdlog.SetOutput(io.Discard) // net/http prints there what a receiver sends unasked, bytes of it included
	c := r.inUse                 // of the start
	log, flush := newLogger(a.err, c.Log, &a.level)
	defer flush()
	registry := prometheus.NewRegistry()
	registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		collectors.NewBuildInfoCollector(),
	)
	traces, err := newTracing(ctx, registry, log)
	if err != nil {
		return err
	}
	defer traces.close(ctx, log)
	relays := newRelays(&c, a.patient, log)
	r.begin(registry, log, func(c *config) {
		a.level.Set(c.Log.level())
		relays.update(c)
	})
	group, ctx := errgroup.WithContext(ctx)

	// Health and metrics are there until the drain is over.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	if c.Server.Listen != "" {
		pages, err := admin.Listen(ctx, c.Server.Listen, admin.Options{Health: health{relays, r}, Registry: registry, Log: log})
		if err != nil {
			return hinted{err, "where another relay has this address, give this one its own with --listen (server.listen), or none: \"\""}
		}
		log.Info("serving health and metrics", "address", pages.Addr())
		group.Go(func() error { return pages.Run(serving) })
	}
	if c.Server.Pprof != "" {
		profiler, err := admin.ListenProfiler(ctx, c.Server.Pprof, log)
		if err != nil {
			return err
		}
		log.Info("serving the profiler", "address", profiler.Addr())
		group.Go(func() error { return profiler.Run(serving) })
	}
	for _, one := range relays {
		if one.shard == 0 { // once for each database
			group.Go(func() error { return autoAdopt(ctx, one.config, one.log) })
		}
	}
	group.Go(func() error { return r.run(ctx, hangups) })
	group.Go(func() error {
		defer stopServing()
		log.Info("starting", "version", version())
		if err := relays.run(ctx, registry, traces.relay, log, a.abort); err != nil {
			return err
		}
		log.Info("stopped")
		return nil
	})
	return group.Wait()
}
