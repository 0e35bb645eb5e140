package main

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// asRunner makes the relay of the site run as the documented role with the least privileges.
func (s *site) asRunner(t testing.TB) {
	t.Helper()
	role := "runner_" + s.slot
	s.exec(t, `CREATE ROLE `+role+` LOGIN REPLICATION IN ROLE outbox_relay_runner`)
	t.Cleanup(func() {
		_, err := s.pool.Exec(context.Background(), `DROP ROLE `+role)
		require.NoError(t, err)
	})
	u, err := url.Parse(s.dsn)
	require.NoError(t, err)
	u.User = url.User(role)
	yaml, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.config, []byte(strings.Replace(string(yaml), s.dsn, u.String(), 1)), 0o600))
}

// oldRows is what a neo-commons schema held before it was adopted, each row with the transaction that wrote it.
func (s *site) oldRows(t testing.TB, table, columns string) (rows string) {
	t.Helper()
	require.NoError(t, s.pool.QueryRow(t.Context(), fmt.Sprintf(
		`SELECT string_agg(o.row, E'\n' ORDER BY o.row) FROM (SELECT (xmin, %s)::text AS row FROM acme.%s) o`, columns, table)).Scan(&rows))
	return rows
}

// TestAdoptedTenant: a schema as neo-commons makes it, with its indexes, triggers, references and old rows, is adopted without touching a row and
// delivers, to a relay that may do no more than it must: what was unprocessed, once, and what comes.
func TestAdoptedTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	neo, err := os.ReadFile("../../schema/testdata/neo.sql")
	require.NoError(t, err)
	_, err = s.pool.Exec(ctx, strings.NewReplacer("{{s}}", "acme", "{{n}}", "100").Replace(string(neo)))
	require.NoError(t, err)
	s.pool.Reset() // the script has set a search path
	var id outbox.UUID
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT id FROM acme.webhook_endpoints`).Scan(&id))
	s.exec(t, `UPDATE acme.webhook_endpoints SET endpoint_url = $1`, s.receiver.URL+"/"+id.String())
	verify, err := standardwebhooks.NewWebhookRaw([]byte("secret"))
	require.NoError(t, err)
	s.receiver.secrets.Store(id, verify)
	var unprocessed, deliveries int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*), (SELECT count(*) FROM acme.webhook_deliveries) FROM acme.webhook_events
		WHERE processed_at IS NULL`).Scan(&unprocessed, &deliveries))
	require.Positive(t, unprocessed)
	const events, attempts = "id, event_type, event_data, processed_at, created_at", "id, webhook_event_id, attempt_number, delivery_status, created_at"
	before := s.oldRows(t, "webhook_events", events) + s.oldRows(t, "webhook_deliveries", attempts)

	s.command(t, "tenants", "add", "acme", "--unprocessed")
	require.Equal(t, before, s.oldRows(t, "webhook_events", events)+s.oldRows(t, "webhook_deliveries", attempts), "adoption has touched a row")
	s.asRunner(t)
	p := startRelay(t, s.config)
	s.receiver.await(ctx, t, "what a polling dispatcher left", func() bool { return s.recorded(t, []string{"acme"}) == unprocessed })
	s.insertMany(t, "acme", "order.created", 10)
	s.receiver.await(ctx, t, "what came later", func() bool { return s.recorded(t, []string{"acme"}) == unprocessed+10 })
	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.Empty(t, s.receiver.bad)
	for _, n := range s.receiver.delivered() {
		require.Equal(t, 1, n)
	}

	// Its receivers read what neo-commons sent them, signed as it did.
	var body map[string]any
	require.NoError(t, json.Unmarshal(s.receiver.body, &body))
	for _, key := range []string{"event_id", "event_type", "event_name", "event_data", "event_metadata", "occurred_at", "context_id"} {
		require.Contains(t, body, key)
	}
	mac := hmac.New(sha256.New, []byte("secret"))
	mac.Write(s.receiver.body)
	require.Equal(t, "sha256="+hex.EncodeToString(mac.Sum(nil)), s.receiver.header.Get("X-Webhook-Signature"))
}

// TestTenantInItsOwnTransaction: the events that an application commits together with their tenant arrive.
func TestTenantInItsOwnTransaction(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.asRunner(t)
	startRelay(t, s.config)
	s.leading(ctx, t)
	id := outbox.NewUUID()
	verify, err := standardwebhooks.NewWebhookRaw([]byte("secret"))
	require.NoError(t, err)
	s.receiver.secrets.Store(id, verify)

	tx, err := s.pool.Begin(ctx)
	require.NoError(t, err)
	for _, sql := range []string{
		`CREATE SCHEMA fresh`,
		`SELECT outbox_relay.add_tenant('fresh')`,
		`INSERT INTO fresh.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
			VALUES ('` + id.String() + `', 'x', '` + s.receiver.URL + "/" + id.String() + `', 'secret', gen_random_uuid())`,
		`INSERT INTO fresh.webhook_event_types (event_type, category, display_name) VALUES ('order.created', 'order', 'x')`,
		`INSERT INTO fresh.webhook_subscriptions (endpoint_id, event_type_id, event_type) SELECT e.id, t.id, '**'
			FROM fresh.webhook_endpoints e, fresh.webhook_event_types t`,
		`INSERT INTO fresh.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('order.created', gen_random_uuid(), 'order')`,
	} {
		_, err = tx.Exec(ctx, sql)
		require.NoError(t, err, sql)
	}
	require.NoError(t, tx.Commit(ctx))
	s.receiver.await(ctx, t, "the event of the tenant's first transaction", func() bool { return s.arrivedAt(id) == 1 })
	s.insertMany(t, "fresh", "order.created", 10)
	s.receiver.await(ctx, t, "later events", func() bool { return s.arrivedAt(id) == 11 })

	// The log carries the routing table: what is committed counts from the next commit on.
	s.exec(t, `UPDATE fresh.webhook_subscriptions SET event_filters = '{"n": {"$lte": 3}}'`)
	s.insertMany(t, "fresh", "order.created", 10)
	s.receiver.await(ctx, t, "what the filter lets through", func() bool { return s.arrivedAt(id) == 14 })
	s.exec(t, `UPDATE fresh.webhook_endpoints SET is_active = false`)
	s.insertMany(t, "fresh", "order.created", 10)
	s.exec(t, `UPDATE fresh.webhook_endpoints SET is_active = true`)
	s.insertMany(t, "fresh", "order.created", 10)
	s.receiver.await(ctx, t, "what the active endpoint is due", func() bool { return s.arrivedAt(id) == 17 })
	require.Equal(t, 17, s.receiver.pairs(), "an inactive endpoint was sent something")
	require.Empty(t, s.receiver.bad)
}

// TestDeadLetter: what fails to the end is kept whole, and a receiver that is gone is not asked again.
func TestDeadLetter(t *testing.T) {
	t.Parallel()
	var status atomic.Int64
	status.Store(http.StatusInternalServerError)
	s := newSite(t, "queue:\n  poll: 50ms\nbreaker:\n  failures: 100\n", func(outbox.UUID, string) int { return int(status.Load()) }, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.asRunner(t)
	ep := s.endpoint(t, "acme", 2)
	s.subscribe(t, "acme", ep, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1)
	var attempts, failed int
	var body, code string
	s.receiver.await(ctx, t, "a dead letter", func() bool {
		return s.pool.QueryRow(ctx, `SELECT attempts, request_body, last_error_code, (SELECT count(*) FROM acme.webhook_delivery_attempts)
			FROM acme.webhook_dead_letters WHERE webhook_endpoint_id = $1`, ep).Scan(&attempts, &body, &code, &failed) == nil
	})
	require.Equal(t, []int{3, 3, 3}, []int{attempts, failed, s.receiver.count()}, "attempts counted, attempts kept, requests seen")
	require.Equal(t, string(s.receiver.body), body, "the exact body")
	require.Equal(t, "http_5xx", code)
	_, exit := p.stop(t)
	require.NoError(t, exit)

	status.Store(http.StatusGone)
	startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "the endpoint to be disabled", func() bool {
		var active bool
		err := s.pool.QueryRow(ctx, `SELECT is_active FROM acme.webhook_endpoints WHERE id = $1 AND disabled_reason IS NOT NULL`, ep).Scan(&active)
		return err == nil && !active
	})
	require.Equal(t, 4, s.receiver.count())
}
