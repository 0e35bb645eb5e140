package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestNullsOfTheStream has an adopted tenant whose columns may be NULL, and holds what the stream makes of such rows against what the initial load
// does.
func TestNullsOfTheStream(t *testing.T) {
	t.Parallel()
	given := map[string]string{
		"webhook_endpoints":           "id",
		"webhook_event_types":         "id",
		"webhook_subscriptions":       "id, endpoint_id, event_type_id",
		"webhook_event_subscriptions": "id, webhook_endpoint_id, event_type_id",
	}
	id := outbox.NewUUID()
	// Every field has another value before: NULL is one, and no silence.
	got := &rowsOfStream{store.TenantRows{
		Endpoints: []delivery.EndpointRow{{
			Method: "PUT", CustomHeaders: []byte("[]"), TimeoutSeconds: 9, BackoffSeconds: 9, BackoffMultiplier: 9, FollowRedirects: true,
			Verified: true, Paused: true, ContextID: id, PayloadFormat: "neo", Order: "strict", MaxConcurrency: 9, RatePerSecond: 9,
		}},
		EventTypes:    []route.EventTypeRow{{EventType: "x", RequiresVerification: true, PayloadSchema: "{}"}},
		Subscriptions: []route.SubscriptionRow{{Filters: []byte("[]"), ContextID: id}, {Source: route.Older}},
	}}
	want := readBothWays(t, got, "webhook_event_subscriptions", func(conn *pgx.Conn) {
		for _, table := range []string{"webhook_endpoints", "webhook_event_types", "webhook_subscriptions", "webhook_event_subscriptions"} {
			keys := strings.Split(given[table], ", ")
			var others []string
			require.NoError(t, conn.QueryRow(t.Context(), `SELECT array_agg(attname::text) FROM pg_attribute
				WHERE attrelid = ('acme.' || $1)::regclass AND attnum > 0 AND NOT attisdropped AND attname <> ALL($2)`, table, keys).Scan(&others))
			for _, column := range others {
				_, err := conn.Exec(t.Context(), fmt.Sprintf("ALTER TABLE acme.%s ALTER %s DROP NOT NULL", table, column))
				require.NoError(t, err)
			}
			_, err := conn.Exec(t.Context(), fmt.Sprintf("INSERT INTO acme.%s (%s, %s) VALUES (%s%s)", table, given[table], strings.Join(others, ", "),
				strings.TrimSuffix(strings.Repeat("'"+id.String()+"', ", len(keys)), ", "), strings.Repeat(", NULL", len(others))))
			require.NoError(t, err)
		}
	})
	assert.Equal(t, want.Endpoints[0], got.Endpoints[0])
	assert.True(t, got.Endpoints[0].Active && got.Endpoints[0].VerifySSL)
	assert.Equal(t, want.EventTypes, got.EventTypes)
	assert.Equal(t, want.Subscriptions, got.Subscriptions)
}

// TestWideNumbersOfTheStream has an adopted tenant whose whole numbers are wider than what the relay counts in. One such row must not be the end of its tenant, and
// is the same endpoint however it is read.
func TestWideNumbersOfTheStream(t *testing.T) {
	t.Parallel()
	got := &rowsOfStream{store.TenantRows{Endpoints: []delivery.EndpointRow{{BackoffMultiplier: 2}}}}
	want := readBothWays(t, got, "webhook_endpoints", func(conn *pgx.Conn) {
		_, err := conn.Exec(t.Context(), `ALTER TABLE acme.webhook_endpoints DROP CONSTRAINT webhook_endpoints_timeout_seconds_check,
			DROP CONSTRAINT webhook_endpoints_max_retry_attempts_check, DROP CONSTRAINT webhook_endpoints_retry_backoff_seconds_check,
			ALTER timeout_seconds TYPE int8, ALTER max_retry_attempts TYPE int8, ALTER retry_backoff_seconds TYPE int8, ALTER max_concurrency TYPE int8`)
		require.NoError(t, err)
		_, err = conn.Exec(t.Context(), `INSERT INTO acme.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id, timeout_seconds, max_retry_attempts,
			retry_backoff_seconds, max_concurrency) VALUES ('e', 'https://example.com', 'secret', gen_random_uuid(), 4294967301, -4294967301, 2147483648, 17)`)
		require.NoError(t, err)
	})
	assert.Equal(t, want.Endpoints[0], got.Endpoints[0])
	e := want.Endpoints[0]
	assert.Equal(t, []int32{math.MaxInt32, math.MinInt32, math.MaxInt32, 17}, []int32{e.TimeoutSeconds, e.MaxRetryAttempts, e.BackoffSeconds, e.MaxConcurrency})
}

// TestOtherNumbersOfTheStream has an adopted tenant whose numbers are of other types than ours: whole ones with a fraction, and the other way round.
func TestOtherNumbersOfTheStream(t *testing.T) {
	t.Parallel()
	got := &rowsOfStream{store.TenantRows{Endpoints: []delivery.EndpointRow{{}}}}
	want := readBothWays(t, got, "webhook_endpoints", func(conn *pgx.Conn) {
		_, err := conn.Exec(t.Context(), `ALTER TABLE acme.webhook_endpoints ALTER timeout_seconds TYPE numeric, ALTER max_retry_attempts TYPE float8,
			ALTER retry_backoff_seconds TYPE numeric, ALTER max_concurrency TYPE float4, ALTER retry_backoff_multiplier TYPE int4, ALTER rate_limit_per_second TYPE int8`)
		require.NoError(t, err)
		_, err = conn.Exec(t.Context(), `INSERT INTO acme.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id, timeout_seconds, max_retry_attempts,
			retry_backoff_seconds, max_concurrency, retry_backoff_multiplier, rate_limit_per_second)
			VALUES ('e', 'https://example.com', 'secret', gen_random_uuid(), 7.5, 4, 59.4, 3e9, 2, 1000)`)
		require.NoError(t, err)
	})
	assert.Equal(t, want.Endpoints[0], got.Endpoints[0])
	e := want.Endpoints[0]
	assert.Equal(t, []int32{8, 4, 59, math.MaxInt32}, []int32{e.TimeoutSeconds, e.MaxRetryAttempts, e.BackoffSeconds, e.MaxConcurrency})
	assert.Equal(t, []float64{2, 1000}, []float64{e.BackoffMultiplier, e.RatePerSecond})
}

// readBothWays returns the routing rows of the tenant acme as they are loaded, and has the stream bring them to got, up to one of the last table.
func readBothWays(t *testing.T, got *rowsOfStream, last string, prepare func(*pgx.Conn)) store.TenantRows {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	url := pgtest.Database(t)
	conn, err := pgx.Connect(ctx, url)
	require.NoError(t, err)
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var slot string
	require.NoError(t, conn.QueryRow(ctx, "SELECT current_database()").Scan(&slot))
	require.NoError(t, schema.Migrate(ctx, url, schema.Options{Slot: slot}))
	_, err = conn.Exec(ctx, "CREATE SCHEMA acme")
	require.NoError(t, err)
	require.NoError(t, schema.AddTenant(ctx, url, "acme", schema.AddOptions{}))
	prepare(conn)

	stream, err := wal.Open(ctx, wal.Options{URL: url, Slot: slot, Publications: []string{eventsPublication, registryPublication}})
	require.NoError(t, err)
	defer func() { _ = stream.Close(context.WithoutCancel(ctx)) }()
	require.ErrorIs(t, stream.Run(ctx, &untilTable{got, last}, func() wal.LSN { return 0 }), errAllRows)

	s, err := store.New(ctx, store.Config{URL: url, Slot: slot, PayloadSchemas: true, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer s.Close()
	loaded, err := s.LoadShard(ctx, nil, 0, nil)
	require.NoError(t, err)
	require.Len(t, loaded.Tenants, 1)
	require.NoError(t, loaded.Tenants[0].Err)
	return loaded.Tenants[0]
}

var errAllRows = errors.New("all rows have come")

// rowsOfStream is a wal.Handler that reads one row of each routing table.
type rowsOfStream struct{ store.TenantRows }

func (h *rowsOfStream) Begin(context.Context, wal.Begin) error         { return nil }
func (h *rowsOfStream) Commit(context.Context, wal.Commit) error       { return nil }
func (h *rowsOfStream) Keepalive(context.Context, wal.LSN, bool) error { return nil }
func (h *rowsOfStream) Change(_ context.Context, c *wal.Change) (err error) {
	r := row{rel: c.Relation, t: &c.New}
	switch c.Relation.Table {
	case "webhook_endpoints":
		r.endpoint(&h.Endpoints[0])
	case "webhook_event_types":
		r.eventType(&h.EventTypes[0], true)
	case "webhook_subscriptions":
		r.subscription(&h.Subscriptions[0])
	case "webhook_event_subscriptions":
		r.subscription(&h.Subscriptions[1])
	}
	return r.err
}

// untilTable ends the stream behind a row of the table.
type untilTable struct {
	*rowsOfStream

	table string
}

func (h *untilTable) Change(ctx context.Context, c *wal.Change) error {
	err := h.rowsOfStream.Change(ctx, c)
	if c.Relation.Table == h.table {
		return errors.Join(err, errAllRows)
	}
	return err
}
