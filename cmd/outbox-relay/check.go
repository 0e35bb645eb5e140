package main

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/schema/guest"
)

func (a *app) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Check every fact the relay needs, and say what to do about what is missing",
		Long: `Check every fact the relay needs, a line each:

  ok    as it should be
  warn  the relay works, but somebody should know
  FAIL  the relay, or a tenant, does not work until this is mended

What to do stands behind the arrow. Nothing is changed. The exit code is 1 if anything fails. Of
several databases each has its turn.

Run it with the role the relay logs in with: it is that role's rights that are checked.`,
		Example: `  outbox-relay check --config /etc/outbox-relay/config.yaml
  outbox-relay check | grep -v '^ok'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.load(cmd)
			if err != nil {
				return err
			}
			seen := make(map[string]string)
			return a.inEach(cmd.Context(), &c, true, func(one *config) error {
				k := checker{config: one, out: a.out, seen: seen}
				if err := k.check(cmd.Context()); err != nil {
					return err
				}
				if k.failed > 0 {
					say(a.err, "%d failed\n", k.failed)
					return errFailed
				}
				return nil
			})
		},
	}
}

var databaseKeys = regexp.MustCompile(`\bdatabase\.(url|url_file|replication_url|replication_url_file|slot|shards|instance_id|max_connections|connect_timeout|wal_budget)\b`)

// checker prints what it finds as it goes.
type checker struct {
	config *config
	out    io.Writer
	failed int
	seen   map[string]string // databases by cluster and name, with what they are called in the configuration

	conn     *guest.Conn
	settings map[string]string // of the server
	systemID string            // of the server behind database.url
	database string            // as the server calls it: database.url may leave it out, or name what a pooler calls it
	sender   string            // the server process that the replication connection of this check had, and that may end a moment after it; empty: it had none
}

func (k *checker) print(grade, fact, finding, remedy string) {
	line := fmt.Sprintf("%-4s  %s: %s", grade, fact, finding)
	if remedy != "" {
		line += " → " + remedy
	}
	if k.config.name != "" { // keys of the section database are here those of an entry
		line = databaseKeys.ReplaceAllString(line, k.config.key("$1"))
	}
	say(k.out, "%s\n", strings.ReplaceAll(line, "\n", "; "))
}

func (k *checker) ok(fact, format string, args ...any) {
	k.print("ok", fact, fmt.Sprintf(format, args...), "")
}

func (k *checker) warn(fact, finding, remedy string) { k.print("warn", fact, finding, remedy) }

func (k *checker) fail(fact, finding, remedy string) {
	k.failed++
	k.print("FAIL", fact, finding, remedy)
}

// failError reports an error with the hint it carries, if any.
func (k *checker) failError(fact string, err error) {
	k.fail(fact, err.Error(), hintOf(err))
}

// fact is one thing to look at. An error means that it could not be looked at.
type fact struct {
	name string
	look func(ctx context.Context) error
}

// check looks at one thing after the other. The error is that of a check that was broken off, not of anything found.
func (k *checker) check(ctx context.Context) error {
	c := k.config.Database
	conn, err := dial(ctx, k.config.urlKey(), c.URL, c.ConnectTimeout, nil)
	if err != nil {
		k.failError("database", err)
		return ctx.Err()
	}
	k.conn = lent(conn)
	defer func() { _ = hangUp(ctx, conn) }() // everything has been read
	facts := []fact{
		{"database", k.server},
		{"pooler", k.pooler},
		{"wal_level", k.walLevel},
		{"server_encoding", k.encoding},
		{"replication", k.replication},
		{"replication slots", k.slotsLeft},
		{"WAL senders", k.sendersLeft},
		{"durability", k.durability},
		{"synchronous standby", k.synchronous},
		{"clock", k.clock},
		{"client certificates", k.certificates},
		{"validation", k.validation},
		{"schema outbox_relay", k.installed},
	}
	installed := []fact{
		{"publications", k.publications},
		{"progress", k.progresses}, // before anything to be made for a slot: this may be a copy
		{"slot", k.slots},
		{"role", k.role},
		{"tenants", k.tenants},
	}
	for _, f := range facts {
		k.look(ctx, f)
	}
	var there bool
	if err := k.conn.QueryRow(ctx, "SELECT to_regclass('outbox_relay.tenants') IS NOT NULL").Scan(&there); err != nil || !there {
		return ctx.Err() // said by installed
	}
	for _, f := range installed {
		k.look(ctx, f)
	}
	return ctx.Err()
}

func (k *checker) look(ctx context.Context, f fact) {
	if err := f.look(ctx); err != nil && ctx.Err() == nil {
		k.fail(f.name, "could not be examined: "+err.Error(), hintOf(err))
	}
}
