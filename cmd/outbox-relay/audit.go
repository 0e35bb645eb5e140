package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// auditShown is how many missing deliveries are listed one by one.
const auditShown = 20

// auditResult is what the command prints as JSON.
type auditResult struct {
	Database string              `json:"database,omitempty"` // its name, where there are several
	Since    time.Time           `json:"since,omitzero"`
	Until    time.Time           `json:"until,omitzero"`
	Tenants  []relay.AuditReport `json:"tenants"`
	First    []missingDelivery   `json:"first,omitempty"`
}

type missingDelivery struct {
	Tenant   string      `json:"tenant"`
	Event    outbox.UUID `json:"event"`
	Endpoint outbox.UUID `json:"endpoint"`
}

func (a *app) auditCommand() *cobra.Command {
	var since, until moment
	var o relay.AuditOptions
	var output string
	cmd := &cobra.Command{
		Use:   "audit [TENANT …]",
		Short: "Look for committed events that should have been delivered and were not",
		Long: `Compare what has been committed with what is recorded: every event that the relay has handled and
that matches a subscription has a delivery. Nothing is changed without --repair, and relays may go on
meanwhile. They do the same by themselves for whatever is new, every half minute.

Subscriptions are judged as they are now: an event from before its subscription counts as missing.
Without --thorough, only events that have no delivery at all are looked at. Events of the last half
minute, of suspended tenants and of tenants whose earlier events are still being queued are left out,
as are those from before a tenant was added, even where tenants add has queued them, or from before
it came from another cluster, by a restore or with its schema.
Of several databases each has its turn, with an object for each in JSON; tenants are named within
one.

Exit codes: 0 nothing is missing, or it has been queued; 1 deliveries are missing, or a tenant was
left out that was named, or that could not be read.`,
		Example: `  outbox-relay audit                            # all tenants, the last day
  outbox-relay audit acme --since 30d --thorough
  outbox-relay audit --since 2026-11-01T00:00:00Z --until 2026-11-02T00:00:00Z --repair`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.load(cmd)
			if err != nil {
				return err
			}
			now := time.Now()
			o.Since, o.Until = since.from(now), until.from(now)
			if border := now.Add(-c.Retention.Deliveries); c.Retention.Deliveries > 0 && o.Since.Before(border) {
				if cmd.Flags().Changed("since") {
					return usage("--since %s: reaches back further than retention.deliveries (%s): what was delivered before has no row any more and would count as missing; begin at %s or later",
						o.Since.UTC().Format(time.RFC3339), durationText(c.Retention.Deliveries), border.Add(time.Minute).UTC().Truncate(time.Minute).Format(time.RFC3339))
				}
				o.Since = border
			}
			if !o.Until.IsZero() && !o.Since.Before(o.Until) {
				return usage("--until %s: must be after --since, which is %s: there is nothing to look at in between",
					o.Until.UTC().Format(time.RFC3339), o.Since.UTC().Format(time.RFC3339))
			}
			if len(args) > 0 { // of one database: the others have tenants of their own
				o.Tenants = args
				if c, err = a.pick(&c); err != nil {
					return err
				}
				return a.audit(cmd.Context(), &c, o, output)
			}
			return a.inEach(cmd.Context(), &c, output != "json", func(one *config) error { return a.audit(cmd.Context(), one, o, output) })
		},
	}
	since = moment{ago: 24 * time.Hour}
	flags := cmd.Flags()
	flags.Var(timeFlag(&since), "since", "only events that occurred since this `TIME`: "+momentHelp+" (default 1d)")
	flags.Var(timeFlag(&until), "until", "only events that occurred before this `TIME`")
	flags.BoolVar(&o.Thorough, "thorough", false, "compare every event with every endpoint: finds also what only some endpoints miss")
	flags.BoolVar(&o.Repair, "repair", false, "queue what is missing")
	flags.VarP(oneOf(&output, "FORMAT", "text", "json"), "output", "o", "print as `FORMAT`: text or json")
	return cmd
}

func (a *app) audit(ctx context.Context, c *config, o relay.AuditOptions, output string) error {
	result := auditResult{Database: c.name, Since: o.Since, Until: o.Until}
	o.Found = func(tenant string, event, endpoint outbox.UUID) {
		if len(result.First) < auditShown {
			result.First = append(result.First, missingDelivery{tenant, event, endpoint})
		}
	}
	shown := progressLine{app: a, last: time.Now()} // what is soon over needs none but on a terminal
	defer shown.end()
	o.Progress = func(tenant string) { shown.show("auditing %s", plain(tenant)) }
	for shard := range c.Database.Shards {
		reports, err := auditShard(ctx, c, shard, o)
		if err != nil {
			return err
		}
		result.Tenants = append(result.Tenants, reports...)
	}
	shown.end()
	slices.SortFunc(result.Tenants, func(a, b relay.AuditReport) int { return strings.Compare(a.Tenant, b.Tenant) })
	var err error
	if output == "json" {
		err = writeJSON(a.out, "  ", result)
	} else {
		err = writeAudit(a.out, &result)
	}
	if err != nil {
		return err
	}
	for _, name := range o.Tenants { // after what was found of the others, and repaired perhaps
		if !slices.ContainsFunc(result.Tenants, func(r relay.AuditReport) bool { return r.Tenant == name }) {
			return hinted{
				fmt.Errorf("schema %q is not a tenant, or none of tenants.include", name),
				"see: outbox-relay tenants list; names are taken as they are, upper and lower case differ",
			}
		}
	}
	for _, r := range result.Tenants {
		if r.Missing > r.Queued || r.Failed || r.Skipped != "" && slices.Contains(o.Tenants, r.Tenant) {
			return errFailed
		}
	}
	return nil
}

// auditShard judges the tenants of a shard by what its own reader has noted.
func auditShard(ctx context.Context, c *config, shard int, o relay.AuditOptions) ([]relay.AuditReport, error) {
	st, err := store.New(ctx, store.Config{
		URL: c.Database.URL, MaxConns: 2, ConnectTimeout: c.Database.ConnectTimeout, Slot: c.Database.ShardSlot(shard), Shard: shard,
		PayloadSchemas: c.Validation.PayloadSchema != relay.SchemaOff,
		Log:            slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return nil, withHint(c.urlKey(), err)
	}
	defer st.Close()
	return relay.Audit(ctx, st, &c.Config, o)
}

func writeAudit(out io.Writer, result *auditResult) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	say(w, "TENANT\tEVENTS\tMISSING\tQUEUED\t\n")
	var missing, queued, left int64
	whole := true
	for _, r := range result.Tenants {
		note := ""
		switch {
		case r.Skipped != "":
			note = "left out: " + plain(r.Skipped)
		case !r.Restored.IsZero():
			note = "it came from another cluster at " + r.Restored.Format(time.RFC3339) + "; events from before are left out"
		case !r.Added.IsZero():
			note = "events from before it was added, " + r.Added.Format(time.RFC3339) + ", are left out"
		}
		say(w, "%s\t%d\t%d\t%d\t%s\n", plain(r.Tenant), r.Events, r.Missing, r.Queued, note)
		missing, queued = missing+r.Missing, queued+r.Queued
		if r.Skipped != "" {
			left++
		}
		whole = whole && r.Skipped == "" && r.Added.IsZero() && r.Restored.IsZero()
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, m := range result.First {
		say(out, "missing: event %s at endpoint %s of %s\n", m.Event, m.Endpoint, plain(m.Tenant))
	}
	leftOut := suffixIf(left > 0, "; "+plural(left, "tenant was", "tenants were")+" left out")
	switch {
	case missing == 0 && left > 0 && int(left) == len(result.Tenants):
		say(out, "nothing was looked at%s\n", leftOut)
	case missing == 0:
		say(out, "nothing is missing%s%s\n", suffixIf(!whole, " in what was looked at"), leftOut)
	case queued == missing:
		say(out, "%s queued%s\n", plural(queued, "delivery was", "deliveries were"), leftOut)
	default:
		say(out, "%s missing: outbox-relay events explain says why, --repair queues what is missing%s\n", plural(missing, "delivery is", "deliveries are"), leftOut)
	}
	return nil
}
