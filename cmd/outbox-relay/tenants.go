package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/schema"
)

func (a *app) tenantsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tenants",
		Short: "List, add, remove, pause, resume and move tenants",
		Long: `A tenant is a schema whose webhook_events the relay delivers. Running relays follow every change at
once, without a restart.

Provisioning code does the same in the transaction that creates the schema: SELECT
outbox_relay.add_tenant('schema').`,
		RunE: subcommandMissing,
	}
	cmd.AddCommand(a.tenantsListCommand(), a.tenantsAddCommand(), a.tenantsRemoveCommand(), a.tenantsPauseCommand(), a.tenantsResumeCommand(), a.tenantsMoveCommand())
	return cmd
}

// oneSchema checks the arguments of the commands for one tenant.
func oneSchema(_ *cobra.Command, args []string) error {
	switch {
	case len(args) != 1:
		return usage("name one schema, not %d", len(args))
	case args[0] == "":
		return usage("the name of the schema is empty: name one, such as acme")
	}
	return nil
}

func (a *app) tenantsAddCommand() *cobra.Command {
	var unprocessed, yes bool
	var since moment
	cmd := &cobra.Command{
		Use:   "add SCHEMA",
		Short: "Make a schema a tenant: create or adopt its tables, then deliver its events",
		Long: `Make a schema a tenant. Tables it lacks are created; those it has are adopted: columns and indexes
are added, the foreign keys from deliveries to events and endpoints go, nothing is rewritten, and no
lock blocks writers for more than a second. Repeating it does no harm.

Every event committed after it is delivered. Events from before are not, unless --unprocessed or
--since queues them, once. For a schema that has been a tenant before, going back further than
retention.deliveries needs --yes: what was delivered before that would be sent again, with
--unprocessed too, since the relay leaves processed_at as it is.

The role of database.url must own the schema and its tables.`,
		Example: `  outbox-relay tenants add acme
  outbox-relay tenants add acme --unprocessed   # also rows that a polling dispatcher left
  outbox-relay tenants add acme --since 2026-11-01T00:00:00Z
  outbox-relay tenants add acme --since 2d`,
		Args: oneSchema,
		RunE: func(cmd *cobra.Command, args []string) error {
			if since != (moment{}) && unprocessed {
				return usage("--unprocessed and --since exclude each other")
			}
			options := schema.AddOptions{Unprocessed: unprocessed, Since: since.from(time.Now()), Progress: a.progress}
			c, err := a.loadAndReach(cmd)
			if err != nil {
				return err
			}
			if !yes {
				if err := checkBackfill(cmd.Context(), &c, args[0], options); err != nil {
					return err
				}
			}
			if err := schema.AddTenant(cmd.Context(), c.Database.URL, args[0], options); err != nil {
				return err
			}
			say(a.out, "%s is a tenant\n", args[0])
			if !c.Tenants.Includes(args[0]) {
				say(a.out, "Note that tenants.include does not name it: relays with this configuration leave it alone.\n")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&unprocessed, "unprocessed", false, "also deliver the events whose processed_at is null")
	cmd.Flags().Var(timeFlag(&since), "since", "also deliver events since this `TIME`: "+momentHelp)
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "also further back than retention.deliveries")
	return cmd
}

// checkBackfill refuses to go back further than deliveries are kept for a schema that has been a tenant before, as a column of its table tells: from any
// other the relay has delivered nothing yet. The relay leaves processed_at alone, so what it delivered is unprocessed for ever.
func checkBackfill(ctx context.Context, c *config, tenant string, o schema.AddOptions) error {
	kept := c.Retention.Deliveries
	if kept == 0 || !o.Unprocessed && o.Since.IsZero() {
		return nil
	}
	now := time.Now()
	return withDatabase(ctx, c, func(conn *pgx.Conn) error {
		var before bool
		err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class r ON r.oid = a.attrelid
			JOIN pg_catalog.pg_namespace n ON n.oid = r.relnamespace
			WHERE n.nspname = $1::text AND r.relname = 'webhook_deliveries' AND a.attname = 'relayed' AND NOT a.attisdropped)`, tenant).Scan(&before)
		if err != nil || !before {
			return err
		}
		if !o.Unprocessed {
			return beyondRetention(o.Since, now, kept)
		}
		var oldest time.Time
		err = lent(conn).QueryRow(ctx, `SELECT greatest(occurred_at, '0001-01-01 00:00:00+00') FROM `+pgx.Identifier{tenant, "webhook_events"}.Sanitize()+`
			WHERE processed_at IS NULL AND occurred_at < $1::timestamptz LIMIT 1`, now.Add(-kept)).Scan(&oldest)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		return fmt.Errorf("an event whose processed_at is null: %w", beyondRetention(oldest, now, kept))
	})
}

func (a *app) tenantsRemoveCommand() *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "remove SCHEMA",
		Short: "End the deliveries of a tenant; its tables and rows stay",
		Long: `End the deliveries of a tenant and forget what it has in the retry queue. Its tables and rows stay,
and the schema may be gone already. Neither what waited nor events committed while a schema is no
tenant are delivered later, unless tenants add --since asks for them.

To hold deliveries back without losing any, pause the tenant instead.`,
		Example: `  outbox-relay tenants remove acme --yes`,
		Args:    oneSchema,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.loadAndReach(cmd)
			if err != nil {
				return err
			}
			if !yes {
				if err := a.ask(cmd.Context(), fmt.Sprintf("Remove tenant %s? What it has queued is forgotten. [y/N] ", args[0]), ""); err != nil {
					return err
				}
			}
			if err := schema.RemoveTenant(cmd.Context(), c.Database.URL, args[0], a.progress); err != nil {
				return err
			}
			say(a.out, "%s is no tenant any more\n", args[0])
			return nil
		},
	}
	cmd.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return cmd
}

// errRefused is for a person who has said no.
var errRefused = errors.New("nothing was changed")

// ask asks a person whether to go on. It is a fault of usage where there is nobody: or says what else there is but --yes.
func (a *app) ask(ctx context.Context, question, or string) error {
	if !terminal(a.in) {
		return usage("there is nobody to ask: say --yes%s", or)
	}
	yes, err := unlessInterrupted(ctx, func() (bool, error) { return a.confirm(question), nil })
	if err != nil {
		say(a.err, "\n")
	}
	if !yes {
		return errRefused
	}
	return nil
}

func (a *app) confirm(question string) bool {
	say(a.err, "%s", question)
	line, err := bufio.NewReader(a.in).ReadString('\n')
	answer := strings.ToLower(strings.TrimSpace(line))
	return err == nil && (answer == "y" || answer == "yes")
}

// unlessInterrupted returns what read does, or errRefused once ctx is cancelled: a person who thinks must not keep an interrupt waiting. What is still being
// read then ends with the process.
func unlessInterrupted[T any](ctx context.Context, read func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := read()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, errRefused
	}
}

func (a *app) tenantsPauseCommand() *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "pause SCHEMA",
		Short: "Hold the deliveries of a tenant back; nothing is lost",
		Long: `Hold the deliveries of a tenant back until tenants resume; nothing is lost. One that is suspended
stays so, and is paused once that is over.`,
		Example: `  outbox-relay tenants pause acme --reason 'receiver is moving, ticket 4711'`,
		Args:    oneSchema,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.loadAndReach(cmd)
			if err != nil {
				return err
			}
			suspended, err := schema.PauseTenant(cmd.Context(), c.Database.URL, args[0], reason, a.progress)
			switch {
			case err != nil:
				return err
			case suspended:
				say(a.out, "%s is suspended, and paused once that is over\n", args[0])
			default:
				say(a.out, "%s is paused\n", args[0])
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "`TEXT` that tenants list and the log show")
	return cmd
}

func (a *app) tenantsResumeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "resume SCHEMA",
		Short: "Let a paused or suspended tenant go on; what it missed is delivered",
		Long: `Let a paused or suspended tenant go on; what it missed is delivered. A running relay tries suspended
ones again by itself. It ends no pause: that is for this command alone.`,
		Example: `  outbox-relay tenants resume acme`,
		Args:    oneSchema,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.loadAndReach(cmd)
			if err != nil {
				return err
			}
			if err := schema.ResumeTenant(cmd.Context(), c.Database.URL, args[0], a.progress); err != nil {
				return err
			}
			say(a.out, "%s is active\n", args[0])
			return nil
		},
	}
}

func (a *app) tenantsMoveCommand() *cobra.Command {
	var shard int
	cmd := &cobra.Command{
		Use:   "move SCHEMA",
		Short: "Move a tenant to another shard, while relays run",
		Long: `Move a tenant to another shard of its database (database.shards): its events are read from the slot
of that one from here on. Nothing is lost, sent twice or reordered by it, and relays need not be told.

Its writers wait for a moment; while a transaction that has written events is open, the command tries
again. New events to endpoints that promise an order wait until the reader of the shard before has
recorded what it read of the tenant; tenants list shows "missed, queued" then. If that reader is away
for long, they wait for long. A tenant that is suspended, or whose earlier events are still being
queued, cannot be moved.`,
		Example: `  outbox-relay tenants move acme --shard 1`,
		Args:    oneSchema,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("shard") {
				return usage("name the shard with --shard")
			}
			c, err := a.loadAndReach(cmd)
			if err != nil {
				return err
			}
			if shard < 0 || shard >= c.Database.Shards {
				return usage("--shard %d: must be 0 to %d, as %s is %d", shard, c.Database.Shards-1, c.key("shards"), c.Database.Shards)
			}
			if err := schema.MoveTenant(cmd.Context(), c.Database.URL, args[0], shard, a.progress); err != nil {
				return err
			}
			say(a.out, "%s is on shard %d\n", args[0], shard)
			return nil
		},
	}
	cmd.Flags().IntVar(&shard, "shard", 0, "`NUMBER` of the shard to move it to, from 0")
	return cmd
}

func (a *app) tenantsListCommand() *cobra.Command {
	output := "table"
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the tenants",
		Example: `  outbox-relay tenants list
  outbox-relay tenants list -o json | jq -r '.[] | select(.state != "active") | .schema'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.loadOne(cmd)
			if err != nil {
				return err
			}
			var tenants []schema.Tenant
			err = withDatabase(cmd.Context(), &c, func(conn *pgx.Conn) (err error) {
				tenants, err = schema.Tenants(cmd.Context(), lent(conn))
				return err
			})
			if err != nil {
				return err
			}
			if output == "json" {
				return writeTenantsJSON(a.out, tenants)
			}
			return writeTenantsTable(a.out, tenants, c.Database.Shards > 1)
		},
	}
	cmd.Flags().VarP(oneOf(&output, "FORM", "table", "json"), "output", "o", "`FORM` of the list: table or json")
	return cmd
}

func writeTenantsTable(w io.Writer, tenants []schema.Tenant, shards bool) error {
	if len(tenants) == 0 {
		_, err := fmt.Fprintln(w, "No tenants yet. Add one: outbox-relay tenants add SCHEMA")
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	column := func(text string) string { return suffixIf(shards, text+"\t") }
	say(table, "SCHEMA\t%sSTATE\tSINCE\tEARLIER EVENTS\tREASON\n", column("SHARD"))
	for _, t := range tenants {
		say(table, "%s\t%s%s\t%s\t%s\t%s%s\n", t.Schema, column(strconv.Itoa(t.Shard)), stateText(t.State, t.Paused), t.Since.UTC().Format(time.RFC3339), backfillText(t),
			cmp.Or(t.Reason, "-"), suffixIf(t.PauseReason != "", "; paused: "+t.PauseReason))
	}
	return table.Flush()
}

func stateText(state string, paused bool) string {
	return state + suffixIf(paused && state != "paused", ", paused")
}

func backfillText(t schema.Tenant) string {
	text := t.Backfill
	switch {
	case text == "":
		return "-"
	case !t.BackfillSince.IsZero():
		text += " " + t.BackfillSince.UTC().Format(time.RFC3339)
	}
	if t.BackfillDoneAt.IsZero() {
		return text + ", under way"
	}
	return text + ", queued"
}

// tenantJSON is what scripts can rely on.
type tenantJSON struct {
	Schema         string     `json:"schema"`
	Shard          int        `json:"shard"`
	State          string     `json:"state"`
	Reason         string     `json:"reason,omitempty"`
	Paused         bool       `json:"paused,omitempty"`       // by an operator, whether it is suspended besides or not
	PauseReason    string     `json:"pause_reason,omitempty"` // where reason is that of the suspension
	Version        int        `json:"version"`
	Since          time.Time  `json:"since"` // of the state
	Added          time.Time  `json:"added_at"`
	Backfill       string     `json:"backfill,omitempty"`
	BackfillSince  *time.Time `json:"backfill_since,omitempty"`
	BackfillDoneAt *time.Time `json:"backfill_done_at,omitempty"`
}

func writeTenantsJSON(w io.Writer, tenants []schema.Tenant) error {
	list := make([]tenantJSON, len(tenants))
	for i := range tenants {
		list[i] = jsonOf(&tenants[i])
	}
	return writeJSON(w, "  ", list)
}

func jsonOf(t *schema.Tenant) tenantJSON {
	return tenantJSON{
		Schema: t.Schema, Shard: t.Shard, State: t.State, Reason: t.Reason, Paused: t.Paused, PauseReason: t.PauseReason, Version: t.Version, Since: t.Since.UTC(), Added: t.Added.UTC(),
		Backfill: t.Backfill, BackfillSince: orNil(t.BackfillSince), BackfillDoneAt: orNil(t.BackfillDoneAt),
	}
}

func orNil(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}
