package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/schema/guest"
)

// connectError is a database that cannot be reached or does not let us in.
type connectError struct {
	key string // of the DSN
	err error
}

func (e *connectError) Error() string { return "connect to the database: " + e.err.Error() }
func (e *connectError) Unwrap() error { return e.err }

// Hint says where to look.
func (e *connectError) Hint() string {
	var server *pgconn.PgError
	var dns *net.DNSError
	switch {
	case errors.As(e.err, &server):
		switch server.Code {
		case "28P01", "28000":
			return fmt.Sprintf("check user and password of %s, and that pg_hba.conf admits this role from this host", e.key)
		case "3D000":
			return fmt.Sprintf("check the name of the database in %s", e.key)
		case "53300":
			return "raise max_connections of the server, or lower database.max_connections of its clients"
		case "57P03":
			return "the server starts up or shuts down: try again in a moment"
		}
	case errors.As(e.err, &dns):
		return fmt.Sprintf("check the host name in %s", e.key)
	}
	return fmt.Sprintf("check host, port and sslmode of %s, that the server runs and that no firewall is in between", e.key)
}

// withHint gives an error of a connection that somebody else made the hint that ours have.
func withHint(key string, err error) error {
	if !errors.As(err, new(*pgconn.ConnectError)) || hintOf(err) != "" {
		return err
	}
	return hinted{err, (&connectError{key, err}).Hint()}
}

// dial opens one connection for a command, which answers within timeout.
func dial(ctx context.Context, key, dsn string, timeout time.Duration, params map[string]string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, &connectError{key, err}
	}
	cfg.ConnectTimeout = timeout
	cfg.RuntimeParams["application_name"] = "outbox-relay"
	maps.Copy(cfg.RuntimeParams, params)
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec // nothing is asked twice; a pooler may be in the way
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, &connectError{key, err}
	}
	// A pooler greets before it has a session of the server.
	asking, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if _, err := conn.Exec(asking, "SELECT 1"); err != nil {
		return nil, &connectError{key, errors.Join(err, hangUp(ctx, conn))}
	}
	return conn, nil
}

// lent is a connection whose times can be read: they come as text, and a role or a database may have another style for them. Nor does the server compile what
// it is asked once: that took it seven seconds for the questions of check, which have their answers after some milliseconds. The session may be a pooler's, and
// stays as it is.
func lent(conn *pgx.Conn) *guest.Conn {
	return guest.New(conn, "BEGIN", "SELECT pg_catalog.set_config('DateStyle', 'ISO', true), pg_catalog.set_config('jit', 'off', true)")
}

// withDatabase runs f with a connection to the database of the configuration.
func withDatabase(ctx context.Context, c *config, f func(conn *pgx.Conn) error) (err error) {
	conn, err := dial(ctx, c.urlKey(), c.Database.URL, c.Database.ConnectTimeout, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hangUp(ctx, conn)) }()
	return f(conn)
}

// loadAndReach reads the configuration and makes sure that the database answers within database.connect_timeout, before a package that has
// no such bound is let loose on it.
func (a *app) loadAndReach(cmd *cobra.Command) (config, error) {
	c, err := a.loadOne(cmd)
	if err != nil {
		return c, err
	}
	return c, reach(cmd.Context(), &c)
}

func reach(ctx context.Context, c *config) error {
	return withDatabase(ctx, c, func(*pgx.Conn) error { return nil })
}

// hangUp says goodbye even when ctx is over.
func hangUp(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	return conn.Close(ctx)
}
