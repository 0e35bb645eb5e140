package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/seal"
)

func (a *app) secretsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "secrets",
		Short: "Seal the secrets of endpoints, make keys for it",
		Long: `A secret of an endpoint may be stored plain or sealed: encrypted with a key that the database does
not hold, for that endpoint of that tenant. The keys are those of secrets.keys.`,
		RunE: subcommandMissing,
	}
	cmd.AddCommand(a.secretsSealCommand(), a.secretsNewKeyCommand())
	return cmd
}

func (a *app) secretsNewKeyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "new-key",
		Short: "Print a new key for secrets.keys",
		Long: `Print a new key: 32 random bytes in base64. Put it into a file that only the relay can read, or into
a variable of its environment, and name that in secrets.keys. Keep a copy where the backups of the
database are not: without the key nobody can read what it has sealed.`,
		Example: `  (umask 077; outbox-relay secrets new-key > /etc/outbox-relay/key-2026)`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(a.out, seal.NewKey())
			return err
		},
	}
}

func (a *app) secretsSealCommand() *cobra.Command {
	var q inquiry
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "seal",
		Short: "Seal plain secrets, and seal anew what an older key has sealed",
		Long: `Seal the secrets of all endpoints, or of those of one tenant, with the first of secrets.keys: plain
ones, and those that another key has sealed. It works in small transactions while relays run, may be
interrupted and repeated. What cannot be opened stays as it is and is listed; the exit code is then 1.

Every relay needs the key before anything is sealed with it. So a key is changed in three steps: add
the new one at the end of secrets.keys everywhere; make it the first one everywhere, and run this;
then drop the old one.

It needs UPDATE on the endpoints' secrets, which the role of the running relay does not have: use
the role that owns the tenants' tables. Not a superuser, where tenants own them or may put triggers
on them: these would run with its rights.`,
		Example: `  outbox-relay secrets seal --dry-run
  outbox-relay secrets seal -t acme`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.loadOne(cmd)
			if err != nil {
				return err
			}
			return withDatabase(cmd.Context(), &c, func(conn *pgx.Conn) error { return a.seal(cmd.Context(), &q, conn, &c, dryRun) })
		},
	}
	q.addTo(cmd)
	cmd.Flag("tenant").Usage = "only those of this tenant, by its `SCHEMA`"
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say how many there are")
	return cmd
}

// sealBatch is how many endpoints go into one transaction.
const sealBatch = 100

// sealing is the work of secrets seal, and what has come of it.
type sealing struct {
	Key     string           `json:"key"`
	Tenants []*tenantSealing `json:"tenants"`

	keys *seal.Ring
}

// tenantSealing counts the secrets of a tenant as they were before.
type tenantSealing struct {
	Tenant string `json:"tenant"`
	desk.SecretCount
	Sealed int64            `json:"sealed"`
	Faults []desk.SealFault `json:"faults,omitempty"`

	desk  *desk.Desk
	after outbox.UUID // the last endpoint that was looked at
	done  bool
}

func (a *app) seal(ctx context.Context, q *inquiry, conn *pgx.Conn, c *config, dryRun bool) error {
	keys, err := c.Secrets.Ring()
	if err != nil {
		return err
	}
	if keys.Empty() {
		return hinted{errors.New("there is no key to seal with"), "make one with outbox-relay secrets new-key, and name it in secrets.keys"}
	}
	names := []string{q.tenant}
	if q.tenant == "" {
		if names, err = desk.Tenants(ctx, conn); err != nil {
			return err
		}
	}
	s := &sealing{Key: keys.First(), Tenants: []*tenantSealing{}, keys: keys}
	p := &plan{}
	failed := false
	for _, name := range names {
		t, err := s.add(ctx, conn, name, c.Database.Slot)
		if ctx.Err() != nil || err != nil && q.tenant != "" {
			return cmp.Or(err, ctx.Err()) // interrupted between two statements, it has failed all the same
		}
		if err != nil { // the others have their turn all the same
			failed = true
			a.complain(fmt.Errorf("tenant %s: %w", name, err))
			continue
		}
		p.N += t.Plain + t.Older
	}
	if !dryRun && p.N > 0 {
		if err := a.inBatches(ctx, p, "sealed", s.batch); err != nil {
			return err
		}
	}
	for _, t := range s.Tenants {
		failed = failed || len(t.Faults) > 0
	}
	err = a.print(q, s, func(w *tabwriter.Writer) { s.write(w, dryRun) })
	if err == nil && failed {
		return errFailed
	}
	return err
}

// add looks what there is to do for a tenant.
func (s *sealing) add(ctx context.Context, conn *pgx.Conn, name, slot string) (*tenantSealing, error) {
	d, err := desk.Open(ctx, conn, name, slot)
	if err != nil {
		return nil, err
	}
	t := &tenantSealing{Tenant: name, desk: d}
	if t.SecretCount, err = d.CountSecrets(ctx, s.keys); err != nil {
		return nil, err
	}
	s.Tenants = append(s.Tenants, t)
	return t, nil
}

// batch seals some secrets of one tenant, and says how many it looked at.
func (s *sealing) batch(ctx context.Context) (int64, time.Duration, error) {
	for _, t := range s.Tenants {
		for !t.done {
			done, err := t.desk.SealSecrets(ctx, s.keys, t.after, sealBatch)
			if err != nil {
				return 0, 0, fmt.Errorf("tenant %s: %w", t.Tenant, err)
			}
			t.after, t.done = done.Last, done.Last.IsZero()
			t.Sealed += done.Sealed
			t.Faults = append(t.Faults, done.Faults...)
			if n := done.Sealed + int64(len(done.Faults)); n > 0 {
				return n, 0, nil
			}
		}
	}
	return 0, 0, nil
}

func (s *sealing) write(w io.Writer, dryRun bool) {
	if len(s.Tenants) == 0 {
		say(w, "No tenants yet: there is nothing to seal.\n")
		return
	}
	say(w, "TENANT\tPLAIN\tOLDER KEY\tKEY %s\t%s\n", s.Key, suffixIf(!dryRun, "SEALED NOW"))
	var sealed int64
	for _, t := range s.Tenants {
		say(w, "%s\t%d\t%d\t%d\t%s\n", plain(t.Tenant), t.Plain, t.Older, t.Current, suffixIf(!dryRun, fmt.Sprint(t.Sealed)))
		sealed += t.Sealed
	}
	for _, t := range s.Tenants {
		for _, f := range t.Faults {
			say(w, "not sealed: tenant %s, endpoint %s: %s %s\n", plain(t.Tenant), f.EndpointID, f.Column, f.Why)
		}
	}
	if !dryRun {
		say(w, "%s sealed with the key %s\n", plural(sealed, "secret is", "secrets are"), s.Key)
	}
}
