package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

const (
	throwawayConnect = 10 * time.Second // to reach an existing server
	throwawayCleanUp = 30 * time.Second // to remove what was created on it
)

// throwaway is a database that is there for one command, on a server of its own or on one that exists.
type throwaway struct {
	dsn, slot string
	about     string
	pool      *pgxpool.Pool
	remove    func(ctx context.Context) error
}

// openThrowaway starts a server, or makes a database for a purpose on an existing one. What takes long is told to log. The pool has conns connections.
func openThrowaway(ctx context.Context, dsn, purpose string, conns int32, log io.Writer) (*throwaway, error) {
	start := func() (*throwaway, error) { return startThrowaway(ctx, log) }
	if dsn != "" {
		start = func() (*throwaway, error) { return borrowServer(ctx, dsn, "outbox_relay_"+purpose) }
	}
	s, err := start()
	if err != nil {
		return nil, err
	}
	config, err := pgxpool.ParseConfig(s.dsn)
	if err == nil {
		config.MaxConns = conns
		s.pool, err = pgxpool.NewWithConfig(ctx, config)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to the database: %w", err), s.close(ctx))
	}
	return s, nil
}

func startThrowaway(ctx context.Context, log io.Writer) (*throwaway, error) {
	// Durable, or COMMIT would return before its record is in the log, and the latency were that of the WAL writer.
	server, err := pgtest.Start(ctx, pgtest.Options{Durable: true, Log: log})
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, errInterrupted // what initdb had printed until then explains nothing
	case err != nil:
		return nil, fmt.Errorf("start a throw-away PostgreSQL: %w", err)
	}
	return &throwaway{
		dsn: server.URL("postgres"), slot: schema.Slot,
		about:  fmt.Sprintf("PostgreSQL %d from %s, with its data in %s until the end", server.Version(), server.Bin(), server.Dir()),
		remove: func(context.Context) error { return server.Close() }, //nolint:contextcheck // it has a bound of its own
	}, nil
}

// close removes the database, or the server, also when ctx is over.
func (s *throwaway) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), throwawayCleanUp)
	defer cancel()
	if s.pool != nil {
		s.pool.Close()
	}
	return s.remove(ctx)
}

// borrowServer makes a database on an existing server. Its name is the slot's too, as slots belong to the whole server.
func borrowServer(ctx context.Context, dsn, prefix string) (*throwaway, error) {
	random := make([]byte, 4)
	_, _ = rand.Read(random) // never fails: crypto/rand ends the process instead
	name := prefix + "_" + hex.EncodeToString(random)
	own, err := inDatabase(dsn, name)
	if err != nil {
		return nil, err
	}
	conn, err := dial(ctx, "--dsn", dsn, throwawayConnect, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hangUp(ctx, conn) }()
	var hadRole bool
	if err := conn.QueryRow(ctx, "SELECT to_regrole($1) IS NOT NULL", schema.RunnerRole).Scan(&hadRole); err != nil {
		return nil, fmt.Errorf("look for role %s: %w", schema.RunnerRole, err)
	}
	s := &throwaway{
		dsn: own, slot: name, about: "database and slot " + name + ", until the end",
		remove: func(ctx context.Context) error { return dropDatabase(ctx, dsn, name, hadRole) },
	}
	if _, err := conn.Exec(ctx, "CREATE DATABASE "+name); err != nil {
		// If ctx was what ended it, the server may have gone on.
		return nil, errors.Join(fmt.Errorf("create database %s: %w", name, err), s.close(ctx))
	}
	return s, nil
}

// inDatabase is the DSN with another database.
func inDatabase(dsn, name string) (string, error) {
	own := dsn + " dbname=" + name
	if strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://") {
		u, err := url.Parse(dsn)
		if err != nil {
			return "", usage("--dsn: is not a PostgreSQL DSN") // the error would repeat it, password and all
		}
		u.Path = "/" + name
		own = u.String()
	}
	// A URL can name the database in other places too; it must not be one that is somebody's.
	if c, err := pgconn.ParseConfig(own); err != nil || c.Database != name {
		return "", usage("--dsn: write postgres://user:password@host:5432/database, or host=… user=… dbname=…")
	}
	return own, nil
}

// dropDatabase drops the database with its slot, and the role of the relay if it came with it.
func dropDatabase(ctx context.Context, dsn, name string, keepRole bool) error {
	conn, err := dial(ctx, "--dsn", dsn, throwawayConnect, nil)
	if err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	defer func() { _ = hangUp(ctx, conn) }()
	// DROP takes idle slots with it, but refuses while the session that had one is still about to end.
	for {
		_, err = conn.Exec(ctx, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", name)
		if err == nil {
			_, err = conn.Exec(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
		}
		if err == nil || !isCode(err, "55006") { // object in use
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("drop database %s: %w", name, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
	if err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	if keepRole {
		return nil
	}
	// Another database may have come to need it meanwhile.
	if _, err := conn.Exec(ctx, "DROP ROLE IF EXISTS "+schema.RunnerRole); err != nil && !isCode(err, "2BP01") {
		return fmt.Errorf("drop role %s: %w", schema.RunnerRole, err)
	}
	return nil
}

func isCode(err error, code string) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && pg.Code == code
}
