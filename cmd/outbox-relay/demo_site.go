package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema"
)

// demoSite is the database of a demo.
type demoSite struct{ *throwaway }

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

// guide writes a configuration that leads to the database, and returns a command for a second terminal. It is a file, as the DSN may hold a password.
func (s *demoSite) guide() (command string, remove func() error, err error) {
	program, err := os.Executable()
	if err != nil {
		return "", nil, fmt.Errorf("find the program's own file: %w", err)
	}
	file, err := os.CreateTemp("", "outbox-relay-demo-*.yaml") // for its owner alone
	if err != nil {
		return "", nil, fmt.Errorf("keep the configuration of the demo: %w", err)
	}
	remove = func() error { return os.Remove(file.Name()) }
	_, err = fmt.Fprintf(file, "database:\n  url: %q\n  slot: %s\nserver:\n  listen: \"\"\n", s.dsn, s.slot)
	if err = errors.Join(err, file.Close()); err != nil {
		return "", nil, errors.Join(fmt.Errorf("keep the configuration of the demo: %w", err), remove())
	}
	return shellWord(program) + " status --watch --config " + shellWord(file.Name()), remove, nil
}

// shellWord quotes text for a shell, if it has to.
func shellWord(text string) string {
	if regexp.MustCompile(`^[\w./+:@%-]+$`).MatchString(text) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
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
