package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/relay/desk"
)

func (a *app) deadlettersCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "deadletters",
		Aliases: []string{"deadletter"},
		Short:   "List, show, replay and discard what was given up",
		Long: `A dead letter is a delivery that was given up: its attempts are used up, the receiver refused it for
good, or an operator skipped it. It keeps the exact body, also when event and endpoint are deleted,
and it is known by the id of its delivery. It stays open until somebody replays or discards it.`,
		RunE: subcommandMissing,
	}
	cmd.AddCommand(a.deadlettersListCommand(), a.deadlettersShowCommand(), a.deadlettersReplayCommand(), a.deadlettersDiscardCommand())
	return cmd
}

// letterFlags choose dead letters.
type letterFlags struct {
	filter       desk.LetterFilter
	since, until moment
}

func (f *letterFlags) addTo(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.Var(idFlag(&f.filter.Endpoint), "endpoint", "only of the endpoint of this `ID`")
	flags.Var(idFlag(&f.filter.Event), "event", "only of the event of this `ID`")
	flags.StringVar(&f.filter.Type, "type", "", "only of events of this `TYPE`, whose rows are still there")
	flags.Var(timeFlag(&f.since), "since", "only those that died since this `TIME`: "+momentHelp)
	flags.Var(timeFlag(&f.until), "until", "only those that died before this `TIME`")
}

func (f *letterFlags) at(now time.Time) desk.LetterFilter {
	filter := f.filter
	filter.Since, filter.Until = f.since.from(now), f.until.from(now)
	return filter
}

// given tells whether any of the flags was.
func (f *letterFlags) given() bool {
	return !f.filter.Empty() || f.since != moment{} || f.until != moment{}
}

func (a *app) deadlettersListCommand() *cobra.Command {
	var q inquiry
	var f letterFlags
	states, n := []string{"open"}, 50
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List dead letters, the latest first",
		Example: `  outbox-relay deadletters list -t acme
  outbox-relay deadletters list -t acme --endpoint 0190c2f6-0000-7000-8000-000000000001 --since 7d
  outbox-relay deadletters list -t acme --status replayed,discarded --limit 200 -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				list, err := d.DeadLetters(ctx, f.at(d.Now()), states, n)
				if err != nil {
					return err
				}
				err = a.print(&q, list, func(w *tabwriter.Writer) { writeLetters(w, list, states, d) })
				a.full(&q, len(list), n)
				return err
			})
		},
	}
	q.addTo(cmd)
	f.addTo(cmd)
	cmd.Flags().Var(anyOf(&states, desk.LetterStates()...), "status", "only in one of these `STATES`: open, replayed, discarded")
	cmd.Flags().Var(limitFlag(&n), "limit", "at most `N`")
	return cmd
}

func writeLetters(w io.Writer, list []desk.DeadLetter, states []string, d *desk.Desk) {
	if len(list) == 0 {
		say(w, "No dead letters of tenant %s that are %s match.\n", d.Tenant(), strings.Join(states, " or "))
		return
	}
	say(w, "DELIVERY\tSTATE\tTRIES\tTYPE\tENDPOINT\tDIED\tERROR\n")
	for i := range list {
		l := &list[i]
		endpoint := l.EndpointName
		if l.EndpointGone {
			endpoint = "(gone)"
		}
		say(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\n", l.DeliveryID, l.State, l.Attempts, short(cmp.Or(l.EventType, "-"), 40), short(endpoint, 30), timeText(l.DeadAt),
			short(errorText(l), 60))
	}
}

func errorText(l *desk.DeadLetter) string {
	return strings.TrimSuffix(cmp.Or(l.ErrorCode, "-")+": "+l.Error, ": ")
}

func (a *app) deadlettersShowCommand() *cobra.Command {
	var q inquiry
	var body bool
	cmd := &cobra.Command{
		Use:   "show DELIVERY",
		Short: "Show a dead letter: last error and answer, and with --body what it would send",
		Example: `  outbox-relay deadletters show -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11
  outbox-relay deadletters show -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11 --body -o json | jq -r .body`,
		Args: oneID("delivery"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				x, err := d.DeadLetter(ctx, argument(args))
				if err != nil {
					return err
				}
				if !body {
					x.Body = nil
				}
				return a.print(&q, x, func(w *tabwriter.Writer) { writeLetter(w, x, d) })
			})
		},
	}
	q.addTo(cmd)
	cmd.Flags().BoolVar(&body, "body", false, "show the body, too")
	return cmd
}

func writeLetter(w io.Writer, x *desk.LetterDetail, d *desk.Desk) {
	now := d.Now()
	endpoint := named(x.EndpointName, x.EndpointID) + suffixIf(x.EndpointGone, ", which is gone: it cannot be replayed")
	line(w, "Delivery", "%s", x.DeliveryID)
	line(w, "Tenant", "%s", d.Tenant())
	line(w, "Event", "%s", namedEvent(x.EventType, x.EventID.String()))
	line(w, "Endpoint", "%s", endpoint)
	line(w, "Request", "%s %s", plain(x.Method), plain(x.URL))
	line(w, "State", "%s", x.State)
	line(w, "Died", "%s, after %s%s", when(x.DeadAt, now), plural(int64(x.Attempts), "attempt", "attempts"), suffixIf(x.Replay > 0, fmt.Sprintf(" in replay %d", x.Replay)))
	line(w, "Replayed", "%s", when(x.ReplayedAt, now))
	line(w, "Discarded", "%s", when(x.DiscardedAt, now))
	line(w, "Last error", "%s", plain(errorText(&x.DeadLetter)))
	if x.StatusCode > 0 {
		line(w, "Last answer", "%d %s", x.StatusCode, short(x.Answer, 500))
	}
	line(w, "Headers", "%s", plain(string(x.Headers)))
	if x.Body != nil {
		line(w, "Body", "%s", plain(*x.Body))
	} else {
		line(w, "Body", "%d bytes, see --body", x.Bytes)
	}
	if x.State == "open" && !x.EndpointGone {
		line(w, "Next", "outbox-relay deadletters replay -t %s %s", d.Tenant(), x.DeliveryID)
	}
}

// bulk is what replay and discard are told.
type bulk struct {
	inquiry
	letterFlags
	all, yes, dryRun bool
	rate             float64
}

func (b *bulk) addTo(cmd *cobra.Command) {
	b.inquiry.addTo(cmd)
	b.letterFlags.addTo(cmd)
	cmd.Flags().BoolVar(&b.all, "all", false, "all open dead letters of the tenant")
	cmd.Flags().BoolVarP(&b.yes, "yes", "y", false, "do not ask")
	cmd.Flags().BoolVar(&b.dryRun, "dry-run", false, "only say which and how many")
}

// check makes sure that the command line says which dead letters are meant, in one way.
func (b *bulk) check(_ *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usage("name one delivery, or choose several with --endpoint, --event, --type, --since and --until, or --all")
	}
	ways := 0
	for _, way := range []bool{len(args) == 1, b.given(), b.all} {
		if way {
			ways++
		}
	}
	switch {
	case ways == 0:
		return usage("say which dead letters: a delivery's id, filters such as --endpoint and --since, or --all")
	case ways > 1:
		return usage("a delivery's id, filters and --all exclude each other")
	case len(args) == 1 && b.dryRun:
		return usage("--dry-run is for several dead letters; deadletters show tells what one would send")
	case len(args) == 1:
		return checkID(args[0])
	}
	return nil
}

func (a *app) deadlettersReplayCommand() *cobra.Command {
	b := bulk{rate: defaultRate}
	cmd := &cobra.Command{
		Use:   "replay [DELIVERY]",
		Short: "Send dead letters again: one, those that filters choose, or all",
		Long: `Send dead letters again, the oldest events first: one by the id of its delivery, those that filters
choose, or all open ones of the tenant. Each goes out under the id it has always had, with all its
attempts anew, in the order that its endpoint promises.

Of several it is said first how many there are and for whom. They are queued at --rate, and sent
within the limits of their endpoints. Once queued they are marked: a command that was interrupted
goes on where it stopped when it is run again, and sends none of them twice.`,
		Example: `  outbox-relay deadletters replay -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11
  outbox-relay deadletters replay -t acme --endpoint 0190c2f6-0000-7000-8000-000000000001 --since 2d --dry-run
  outbox-relay deadletters replay -t acme --all --rate 20/s --yes`,
		Args: b.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &b.inquiry, func(ctx context.Context, d *desk.Desk, _ *config) error {
				if len(args) == 0 {
					return a.replayMany(ctx, d, &b)
				}
				x, err := d.DeadLetter(ctx, argument(args))
				if err != nil {
					return err
				}
				if x.State != "open" {
					return hinted{fmt.Errorf("the dead letter was %s already", x.State), "deliveries resend sends a delivery again whatever became of it"}
				}
				queued, err := d.Resend(ctx, x.DeliveryID)
				if err != nil {
					return err
				}
				return a.done(&b.inquiry, queued, "The dead letter is queued: outbox-relay deliveries show -t "+d.Tenant()+" "+args[0], "The delivery was queued already.")
			})
		},
	}
	b.addTo(cmd)
	cmd.Flags().Var(rateFlag(&b.rate), "rate", "let `N` become due each second; 0 for all at once")
	return cmd
}

func (a *app) deadlettersDiscardCommand() *cobra.Command {
	var b bulk
	cmd := &cobra.Command{
		Use:   "discard [DELIVERY]",
		Short: "Mark dead letters as ones that nobody wants any more",
		Long: `Mark dead letters as ones that nobody wants any more: one by the id of its delivery, those that
filters choose, or all open ones of the tenant. They are no longer listed as open, no bulk replay
sends them, and retention.dead_letters removes them some day.`,
		Example: `  outbox-relay deadletters discard -t acme 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11
  outbox-relay deadletters discard -t acme --endpoint 0190c2f6-0000-7000-8000-000000000001 --until 30d`,
		Args: b.check,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &b.inquiry, func(ctx context.Context, d *desk.Desk, _ *config) error {
				if len(args) == 0 {
					return a.discardMany(ctx, d, &b)
				}
				discarded, err := d.Discard(ctx, argument(args))
				if err != nil {
					return err
				}
				return a.done(&b.inquiry, discarded, "The dead letter is discarded.", "The dead letter was replayed or discarded before; nothing was changed.")
			})
		},
	}
	b.addTo(cmd)
	return cmd
}
