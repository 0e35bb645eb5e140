package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/relay/desk"
)

func (a *app) deliveriesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "deliveries",
		Aliases: []string{"delivery"},
		Short:   "List and show deliveries, send one again, skip one that is stuck",
		Long: `A delivery is one event on its way to one endpoint. It ends as a success, as failed (then it is a
dead letter, see deadletters) or as cancelled; until then it is pending (never attempted) or
retrying.`,
		RunE: subcommandMissing,
	}
	cmd.AddCommand(a.deliveriesListCommand(), a.deliveriesShowCommand(), a.deliveriesResendCommand(), a.deliveriesSkipCommand())
	return cmd
}

func (a *app) deliveriesListCommand() *cobra.Command {
	var q inquiry
	var f desk.DeliveryFilter
	var since, until moment
	f.Limit = 50
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List deliveries, the newest first",
		Long: `List deliveries that the relay made, the newest first. NEXT tells when the next attempt is due:
parked means that it waits for something other than a time; deliveries show says for what.`,
		Example: `  outbox-relay deliveries list -t acme --status pending,retrying
  outbox-relay deliveries list -t acme --endpoint 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11 --since 2h
  outbox-relay deliveries list -t acme --status failed -o json | jq -r '.[].id'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				f.Since, f.Until = since.from(d.Now()), until.from(d.Now())
				list, err := d.Deliveries(ctx, f)
				if err != nil {
					return err
				}
				err = a.print(&q, list, func(w *tabwriter.Writer) { writeDeliveries(w, list, d) })
				a.full(&q, len(list), f.Limit)
				return err
			})
		},
	}
	q.addTo(cmd)
	flags := cmd.Flags()
	flags.Var(idFlag(&f.Endpoint), "endpoint", "only to the endpoint of this `ID`")
	flags.Var(idFlag(&f.Event), "event", "only of the event of this `ID`")
	flags.StringVar(&f.Type, "type", "", "only of events of this `TYPE`")
	flags.Var(anyOf(&f.Statuses, desk.Statuses()...), "status", "only in one of these `STATES`: pending, retrying, success, failed, cancelled")
	flags.Var(timeFlag(&since), "since", "only those made since this `TIME`: "+momentHelp)
	flags.Var(timeFlag(&until), "until", "only those made before this `TIME`")
	flags.Var(limitFlag(&f.Limit), "limit", "at most `N`")
	return cmd
}

func writeDeliveries(w io.Writer, list []desk.Delivery, d *desk.Desk) {
	if len(list) == 0 {
		say(w, "No deliveries of tenant %s match.\n", d.Tenant())
		return
	}
	say(w, "DELIVERY\tSTATUS\tTRIES\tTYPE\tENDPOINT\tMADE\tNEXT\tLAST ANSWER\n")
	for i := range list {
		x := &list[i]
		say(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", x.ID, x.Status, x.Attempts, short(cmp.Or(x.EventType, "-"), 40), short(cmp.Or(x.EndpointName, "(gone)"), 30),
			timeText(x.CreatedAt), nextText(x, d.Now()), short(answerText(x), 60))
	}
}

// nextText tells when the next attempt is due.
func nextText(x *desk.Delivery, now time.Time) string {
	switch {
	case !x.Queued:
		return "-"
	case !x.LeasedBy.IsZero() && x.DueAt.After(now):
		return "in flight"
	case x.DueAt.IsZero():
		return "parked"
	case x.DueAt.After(now):
		return relative(x.DueAt.Time, now)
	default:
		return "due"
	}
}

// answerText is what is known of the last attempt.
func answerText(x *desk.Delivery) string {
	switch {
	case x.ErrorCode == "deferred":
		return "deferred: " + x.Error
	case x.Error != "" && x.StatusCode == 0:
		return cmp.Or(x.ErrorCode, "-") + ": " + x.Error
	default:
		return statusText(x.ErrorCode, x.StatusCode)
	}
}

func (a *app) deliveriesShowCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "show DELIVERY",
		Short: "Show a delivery: its state, attempts, why it waits, what it waits behind",
		Example: `  outbox-relay deliveries show -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11
  outbox-relay deliveries show -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11 -o json | jq .why`,
		Args: oneID("delivery"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				x, err := d.Delivery(ctx, argument(args))
				if err != nil {
					return err
				}
				return a.print(&q, x, func(w *tabwriter.Writer) { writeDelivery(w, x, d) })
			})
		},
	}
	q.addTo(cmd)
	return cmd
}

func writeDelivery(w *tabwriter.Writer, x *desk.DeliveryDetail, d *desk.Desk) {
	now := d.Now()
	line(w, "Delivery", "%s", x.ID)
	line(w, "Tenant", "%s", d.Tenant())
	line(w, "Event", "%s", namedEvent(x.EventType, x.EventID.String()))
	line(w, "Endpoint", "%s, %s", named(x.EndpointName, x.EndpointID), x.Endpoint.State)
	line(w, "Request", "%s %s", plain(x.Method), plain(x.URL))
	line(w, "Made", "%s", when(x.CreatedAt, now))
	status := x.Status
	if x.Replay > 0 {
		status += fmt.Sprintf(", replay %d", x.Replay)
	}
	line(w, "Status", "%s", status)
	line(w, "Why it waits", "%s", plain(x.Why))
	if x.Queued {
		line(w, "Next attempt", "%s", cmp.Or(when(x.DueAt, now), "when that is over"))
	}
	if !x.LeasedBy.IsZero() {
		line(w, "Held by", "relay %s until %s", x.LeasedBy, when(x.DueAt, now))
	}
	writePlace(w, x.Place, now)
	tries := strconv.Itoa(x.Attempts)
	if x.MaxTries > 0 {
		tries += fmt.Sprintf(" of at most %d", x.MaxTries)
	}
	line(w, "Attempts", "%s%s", tries, suffixIf(x.Replay > 0, ", in this replay"))
	if x.Attempts > 0 {
		line(w, "Last attempt", "%s: %s", when(x.AttemptedAt, now), short(answerText(&x.Delivery), 200))
	}
	line(w, "Ended", "%s", when(x.CompletedAt, now))
	if x.DeadLetter != "" {
		line(w, "Dead letter", "%s: outbox-relay deadletters show -t %s %s", x.DeadLetter, d.Tenant(), x.ID)
	}
	writeAttempts(w, x.Failures)
}

func namedEvent(eventType, id string) string {
	if eventType == "" {
		return id + ", whose row is gone"
	}
	return plain(eventType) + " (" + id + ")"
}

func writePlace(w io.Writer, p *desk.Place, now time.Time) {
	if p == nil {
		return
	}
	line(w, "Order", "%s before it, %s behind it, of key %s", upTo(p.Before), upTo(p.Behind), p.Key)
	if p.Head != nil {
		line(w, "First in line", "%s, %s, %s: %s", p.Head.ID, p.Head.Status, nextText(p.Head, now), short(answerText(p.Head), 120))
	}
	if p.Before == 0 && p.Behind > 0 {
		line(w, "", "deliveries skip gives it up and lets those behind it go on")
	}
}

func writeAttempts(w *tabwriter.Writer, list []desk.Attempt) {
	if len(list) == 0 {
		return
	}
	_ = w.Flush() // the columns begin anew; a fault comes up again at the end
	say(w, "\nFAILED ATTEMPT\tREPLAY\tAT\tTOOK\tCLASS\tSTATUS\tERROR\tANSWER\n")
	for _, t := range list {
		say(w, "%d\t%d\t%s\t%s\t%s\t%s\t%s\t%s\n", t.Number, t.Replay, timeText(t.At), time.Duration(t.TookMS)*time.Millisecond, t.Class,
			statusText("", t.StatusCode), short(cmp.Or(t.Error, "-"), 60), short(cmp.Or(t.Answer, "-"), 60))
	}
}

func (a *app) deliveriesResendCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "resend DELIVERY",
		Short: "Send a delivery again that has ended, whichever way",
		Long: `Queue a delivery again that has ended, also one that was a success. It goes out under the id it has
always had, so a receiver that drops repeats drops it; its attempts count from 1 again, as those of
a replay. A dead letter of it counts as replayed.

For many at once, see deadletters replay and endpoints recover.`,
		Example: `  outbox-relay deliveries resend -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11`,
		Args:    oneID("delivery"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				queued, err := d.Resend(ctx, argument(args))
				if err != nil {
					return err
				}
				return a.done(&q, queued, "The delivery is queued: outbox-relay deliveries show -t "+d.Tenant()+" "+args[0],
					"The delivery was queued already; it goes out when it is due.")
			})
		},
	}
	q.addTo(cmd)
	return cmd
}

func (a *app) deliveriesSkipCommand() *cobra.Command {
	var q inquiry
	var reason string
	cmd := &cobra.Command{
		Use:   "skip DELIVERY",
		Short: "Give a waiting delivery up, so that those behind it go on",
		Long: `Give a waiting delivery up: it becomes a dead letter, which can be replayed or discarded. Where an
endpoint promises an order, what waits behind it goes on.

A delivery that a relay has at this moment is refused.`,
		Example: `  outbox-relay deliveries skip -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11 --reason 'they cannot parse it, ticket 4711'`,
		Args:    oneID("delivery"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				id := argument(args)
				skipped, err := d.Skip(ctx, id, reason)
				if err == nil && !skipped {
					_, err = d.Delivery(ctx, id) // or is there none?
				}
				if err != nil {
					return err
				}
				return a.done(&q, skipped, "The delivery is a dead letter now: outbox-relay deadletters show -t "+d.Tenant()+" "+args[0],
					"The delivery does not wait; nothing was changed.")
			})
		},
	}
	q.addTo(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "`TEXT` that becomes the dead letter's error")
	return cmd
}

// done says what a command has done, or that there was nothing to do.
func (a *app) done(q *inquiry, changed bool, yes, no string) error {
	return a.print(q, map[string]bool{"changed": changed}, func(w *tabwriter.Writer) {
		if changed {
			say(w, "%s\n", yes)
		} else {
			say(w, "%s\n", no)
		}
	})
}
