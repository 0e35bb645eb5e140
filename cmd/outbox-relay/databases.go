package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

// What commands do where the configuration has several databases: most work on one of them, some on each in turn.

// onDatabase lets a command, and those below it, be told which database it is for.
func (a *app) onDatabase(cmd *cobra.Command) *cobra.Command {
	cmd.PersistentFlags().StringVar(&a.database, "database", "", "work on the database of this `NAME` in the list databases")
	return cmd
}

// pick returns the configuration of the database that --database names, or of the only one.
func (a *app) pick(c *config) (config, error) {
	switch {
	case a.database == "" && len(c.Databases) > 1:
		return *c, usage("there are several databases: name one with --database: %s", strings.Join(c.names(), ", "))
	case a.database == "":
		return *c.each()[0], nil
	case len(c.Databases) == 0:
		return *c, usage("--database %q: the configuration has no list of databases, but one without a name", a.database)
	}
	for _, one := range c.each() {
		if one.name == a.database {
			return *one, nil
		}
	}
	return *c, usage("--database %q: is none of the databases: %s", a.database, strings.Join(c.names(), ", "))
}

// loadOne reads the configuration for a command that works on one database.
func (a *app) loadOne(cmd *cobra.Command) (config, error) {
	c, err := a.load(cmd)
	if err != nil {
		return c, err
	}
	return a.pick(&c)
}

// inEach runs f for the database that --database names, or else for each in turn, under a heading unless that would be in the way. One that fails does
// not keep the others from their turn.
func (a *app) inEach(ctx context.Context, c *config, heading bool, f func(one *config) error) error {
	if a.database != "" || len(c.Databases) < 2 {
		one, err := a.pick(c)
		if err != nil {
			return err
		}
		return f(&one)
	}
	failed := false
	for _, one := range c.each() {
		if heading {
			say(a.out, "database %s\n", one.name)
		}
		err := f(one)
		if ctx.Err() != nil {
			return cmp.Or(err, ctx.Err())
		}
		if err != nil {
			failed = true
			a.complain(one.named(err))
		}
	}
	if failed {
		return errFailed
	}
	return nil
}

// named says of which database an error is, where there are several.
func (c *config) named(err error) error {
	if c.name == "" || errors.Is(err, errFailed) {
		return err
	}
	return fmt.Errorf("database %s: %w", c.name, err)
}
