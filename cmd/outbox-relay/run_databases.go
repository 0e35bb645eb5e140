package main

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay"
)

// What one process does for several databases: a relay for each, and for each of its shards, with a slot, a pool and a share of the window and the workers of
// its own, and one client for all of their deliveries. A database that is away stops nobody but itself.
//
//	orders  ──► relay ──┐
//	billing ──► relay ──┼──► client ──► receivers
//	        └─► relay ──┘
//	              └──► status, metrics{database="…", shard="…"}, log database=… shard=…

// relays are those of the process.
type relays []*oneRelay

type oneRelay struct {
	config  *config // narrowed to its database
	shard   int
	patient bool // it does not end for what is amiss with its database
	status  relay.Status
	updates chan relay.Config // room for one, the latest
	log     *slog.Logger
}

// newRelays has those of several databases be patient in any case.
func newRelays(c *config, patient bool, log *slog.Logger) relays {
	patient = patient || len(c.Databases) > 1
	var list relays
	for _, one := range c.each() {
		for shard := range one.Database.Shards {
			r := &oneRelay{config: one, shard: shard, patient: patient, updates: make(chan relay.Config, 1), log: log}
			for _, label := range r.labels() {
				r.log = r.log.With(label.key, label.value)
			}
			list = append(list, r)
		}
	}
	return list
}

type label struct{ key, value string }

// labels tell a relay from the others of the process, as far as there are others.
func (r *oneRelay) labels() (list []label) {
	if r.config.name != "" {
		list = append(list, label{"database", r.config.name})
	}
	if r.config.Database.Shards > 1 {
		list = append(list, label{"shard", strconv.Itoa(r.shard)})
	}
	return list
}

// title is what a relay is called by people; empty: it is the only one.
func (r *oneRelay) title() string {
	var words []string
	for _, l := range r.labels() {
		if l.key != "database" {
			words = append(words, l.key)
		}
		words = append(words, l.value)
	}
	return strings.Join(words, " ")
}

// Ready tells whether every database has its relay at work, and of each what that does or why it does not.
func (l relays) Ready() (ok bool, why string) {
	ok = true
	lines := make([]string, len(l))
	for i, r := range l {
		works, what := r.status.Ready()
		ok = ok && works
		if lines[i] = what; r.title() != "" {
			lines[i] = r.title() + ": " + strings.ReplaceAll(what, "\n", "; ")
		}
	}
	return ok, strings.Join(lines, "\n")
}

// update has every relay take on its part of a configuration, which has the same databases. It is for one goroutine at a time.
func (l relays) update(c *config) {
	parts := make(map[string]*config)
	for _, one := range c.each() {
		parts[one.name] = one
	}
	for _, r := range l {
		select {
		case <-r.updates: // an older one that it has not come to
		default:
		}
		r.updates <- parts[r.config.name].Share(len(l))
	}
}

// run relays until ctx is done and everything has drained. An error of one ends all: with several, what is amiss with a database is none.
func (l relays) run(ctx context.Context, registry prometheus.Registerer, tracing *relay.Tracing, log *slog.Logger, abort <-chan struct{}) error {
	client, err := delivery.NewClient(l[0].config.ClientConfig(version()), delivery.NewMetrics(registry), log) //nolint:contextcheck // it lives until Close
	if err != nil {
		return err
	}
	defer client.Close()
	group, ctx := errgroup.WithContext(ctx)
	for _, r := range l {
		labelled := registry
		for _, label := range r.labels() {
			labelled = prometheus.WrapRegistererWith(prometheus.Labels{label.key: label.value}, labelled)
		}
		group.Go(func() error {
			err := relay.Run(ctx, relay.Options{
				Config: r.config.Share(len(l)), Shard: r.shard, Version: version(), Log: r.log, Registry: labelled, Status: &r.status, Abort: abort,
				Client: client, Patient: r.patient, Tracing: tracing, Updates: r.updates,
			})
			if err != nil {
				return r.config.named(withHint(r.config.urlKey(), fmt.Errorf("run: %w", err)))
			}
			return nil
		})
	}
	return group.Wait()
}
