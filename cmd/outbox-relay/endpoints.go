package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

func (a *app) endpointsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "endpoints",
		Aliases: []string{"endpoint"},
		Short:   "List and show endpoints, pause, resume, test, verify and recover one, rotate its secret",
		Long: `An endpoint is where a tenant's events are sent. It is

  active     it takes deliveries
  paused     an operator holds its deliveries back; nothing is lost
  disabled   the relay gave it up (410, or failures for too long) and says why
  inactive   somebody set is_active to false

Events of a paused endpoint wait until it is resumed. Events committed while an endpoint is disabled
or inactive do not: endpoints recover queues them afterwards.`,
		RunE: subcommandMissing,
	}
	cmd.AddCommand(a.endpointsListCommand(), a.endpointsShowCommand(), a.endpointsPauseCommand(), a.endpointsResumeCommand(), a.endpointsTestCommand(),
		a.endpointsVerifyCommand(), a.endpointsRecoverCommand(), a.endpointsRotateSecretCommand())
	return cmd
}

func (a *app) endpointsListCommand() *cobra.Command {
	var q inquiry
	var states []string
	n := 100
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List endpoints with their state and what waits for them",
		Long: fmt.Sprintf(`List endpoints with their state and what waits for them:

  WAITING   deliveries that are due at some time
  PARKED    deliveries that wait for the endpoint, or behind others of the same key
  DEAD      open dead letters, to be replayed or discarded

Counting stops at %d.`, desk.CountLimit),
		Example: `  outbox-relay endpoints list -t acme
  outbox-relay endpoints list -t acme --status paused,disabled,failing
  outbox-relay endpoints list -t acme -o json | jq -r '.[] | select(.dead_letters > 0) | .id'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, c *config) error {
				rows, err := d.Rows(ctx)
				if err != nil {
					return err
				}
				list, err := d.Endpoints(ctx, rows.Routing(c.EndpointDefaults()), states, n)
				if err != nil {
					return err
				}
				err = a.print(&q, list, func(w *tabwriter.Writer) { writeEndpoints(w, list, d) })
				a.full(&q, len(list), n)
				return err
			})
		},
	}
	q.addTo(cmd)
	cmd.Flags().Var(anyOf(&states, desk.EndpointStates()...), "status", "only in one of these `STATES`: active, paused, inactive, disabled, failing")
	cmd.Flags().Var(limitFlag(&n), "limit", "at most `N`")
	return cmd
}

func writeEndpoints(w io.Writer, list []desk.Endpoint, d *desk.Desk) {
	if len(list) == 0 {
		say(w, "No endpoints of tenant %s match.\n", d.Tenant())
		return
	}
	say(w, "ENDPOINT\tNAME\tSTATE\tWAITING\tPARKED\tDEAD\tLAST SUCCESS\tNOTE\n")
	for i := range list {
		e := &list[i]
		say(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.ID, short(e.Name, 30), e.State.State, upTo(e.Waiting), upTo(e.Parked), upTo(e.Dead),
			cmp.Or(e.LastSuccess, "-"), cmp.Or(short(strings.Join(troubles(e, d.Now()), "; "), 100), "-"))
	}
}

// troubles is what somebody should know of an endpoint.
func troubles(e *desk.Endpoint, now time.Time) []string {
	var list []string
	s := &e.State
	if s.Reason != "" {
		list = append(list, s.Reason)
	}
	if e.Fault != "" {
		list = append(list, "its row cannot be used: "+e.Fault)
	}
	if !s.FailingSince.IsZero() {
		list = append(list, "failing for "+span(now.Sub(s.FailingSince.Time))+suffixIf(s.LastError != "", " ("+s.LastError+")"))
	}
	if s.OpenUntil.After(now) {
		list = append(list, "breaker open for another "+span(s.OpenUntil.Sub(now)))
	}
	return list
}

func (a *app) endpointsShowCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "show ENDPOINT",
		Short: "Show an endpoint: state, backlog, settings, subscriptions; no secrets",
		Example: `  outbox-relay endpoints show -t acme 0190c2f6-0000-7000-8000-000000000001
  outbox-relay endpoints show -t acme 0190c2f6-0000-7000-8000-000000000001 -o json | jq .settings`,
		Args: oneID("endpoint"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, c *config) error {
				rows, err := d.Rows(ctx)
				if err != nil {
					return err
				}
				x, err := d.Endpoint(ctx, rows, rows.Routing(c.EndpointDefaults()), argument(args))
				if err != nil {
					return err
				}
				return a.print(&q, x, func(w *tabwriter.Writer) {
					writeEndpoint(w, x, d)
					writeSubscriptions(w, x.Subscriptions)
				})
			})
		},
	}
	q.addTo(cmd)
	return cmd
}

func writeEndpoint(w io.Writer, x *desk.EndpointDetail, d *desk.Desk) {
	now, s := d.Now(), &x.Settings
	orDefault := func(n float64, format string) string {
		if n == 0 {
			return "as configured"
		}
		return fmt.Sprintf(format, n)
	}
	line(w, "Endpoint", "%s", x.ID)
	line(w, "Name", "%s", plain(x.Name))
	line(w, "Tenant", "%s", d.Tenant())
	line(w, "Sends", "%s %s as %s", plain(s.Method), plain(x.URL), plain(s.Format))
	line(w, "State", "%s%s", x.State.State, suffixIf(!x.State.Since.IsZero(), " since "+when(x.State.Since, now)))
	for _, trouble := range troubles(&x.Endpoint, now) {
		line(w, "Note", "%s", plain(trouble))
	}
	line(w, "Backlog", "%s waiting, %s parked, %s dead letters", upTo(x.Waiting), upTo(x.Parked), upTo(x.Dead))
	line(w, "Last 7 days", "%d attempts, %d delivered, %d failed", x.Week.Attempts, x.Week.Delivered, x.Week.Failed)
	line(w, "Last success", "%s", x.LastSuccess)
	line(w, "Last used", "%s", when(x.LastUsedAt, now))
	line(w, "Order", "%s", plain(x.Order))
	line(w, "Limits", "%s at once, %s", orDefault(float64(s.Concurrency), "%v"), orDefault(s.Rate, "%v a second"))
	retries := "as configured"
	if s.MaxRetries >= 0 {
		retries = fmt.Sprint(s.MaxRetries)
	}
	line(w, "Retries", "%s, first wait %s, factor %s", retries, orDefault(float64(s.Backoff), "%vs"), orDefault(s.Multiplier, "%v"))
	line(w, "Timeout", "%s", orDefault(float64(s.Timeout), "%vs"))
	line(w, "Signature", "header %s%s", plain(s.SignatureHeader), secondSecret(s, now))
	line(w, "Headers", "%s", plain(strings.Join(s.CustomHeaders, ", ")))
	line(w, "Redirects", "%s", map[bool]string{true: "followed", false: "not followed"}[s.FollowRedirects])
	line(w, "Certificate", "%s", map[bool]string{true: "verified", false: "not verified"}[s.VerifySSL])
	writeVerification(w, x, now)
	if !s.ContextID.IsZero() {
		line(w, "Context", "%s", s.ContextID)
	}
	line(w, "Made", "%s", when(s.CreatedAt, now))
	line(w, "Changed", "%s", when(s.UpdatedAt, now))
	for i := range x.Recoveries {
		line(w, "Recovery", "%s", recoveryText(&x.Recoveries[i], now))
	}
}

func secondSecret(s *desk.Settings, now time.Time) string {
	switch {
	case !s.SecondSecret:
		return ""
	case s.SecondSecretUntil.IsZero():
		return ", with a second secret"
	case s.SecondSecretUntil.Before(now):
		return ", with a second secret that has expired"
	}
	return ", with a second secret until " + when(s.SecondSecretUntil, now)
}

func recoveryText(r *desk.Recovery, now time.Time) string {
	text := fmt.Sprintf("%d, since %s, asked for %s: ", r.ID, timeText(r.Since), relative(r.RequestedAt.Time, now))
	switch {
	case r.Error != "":
		text += "failed: " + plain(r.Error)
	case !r.DoneAt.IsZero():
		text += "done"
	case r.Begun:
		text += "under way"
	default:
		text += "not begun"
	}
	return text + fmt.Sprintf(", %d events looked at, %d deliveries queued", r.Scanned, r.Queued)
}

func writeSubscriptions(w *tabwriter.Writer, list []desk.Subscription) {
	_ = w.Flush() // the columns begin anew; a fault comes up again at the end
	if len(list) == 0 {
		say(w, "\nIt has no subscriptions: no event goes there.\n")
		return
	}
	say(w, "\nSUBSCRIPTION\tEVENT TYPE\tACTIVE\tCONTEXT\tFILTER\n")
	for _, s := range list {
		context := "any"
		if !s.ContextID.IsZero() {
			context = s.ContextID.String()
		}
		say(w, "%s\t%s\t%t\t%s\t%s\n", s.ID, short(cmp.Or(s.EventType, "-"), 60), s.Active && s.Fault == "", context, cmp.Or(short(s.Filter, 100), "-"))
	}
	_ = w.Flush()
	for _, s := range list {
		if s.Fault != "" {
			say(w, "\nSubscription %s cannot be used: %s\n", s.ID, plain(s.Fault))
		}
	}
}

func (a *app) endpointsPauseCommand() *cobra.Command {
	var q inquiry
	var reason string
	cmd := &cobra.Command{
		Use:   "pause ENDPOINT",
		Short: "Hold an endpoint's deliveries back; nothing is lost",
		Long: `Hold an endpoint's deliveries back: they wait until it is resumed. One that is disabled or inactive
gets no deliveries that could wait, and cannot be paused.`,
		Example: `  outbox-relay endpoints pause -t acme 0190c2f6-0000-7000-8000-000000000001 --reason 'they move house until Monday'`,
		Args:    oneID("endpoint"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				paused, err := d.Pause(ctx, argument(args), reason)
				if err != nil {
					return err
				}
				return a.done(&q, paused, "The endpoint is paused; its events wait until: outbox-relay endpoints resume -t "+d.Tenant()+" "+args[0],
					"The endpoint was paused already.")
			})
		},
	}
	q.addTo(cmd)
	cmd.Flags().StringVar(&reason, "reason", "", "`TEXT` that endpoints list and show tell")
	return cmd
}

func (a *app) endpointsResumeCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "resume ENDPOINT",
		Short: "Let an endpoint go on that was paused, disabled or deactivated",
		Long: `Let an endpoint go on that was paused, disabled or deactivated. What has waited meanwhile becomes
due, and is sent within the endpoint's limits. Events that were committed while it was disabled or
inactive have not waited: endpoints recover queues them.`,
		Example: `  outbox-relay endpoints resume -t acme 0190c2f6-0000-7000-8000-000000000001`,
		Args:    oneID("endpoint"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, _ *config) error {
				resumed, err := d.Resume(ctx, argument(args))
				if err != nil {
					return err
				}
				return a.done(&q, resumed, "The endpoint takes deliveries again. If it was disabled or inactive, queue what it missed: outbox-relay endpoints recover -t "+
					d.Tenant()+" "+args[0]+" --since TIME", "The endpoint took deliveries already; what was parked for it is due.")
			})
		},
	}
	q.addTo(cmd)
	return cmd
}

func (a *app) endpointsTestCommand() *cobra.Command {
	var q inquiry
	cmd := &cobra.Command{
		Use:   "test ENDPOINT",
		Short: "Send one signed test event to an endpoint, now, from here",
		Long: `Send one signed event of type ` + desk.TestEvent + ` to an endpoint, also to one that is paused
or not active, and say what came of it. It goes out from this machine with the configured network
policy, past the relay: nothing is recorded, no retry follows, no limit of the endpoint counts.

The exit code is 1 if the receiver does not accept it.`,
		Example: `  outbox-relay endpoints test -t acme 0190c2f6-0000-7000-8000-000000000001`,
		Args:    oneID("endpoint"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, c *config) error {
				return a.probe(ctx, &q, d, c, argument(args))
			})
		},
	}
	q.addTo(cmd)
	return cmd
}

func (a *app) probe(ctx context.Context, q *inquiry, d *desk.Desk, c *config, id outbox.UUID) error {
	rows, err := d.Rows(ctx)
	if err != nil {
		return err
	}
	table := rows.Routing(c.EndpointDefaults())
	row, ok := table.EndpointRow(id)
	if !ok {
		_, err := d.Endpoint(ctx, rows, table, id) // says what the id is instead
		return cmp.Or(err, errors.New("the endpoint has just come into being: try again"))
	}
	client, err := delivery.NewClient(c.ClientConfig(version()), nil, slog.New(slog.DiscardHandler)) //nolint:contextcheck // it lives until Close
	if err != nil {
		return err
	}
	defer client.Close()
	defaults := c.EndpointDefaults()
	defaults.Tenant = d.Tenant()
	p, err := desk.Probe(ctx, client, row, defaults, c.Delivery.Source)
	if err != nil {
		return err
	}
	err = a.print(q, p, func(w *tabwriter.Writer) {
		line(w, "Sent", "event %s to %s", p.EventID, plain(p.URL))
		line(w, "Result", "%s%s after %v", p.Class, suffixIf(p.Status > 0, fmt.Sprintf(", status %d,", p.Status)), time.Duration(p.TookMS)*time.Millisecond)
		line(w, "Error", "%s", plain(p.Error))
		line(w, "Answer", "%s", short(p.Answer, 500))
		line(w, "Hint", "%s", p.Hint)
	})
	if err == nil && !p.Delivered {
		return errFailed
	}
	return err
}

func (a *app) endpointsRecoverCommand() *cobra.Command {
	var q inquiry
	r := recovery{wait: true}
	cmd := &cobra.Command{
		Use:   "recover ENDPOINT --since TIME|EVENT",
		Short: "Queue what an endpoint missed since a time or an event",
		Long: `Queue every event since a time, or since an event, that matches the endpoint's subscriptions as they
are now and has no delivery to it yet: what it missed while it was disabled, or from before it was
there. Nothing is sent twice; what has a delivery, dead letters included, is left alone. Deliveries
older than retention.deliveries are gone: going back further than that would send again what was
delivered then, and needs --yes.

The relay that leads does the work. Interrupting the command does not stop it: endpoints show tells
how far it is.`,
		Example: `  outbox-relay endpoints recover -t acme 0190c2f6-0000-7000-8000-000000000001 --since 2d
  outbox-relay endpoints recover -t acme 0190c2f6-0000-7000-8000-000000000001 --since 2026-11-01T00:00:00Z --rate 50
  outbox-relay endpoints recover -t acme 0190c2f6-0000-7000-8000-000000000001 --since 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11`,
		Args: oneID("endpoint"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.since == (moment{}) && r.event.IsZero() {
				return usage("say since when: --since with a time (%s) or the id of an event", momentHelp)
			}
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, c *config) error {
				if err := r.check(ctx, d, c.Retention.Deliveries); err != nil {
					return err
				}
				return a.recover(ctx, &q, d, argument(args), &r)
			})
		},
	}
	q.addTo(cmd)
	flags := cmd.Flags()
	flags.Var(&textFlag{"TIME|EVENT", "", func(text string) (err error) {
		if id, notID := outbox.ParseUUID(text); notID == nil {
			r.event, r.since = id, moment{}
			return nil
		}
		r.event = outbox.UUID{}
		r.since, err = parseMoment(text)
		return err
	}}, "since", "from this `TIME|EVENT` on: "+momentHelp+", or an event's id")
	flags.Var(rateFlag(&r.rate), "rate", "let `N` deliveries become due each second; all at once unless given")
	flags.BoolVar(&r.wait, "wait", true, "wait until it is done and show how far it is")
	flags.BoolVarP(&r.yes, "yes", "y", false, "also further back than retention.deliveries")
	return cmd
}

// recovery is what endpoints recover was told.
type recovery struct {
	since moment
	event outbox.UUID
	rate  float64
	wait  bool
	yes   bool
}

// check refuses what would send again what nobody missed.
func (r *recovery) check(ctx context.Context, d *desk.Desk, kept time.Duration) error {
	if r.yes {
		return nil
	}
	since := r.since.from(d.Now())
	if !r.event.IsZero() {
		e, err := d.Event(ctx, r.event, false)
		if err != nil || e.Gone {
			return err // of one that is gone there is no time to go back to, as Recover says
		}
		since = e.OccurredAt.Time
	}
	return beyondRetention(since, d.Now(), kept)
}

// How often to ask how far a recovery is, and after how long to wonder why it does not begin.
const (
	recoveryPoll     = 500 * time.Millisecond
	recoveryPatience = 10 * time.Second
)

func (a *app) recover(ctx context.Context, q *inquiry, d *desk.Desk, endpoint outbox.UUID, o *recovery) error {
	number, err := d.Recover(ctx, endpoint, o.since.from(d.Now()), o.event, o.rate)
	if err != nil {
		return err
	}
	r, err := d.Recovery(ctx, number)
	if err != nil {
		return err
	}
	shown := progressLine{app: a}
	wondered := time.Now().Add(recoveryPatience)
	poll := time.NewTicker(recoveryPoll)
	defer poll.Stop()
	for o.wait && r.DoneAt.IsZero() && r.Error == "" {
		select {
		case <-ctx.Done():
			shown.end()
			say(a.err, "Recovery %d goes on without this command: outbox-relay endpoints show -t %s %s tells how far it is\n", number, d.Tenant(), endpoint)
			return errFailed
		case <-poll.C:
		}
		if r, err = d.Recovery(ctx, number); err != nil {
			if ctx.Err() != nil {
				continue
			}
			return err
		}
		if !r.Begun && time.Now().After(wondered) {
			shown.end()
			say(a.err, "No relay has begun with it yet. Is one running? Otherwise it begins when one does.\n")
			wondered = time.Now().Add(time.Minute)
		}
		if r.Begun {
			shown.show("%d events looked at, %d deliveries queued", r.Scanned, r.Queued)
		}
	}
	shown.end()
	err = a.print(q, r, func(w *tabwriter.Writer) { say(w, "Recovery %s\n", recoveryText(r, time.Now())) })
	if err == nil && r.Error != "" {
		return errFailed
	}
	return err
}
