package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/schema"
)

func (a *app) migrateCommand() *cobra.Command {
	var onlyPrint bool
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "Bring the database up to date: schema outbox_relay, publications, slot, tenants",
		Long: `Create or update what the relay needs in the database: the schema outbox_relay, the role
outbox_relay_runner, two publications and the replication slot database.slot, with database.shards
one for each shard; then every registered tenant. Slots of shards that are not configured any more
are dropped, once all tenants have been moved away from them. It may be repeated, and run while
relays work. Of several databases each has its turn.

The role of database.url needs CREATE on the database, CREATEROLE (once), REPLICATION and the
ownership of the tenants' tables. The relay itself does not: let it log in as a role of its own,
made by
  CREATE ROLE relay LOGIN REPLICATION PASSWORD '...' IN ROLE outbox_relay_runner;

Creating the slot waits for the transactions that are open in the database at that moment.`,
		Example: `  outbox-relay migrate --database-url postgres://owner@db/app
  outbox-relay migrate --print > outbox-relay.sql   # for a DBA to run in psql; needs no database`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if onlyPrint {
				return a.printMigration(cmd)
			}
			c, err := a.load(cmd)
			if err != nil {
				return err
			}
			return a.inEach(cmd.Context(), &c, true, func(one *config) error { return a.migrate(cmd.Context(), one) })
		},
	}
	cmd.Flags().BoolVar(&onlyPrint, "print", false, "print the SQL instead of running it")
	return cmd
}

func (a *app) migrate(ctx context.Context, c *config) error {
	if err := reach(ctx, c); err != nil {
		return err
	}
	if err := schema.Migrate(ctx, c.Database.URL, schema.Options{Slot: c.Database.Slot, Shards: c.Database.Shards, Progress: a.progress}); err != nil {
		return err
	}
	say(a.out, "The database is up to date. Next: outbox-relay tenants add SCHEMA, or outbox-relay run\n")
	return nil
}

// printMigration needs the name of the slot and no database.
func (a *app) printMigration(cmd *cobra.Command) error {
	c, err := a.load(cmd)
	for _, one := range c.each() {
		if faults, ok := errors.AsType[*configError](err); ok && one.Database.URL == "" {
			err = faults.without(one.key("url"), one.key("url_file"), one.key("replication_url_file"))
		}
	}
	if err != nil {
		return err
	}
	one, err := a.pick(&c)
	if err != nil {
		return err
	}
	return schema.Print(a.out, schema.Options{Slot: one.Database.Slot, Shards: one.Database.Shards})
}

// progress tells a person what takes its time.
func (a *app) progress(step string) { say(a.out, "… %s\n", step) }
