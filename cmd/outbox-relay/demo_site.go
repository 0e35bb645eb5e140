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

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

const (
	demoConnect = 10 * time.Second // to reach an existing server
	demoCleanUp = 30 * time.Second // to remove what was created on it
)

// demoSite is the database of a demo.
type demoSite struct {
	dsn, slot string
	about     string
	pool      *pgxpool.Pool
	remove    func(ctx context.Context) error
}

// openDemoSite starts a server, or makes a database on an existing one. What takes long is told to log.
func openDemoSite(ctx context.Context, dsn string, log io.Writer) (*demoSite, error) {
	start := func() (*demoSite, error) { return startDemoServer(ctx, log) }
	if dsn != "" {
		start = func() (*demoSite, error) { return borrowDemoServer(ctx, dsn) }
	}
	s, err := start()
	if err != nil {
		return nil, err
	}
	config, err := pgxpool.ParseConfig(s.dsn)
	if err == nil {
		config.MaxConns = demoWriters + 1
		s.pool, err = pgxpool.NewWithConfig(ctx, config)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to the demo's database: %w", err), s.close(ctx))
	}
	return s, nil
}

func startDemoServer(ctx context.Context, log io.Writer) (*demoSite, error) {
	// Durable, or COMMIT would return before its record is in the log, and the latency were that of the WAL writer.
	server, err := pgtest.Start(ctx, pgtest.Options{Durable: true, Log: log})
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, errInterrupted // what initdb had printed until then explains nothing
	case err != nil:
		return nil, fmt.Errorf("start a throw-away PostgreSQL: %w", err)
	}
	return &demoSite{
		dsn: server.URL("postgres"), slot: schema.Slot,
		about:  fmt.Sprintf("PostgreSQL %d from %s, with its data in %s until the end", server.Version(), server.Bin(), server.Dir()),
		remove: func(context.Context) error { return server.Close() }, //nolint:contextcheck // it has a bound of its own
	}, nil
}

// close removes the database, or the server, also when ctx is over.
func (s *demoSite) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), demoCleanUp)
	defer cancel()
	if s.pool != nil {
		s.pool.Close()
	}
	return s.remove(ctx)
}

// borrowDemoServer makes a database on an existing server. Its name is the slot's too, as slots belong to the whole server.
func borrowDemoServer(ctx context.Context, dsn string) (*demoSite, error) {
	random := make([]byte, 4)
	_, _ = rand.Read(random) // never fails: crypto/rand ends the process instead
	name := "outbox_relay_demo_" + hex.EncodeToString(random)
	own, err := inDatabase(dsn, name)
	if err != nil {
		return nil, err
	}
	conn, err := dial(ctx, "--dsn", dsn, demoConnect, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hangUp(ctx, conn) }()
	var hadRole bool
	if err := conn.QueryRow(ctx, "SELECT to_regrole($1) IS NOT NULL", schema.RunnerRole).Scan(&hadRole); err != nil {
		return nil, fmt.Errorf("look for role %s: %w", schema.RunnerRole, err)
	}
	s := &demoSite{
		dsn: own, slot: name, about: "database and slot " + name + ", until the end",
		remove: func(ctx context.Context) error { return dropDemoDatabase(ctx, dsn, name, hadRole) },
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
	// A URL can name the database in other places too; the demo must not get into one that is somebody's.
	if c, err := pgconn.ParseConfig(own); err != nil || c.Database != name {
		return "", usage("--dsn: write postgres://user:password@host:5432/database, or host=… user=… dbname=…")
	}
	return own, nil
}

// dropDemoDatabase drops the database with its slot, and the role of the relay if the demo brought it.
func dropDemoDatabase(ctx context.Context, dsn, name string, keepRole bool) error {
	conn, err := dial(ctx, "--dsn", dsn, demoConnect, nil)
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

// install does what "outbox-relay migrate" and "outbox-relay tenants add" do, and inserts endpoints and subscriptions.
func (s *demoSite) install(ctx context.Context, endpoints []*demoEndpoint, progress func(step string)) error {
	if err := schema.Migrate(ctx, s.dsn, schema.Options{Slot: s.slot, Progress: progress}); err != nil {
		return err
	}
	for _, tenant := range demoTenants() {
		if _, err := s.pool.Exec(ctx, "CREATE SCHEMA "+pgx.Identifier{tenant}.Sanitize()); err != nil {
			return fmt.Errorf("create schema %q: %w", tenant, err)
		}
		if err := schema.AddTenant(ctx, s.dsn, tenant, schema.AddOptions{}); err != nil {
			return err
		}
		_, err := s.pool.Exec(ctx, "INSERT INTO "+table(tenant, "webhook_event_types")+` (event_type, category, display_name)
			SELECT t, split_part(t, '.', 1), t FROM unnest($1::text[]) t`, demoTypes())
		if err != nil {
			return fmt.Errorf("insert event types of %q: %w", tenant, err)
		}
	}
	for _, e := range endpoints {
		if err := e.insert(ctx, s.pool); err != nil {
			return fmt.Errorf("insert endpoint %s of %q: %w", e.receiver.name, e.tenant, err)
		}
	}
	return nil
}

func table(tenant, name string) string { return pgx.Identifier{tenant, name}.Sanitize() }

// insert adds the endpoint with its subscriptions, the way an application's own pages would.
func (e *demoEndpoint) insert(ctx context.Context, pool *pgxpool.Pool) error {
	_, err := pool.Exec(ctx, "INSERT INTO "+table(e.tenant, "webhook_endpoints")+`
		(id, name, endpoint_url, secret_token, max_retry_attempts, retry_backoff_seconds, retry_backoff_multiplier, created_by_user_id)
		VALUES ($1, $2, $3, $4, $5, 1, 1.0, gen_random_uuid())`, e.id, e.receiver.name, e.url(), e.secret, e.receiver.retries)
	if err != nil {
		return err
	}
	for _, sub := range e.subscriptions {
		// A pattern is no event type; its row refers to any.
		_, err := pool.Exec(ctx, "INSERT INTO "+table(e.tenant, "webhook_subscriptions")+` (endpoint_id, event_type_id, event_type, event_filters)
			SELECT $1, id, $2::text, $3 FROM `+table(e.tenant, "webhook_event_types")+` ORDER BY event_type <> $2 LIMIT 1`, e.id, sub.pattern, sub.filter)
		if err != nil {
			return err
		}
	}
	return nil
}

// waiting counts the deliveries in the retry queue.
func (s *demoSite) waiting(ctx context.Context) (n int, err error) {
	if err = s.pool.QueryRow(ctx, "SELECT count(*) FROM outbox_relay.retry_queue").Scan(&n); err != nil {
		return 0, fmt.Errorf("count the retry queue: %w", err)
	}
	return n, nil
}

// deadLetters are the deliveries that were given up.
func (s *demoSite) deadLetters(ctx context.Context) (map[demoPair]bool, error) {
	dead := make(map[demoPair]bool)
	err := s.eachRow(ctx, "webhook_dead_letters", "''", func(p demoPair, _ string) error {
		dead[p] = true
		return nil
	})
	return dead, err
}

// deliveries gives the status that each delivery is recorded with. One that is recorded twice is an error.
func (s *demoSite) deliveries(ctx context.Context) (map[demoPair]string, error) {
	statuses := make(map[demoPair]string)
	err := s.eachRow(ctx, "webhook_deliveries", "delivery_status", func(p demoPair, status string) error {
		if _, twice := statuses[p]; twice {
			return fmt.Errorf("event %s is recorded twice for endpoint %s", p.event, p.endpoint)
		}
		statuses[p] = status
		return nil
	})
	return statuses, err
}

// eachRow reads a table of deliveries in every tenant.
func (s *demoSite) eachRow(ctx context.Context, name, column string, f func(p demoPair, value string) error) error {
	for _, tenant := range demoTenants() {
		rows, err := s.pool.Query(ctx, "SELECT webhook_event_id, webhook_endpoint_id, "+column+" FROM "+table(tenant, name))
		if err != nil {
			return fmt.Errorf("read %s of %q: %w", name, tenant, err)
		}
		var event, endpoint outbox.UUID
		var value string
		_, err = pgx.ForEachRow(rows, []any{&event, &endpoint, &value}, func() error { return f(demoPair{endpoint, event}, value) })
		if err != nil {
			return fmt.Errorf("read %s of %q: %w", name, tenant, err)
		}
	}
	return nil
}
