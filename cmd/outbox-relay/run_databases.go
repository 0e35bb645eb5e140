package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay"
)

// What one process does for several databases: a relay for each, with a slot, a pool and a share of the window and the workers of its own, and one
// client for all of their deliveries. A database that is away stops nobody but itself.
//
//	orders  ──► relay ──┐
//	billing ──► relay ──┼──► client ──► receivers
//	legacy  ──► relay ──┘
//	              └──► status, metrics{database="…"}, log database=…

// relays are those of the process.
type relays []*oneRelay

type oneRelay struct {
	config *config // narrowed to its database
	status relay.Status
	log    *slog.Logger
}

func newRelays(c *config, log *slog.Logger) relays {
	var list relays
	for _, one := range c.each() {
		r := &oneRelay{config: one, log: log}
		if one.name != "" {
			r.log = log.With("database", one.name)
		}
		list = append(list, r)
	}
	return list
}

// Ready tells whether every database has its relay at work, and of each what that does or why it does not.
func (l relays) Ready() (ok bool, why string) {
	ok = true
	lines := make([]string, len(l))
	for i, r := range l {
		works, what := r.status.Ready()
		ok = ok && works
		if lines[i] = what; r.config.name != "" {
			lines[i] = r.config.name + ": " + strings.ReplaceAll(what, "\n", "; ")
		}
	}
	return ok, strings.Join(lines, "\n")
}

// run relays until ctx is done and everything has drained. An error of one ends all: with several, what is amiss with a database is none.
func (l relays) run(ctx context.Context, registry prometheus.Registerer, log *slog.Logger, abort <-chan struct{}) error {
	client, err := delivery.NewClient(l[0].config.ClientConfig(version()), delivery.NewMetrics(registry), log) //nolint:contextcheck // it lives until Close
	if err != nil {
		return err
	}
	defer client.Close()
	group, ctx := errgroup.WithContext(ctx)
	for _, r := range l {
		labelled := registry
		if r.config.name != "" {
			labelled = prometheus.WrapRegistererWith(prometheus.Labels{"database": r.config.name}, registry)
		}
		group.Go(func() error {
			err := relay.Run(ctx, relay.Options{
				Config: r.config.Share(len(l)), Version: version(), Log: r.log, Registry: labelled, Status: &r.status, Abort: abort,
				Client: client, Patient: len(l) > 1,
			})
			if err != nil {
				return r.config.named(withHint(r.config.key("url"), fmt.Errorf("run: %w", err)))
			}
			return nil
		})
	}
	return group.Wait()
}
