package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema"
)

// tenant is the schema of the relay's events.
const tenant = "bench"

// eventSQL inserts one event for the relay.
const eventSQL = `INSERT INTO bench.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
	VALUES (` + idSQL + `, 'order.created', gen_random_uuid(), 'order', ` + dataSQL + `)`

// found sets up what the relay needs: its schema, and one tenant with one endpoint and one subscription.
func (s *stage) found(ctx context.Context) error {
	if err := schema.Migrate(ctx, s.dsn, schema.Options{Slot: schema.Slot}); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	if err := s.exec(ctx, "CREATE SCHEMA "+tenant); err != nil {
		return err
	}
	if err := schema.AddTenant(ctx, s.dsn, tenant, schema.AddOptions{}); err != nil {
		return fmt.Errorf("add tenant: %w", err)
	}
	_, err := s.pool.Exec(ctx, `INSERT INTO bench.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id)
		VALUES ('bench', $1, $2, gen_random_uuid())`, s.receiver.url, secret)
	if err != nil {
		return fmt.Errorf("add endpoint: %w", err)
	}
	return s.exec(ctx,
		`INSERT INTO bench.webhook_event_types (event_type, category, display_name) VALUES ('order.created', 'order', 'Order created')`,
		`INSERT INTO bench.webhook_subscriptions (endpoint_id, event_type_id, event_type)
			SELECT e.id, t.id, 'order.created' FROM bench.webhook_endpoints e, bench.webhook_event_types t`)
}

// relayConfig leaves everything at its default but what the other contenders share.
const relayConfig = `database:
  url: %q
  slot: %s
delivery:
  endpoint_concurrency: %d
network:
  allow: [127.0.0.0/8]
server:
  listen: ""
log:
  level: %s
`

func newRelay(ctx context.Context, s *stage) (contender, error) {
	if err := s.found(ctx); err != nil {
		return nil, err
	}
	return &service{
		stage: s,
		row:   eventSQL,
		add: func(ctx context.Context, tx pgx.Tx, n int) ([]string, error) {
			events := make([]outbox.Event, n)
			for i := range events {
				events[i] = outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order", Data: data}
			}
			added, err := outbox.InsertMany(ctx, tx, tenant, events)
			ids := make([]string, len(added))
			for i := range ids {
				ids[i] = added[i].String()
			}
			return ids, err
		},
		outcomes: "SELECT count(DISTINCT webhook_event_id) FROM bench.webhook_deliveries WHERE delivery_status = 'success'",
		launch:   func(ctx context.Context) (*process, error) { return s.launchRelay(ctx, "warn") },
	}, nil
}

// launchRelay starts a relay for the database of the stage. The caller stops it.
func (s *stage) launchRelay(ctx context.Context, level string) (*process, error) {
	s.relays++ // each has a file of its own, lest one reads it while it is written for the next
	file := filepath.Join(s.dir, fmt.Sprintf("relay%d.yaml", s.relays))
	if err := os.WriteFile(file, fmt.Appendf(nil, relayConfig, s.dsn, schema.Slot, workers, level), 0o600); err != nil {
		return nil, fmt.Errorf("write configuration: %w", err)
	}
	return startProcess("relay", exec.CommandContext(ctx, s.binary, "run", "--config", file)) //nolint:gosec // it was built for this
}

// buildRelay builds the command as the Makefile does.
func buildRelay(ctx context.Context, dir string) (string, error) {
	binary := filepath.Join(dir, "outbox-relay")
	cmd := exec.CommandContext(ctx, "go", "build", "-C", "..", "-trimpath", "-ldflags", "-s -w", "-o", binary, "./cmd/outbox-relay") //nolint:gosec // no input
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the relay (from the folder bench): %w\n%s", err, out)
	}
	return binary, nil
}
