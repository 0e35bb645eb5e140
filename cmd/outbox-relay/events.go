package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

func (a *app) eventsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "events",
		Aliases: []string{"event"},
		Short:   "Show an event, and explain why it did or did not reach an endpoint",
		RunE:    subcommandMissing,
	}
	cmd.AddCommand(a.eventsExplainCommand(), a.eventsShowCommand())
	return cmd
}

func (a *app) eventsExplainCommand() *cobra.Command {
	var q inquiry
	var endpoint outbox.UUID
	cmd := &cobra.Command{
		Use:   "explain EVENT",
		Short: "Say why an event did or did not reach an endpoint",
		Long: `Say for each endpoint that has something to do with an event what became of it, and why:

  delivered       when, and after how many attempts
  waiting         until when, and for what
  dead            the last error; deadletters replay sends it again
  cancelled       why it was taken out of the queue
  not matched     what each subscription objects to, down to the clause of its filter
  not read yet    the relay has not come to it; how far it is
  no delivery     it would match now, and what may have been different then

Subscriptions are judged as they are now; the relay judged them as they were when it read the event.
The values of the event are never shown. With --endpoint, subscriptions for other types are listed
too.`,
		Example: `  outbox-relay events explain -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11
  outbox-relay events explain -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11 --endpoint 0190c2f6-0000-7000-8000-000000000001`,
		Args: oneID("event"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, c *config) error {
				rows, err := d.Rows(ctx)
				if err != nil {
					return err
				}
				x, err := d.Explain(ctx, rows, c.EndpointDefaults(), argument(args), endpoint)
				if err != nil {
					return err
				}
				return a.print(&q, x, func(w *tabwriter.Writer) { writeExplanation(w, x, d, !endpoint.IsZero()) })
			})
		},
	}
	q.addTo(cmd)
	cmd.Flags().Var(idFlag(&endpoint), "endpoint", "only for the endpoint of this `ID`")
	return cmd
}

func writeEvent(w io.Writer, e *desk.Event, d *desk.Desk) {
	id := func(id outbox.UUID) string {
		if id.IsZero() {
			return ""
		}
		return id.String()
	}
	line(w, "Event", "%s", e.ID)
	line(w, "Tenant", "%s", d.Tenant())
	if e.Gone {
		line(w, "Row", "gone, archived or deleted; this is what is left of its deliveries")
		return
	}
	line(w, "Type", "%s", plain(e.Type))
	line(w, "Name", "%s", plain(e.Name))
	line(w, "Aggregate", "%s %s, version %d", plain(e.AggregateType), e.AggregateID, e.Version)
	line(w, "Context", "%s", id(e.ContextID))
	line(w, "Correlation", "%s", id(e.CorrelationID))
	line(w, "Causation", "%s", id(e.CausationID))
	line(w, "User", "%s", id(e.UserID))
	line(w, "Occurred", "%s", when(e.OccurredAt, d.Now()))
	line(w, "Read", "%s", plain(e.ProgressText))
}

func writeExplanation(w *tabwriter.Writer, x *desk.Explanation, d *desk.Desk, one bool) {
	writeEvent(w, &x.Event, d)
	matched := false
	for i := range x.Endpoints {
		account := &x.Endpoints[i]
		matched = matched || account.Fate != desk.Unmatched
		_ = w.Flush() // lines below are no columns; a fault comes up again at the end
		say(w, "\n%s: %s\n", named(account.EndpointName, account.EndpointID), account.Fate)
		for _, line := range accountLines(account, &x.Event, d) {
			say(w, "  %s\n", plain(line))
		}
	}
	_ = w.Flush()
	if one || x.Event.Gone {
		return
	}
	if !matched {
		say(w, "\nThe event matches no subscription: it goes nowhere.\n")
	}
	if x.Others > 0 {
		say(w, "\n%s no subscription for %s.\n", plural(int64(x.Others), "endpoint has", "endpoints have"), plain(x.Event.Type))
	}
}

// accountLines says what there is to say about an endpoint.
func accountLines(a *desk.Account, e *desk.Event, d *desk.Desk) []string {
	now := d.Now()
	var lines []string
	add := func(yes bool, format string, args ...any) {
		if yes {
			lines = append(lines, fmt.Sprintf(format, args...))
		}
	}
	x := a.Delivery
	if x != nil {
		tries := plural(int64(x.Attempts), "attempt", "attempts") + suffixIf(x.Replay > 0, fmt.Sprintf(", in replay %d", x.Replay))
		add(a.Fate == desk.Delivered, "%s, after %s", when(x.CompletedAt, now), tries)
		add(a.Fate == desk.Waiting, "%s; next attempt %s, %s so far", a.Why, cmp.Or(when(x.DueAt, now), "when that is over"), tries)
		add(a.Fate == desk.Cancelled, "%s: %s", when(x.CompletedAt, now), a.Why)
	}
	add(a.Fate == desk.Dead && a.DeadLetter != nil, "%s", deathText(a, now))
	add(a.Fate == desk.Dead && a.DeadLetter == nil || a.Fate == desk.NotRead || a.Fate == desk.Missing, "%s", a.Why)
	add(a.Fate == desk.Missing, "queue what it missed: outbox-relay endpoints recover -t %s %s --since %s", d.Tenant(), a.EndpointID, e.ID)
	add(x != nil, "delivery %s", deliveryID(a))
	for _, s := range a.Subscriptions {
		if s.ID.IsZero() {
			lines = append(lines, strings.Join(s.Why, "; "))
			continue
		}
		verdict := "matches"
		if !s.Matches {
			verdict = strings.Join(s.Why, "; ")
		}
		lines = append(lines, fmt.Sprintf("subscription %s (%s): %s", s.ID, s.EventType, verdict))
	}
	return lines
}

func deathText(a *desk.Account, now time.Time) string {
	if a.DeadLetter == nil {
		return ""
	}
	return fmt.Sprintf("%s, after %s: %s", when(a.DeadLetter.DeadAt, now), plural(int64(a.DeadLetter.Attempts), "attempt", "attempts"), a.Why)
}

func deliveryID(a *desk.Account) string {
	if a.Delivery == nil {
		return ""
	}
	return a.Delivery.ID.String()
}

// plural is a number of things.
func plural(n int64, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func (a *app) eventsShowCommand() *cobra.Command {
	var q inquiry
	var body bool
	cmd := &cobra.Command{
		Use:   "show EVENT",
		Short: "Show an event and its deliveries",
		Example: `  outbox-relay events show -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11
  outbox-relay events show -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11 --body -o json | jq .event_data`,
		Args: oneID("event"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				x, err := d.Event(ctx, argument(args), body)
				if err != nil {
					return err
				}
				return a.print(&q, x, func(w *tabwriter.Writer) {
					writeEvent(w, &x.Event, d)
					line(w, "Data", "%s", documentText(x.Data))
					line(w, "Metadata", "%s", documentText(x.Metadata))
					_ = w.Flush() // the columns begin anew; a fault comes up again at the end
					say(w, "\n")
					if len(x.Deliveries) == 0 {
						say(w, "It has no deliveries: outbox-relay events explain says why.\n")
						return
					}
					writeDeliveries(w, x.Deliveries, d)
				})
			})
		},
	}
	q.addTo(cmd)
	cmd.Flags().BoolVar(&body, "body", false, "show event_data and event_metadata, too")
	return cmd
}

func documentText(doc json.RawMessage) string { return plain(string(doc)) }
