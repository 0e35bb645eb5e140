package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// verifyAtOnce is how many receivers endpoints verify --all asks at once.
const verifyAtOnce = 16

func (a *app) endpointsVerifyCommand() *cobra.Command {
	var q inquiry
	var method string
	var all bool
	cmd := &cobra.Command{
		Use:   "verify ENDPOINT|--all",
		Short: "Ask an endpoint's receiver now, from here, and mark the endpoint as verified if it agrees",
		Long: `Ask an endpoint's receiver once whether it wants what is sent there, and set is_verified and
verified_at if it does. It is asked as verification.method says, or --method:

  head        it answers a HEAD request with 2xx
  challenge   it sends back the challenge that is in a signed event of type
              ` + delivery.VerifyEvent + `

The request goes out from this machine, with the configured network policy. A failure changes
nothing but what endpoints show tells. Events of types that require verification, committed before,
have no delivery: endpoints recover queues them.

The exit code is 1 if an endpoint was not verified.`,
		Example: `  outbox-relay endpoints verify -t acme 0190c2f6-0000-7000-8000-000000000001
  outbox-relay endpoints verify -t acme --all --method head`,
		Args: func(cmd *cobra.Command, args []string) error {
			if all && len(args) == 0 {
				return nil
			}
			if all {
				return usage("name an endpoint, or say --all: one of the two")
			}
			return oneID("endpoint")(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.atDesk(cmd, &q, func(ctx context.Context, d *desk.Desk, c *config) error {
				if method == "" {
					method = c.Verification.Method
				}
				if method == delivery.VerifyNone {
					return usage("verification.method is none: say how, --method %s", choice(relay.VerificationMethods()))
				}
				if all {
					ids, err := d.Unverified(ctx)
					if err != nil {
						return err
					}
					return a.verify(ctx, &q, d, c, method, ids)
				}
				return a.verify(ctx, &q, d, c, method, []outbox.UUID{argument(args)})
			})
		},
	}
	q.addTo(cmd)
	cmd.Flags().Var(oneOf(&method, "METHOD", relay.VerificationMethods()...), "method", "`METHOD`: head or challenge; what is configured unless given")
	cmd.Flags().BoolVar(&all, "all", false, "all active endpoints of the tenant that are not verified")
	return cmd
}

func (a *app) verify(ctx context.Context, q *inquiry, d *desk.Desk, c *config, method string, ids []outbox.UUID) error {
	rows, err := d.Rows(ctx)
	if err != nil {
		return err
	}
	table := rows.Routing(c.EndpointDefaults())
	client, err := delivery.NewClient(c.ClientConfig(version()), nil, slog.New(slog.DiscardHandler)) //nolint:contextcheck // it lives until Close
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := store.New(ctx, store.Config{
		URL: c.Database.URL, MaxConns: 2, ConnectTimeout: c.Database.ConnectTimeout, Slot: c.Database.Slot, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	defer s.Close()
	v := desk.Verifier{Client: client, Store: s, Tenant: d.Tenant(), Defaults: c.EndpointDefaults(), Method: method, Source: c.Delivery.Source}
	list := make([]*desk.VerifyResult, len(ids))
	group, asking := errgroup.WithContext(ctx)
	group.SetLimit(verifyAtOnce)
	for i, id := range ids {
		row, ok := table.EndpointRow(id)
		if !ok {
			if _, err = d.Endpoint(ctx, rows, table, id); err == nil { // else it says what the id is instead
				err = errors.New("the endpoint has just come into being: try again")
			}
			break
		}
		group.Go(func() (err error) {
			list[i], err = v.Verify(asking, row)
			return err
		})
	}
	if err := errors.Join(err, group.Wait()); err != nil {
		return d.Fault("verify endpoint", err)
	}
	failed := false
	for _, r := range list {
		failed = failed || !r.Verified
	}
	err = a.print(q, list, func(w *tabwriter.Writer) { writeVerified(w, list, d) })
	if err == nil && failed {
		return errFailed
	}
	return err
}

func writeVerified(w *tabwriter.Writer, list []*desk.VerifyResult, d *desk.Desk) {
	if len(list) == 0 {
		say(w, "All active endpoints of tenant %s are verified.\n", d.Tenant())
	}
	for i, r := range list {
		if i > 0 {
			_ = w.Flush() // a fault comes up again at the end
			say(w, "\n")
		}
		line(w, "Endpoint", "%s", r.EndpointID)
		line(w, "Asked", "%s", plain(r.URL))
		line(w, "Result", "%s%s after %v", map[bool]string{true: "verified", false: "not verified"}[r.Verified],
			suffixIf(r.Status > 0, fmt.Sprintf(", status %d,", r.Status)), time.Duration(r.TookMS)*time.Millisecond)
		line(w, "Error", "%s", plain(r.Error))
		line(w, "Answer", "%s", short(r.Answer, 500))
		line(w, "Hint", "%s", r.Hint)
	}
}

// writeVerification is the part of endpoints show.
func writeVerification(w io.Writer, x *desk.EndpointDetail, now time.Time) {
	v := &x.Verification
	switch {
	case v.OtherURL:
		line(w, "Verified", "no, only with another URL: types that require it are not sent, where verification.method is not none")
	case x.Settings.Verified:
		line(w, "Verified", "yes%s", suffixIf(!v.VerifiedAt.IsZero(), ", "+when(v.VerifiedAt, now)))
	default:
		line(w, "Verified", "no: types that require it are not sent")
	}
	if v.Error == "" {
		return
	}
	text := when(v.TriedAt, now) + ": " + plain(v.Error)
	switch {
	case !v.NextAt.IsZero():
		text += "; the next try is " + relative(v.NextAt.Time, now)
	case v.Tries > 0 && !x.Settings.Verified:
		text += fmt.Sprintf("; given up after %d tries", v.Tries)
	}
	line(w, "Last try", "%s", text)
}
