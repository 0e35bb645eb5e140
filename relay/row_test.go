package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

	given := map[string]string{
		"webhook_endpoints":           "id",
		"webhook_event_types":         "id",
		"webhook_subscriptions":       "id, endpoint_id, event_type_id",
		"webhook_event_subscriptions": "id, webhook_endpoint_id, event_type_id",
	}
	id := outbox.NewUUID()
	for _, table := range []string{"webhook_endpoints", "webhook_event_types", "webhook_subscriptions", "webhook_event_subscriptions"} {
		keys := strings.Split(given[table], ", ")
		var others []string
		require.NoError(t, conn.QueryRow(ctx, `SELECT array_agg(attname::text) FROM pg_attribute
			WHERE attrelid = ('acme.' || $1)::regclass AND attnum > 0 AND NOT attisdropped AND attname <> ALL($2)`, table, keys).Scan(&others))
		for _, column := range others {
			_, err := conn.Exec(ctx, fmt.Sprintf("ALTER TABLE acme.%s ALTER %s DROP NOT NULL", table, column))
			require.NoError(t, err)
		}
		_, err := conn.Exec(ctx, fmt.Sprintf("INSERT INTO acme.%s (%s, %s) VALUES (%s%s)", table, given[table], strings.Join(others, ", "),
			strings.TrimSuffix(strings.Repeat("'"+id.String()+"', ", len(keys)), ", "), strings.Repeat(", NULL", len(others))))
		require.NoError(t, err)
	}

	// Every field has another value before: NULL is one, and no silence.
	got := &rowsOfStream{store.TenantRows{
		Endpoints: []delivery.EndpointRow{{
			Method: "PUT", CustomHeaders: []byte("[]"), TimeoutSeconds: 9, BackoffSeconds: 9, BackoffMultiplier: 9, FollowRedirects: true,
			Verified: true, Paused: true, ContextID: id, PayloadFormat: "neo", Order: "strict", MaxConcurrency: 9, RatePerSecond: 9,
		}},
		EventTypes:    []route.EventTypeRow{{EventType: "x", RequiresVerification: true, PayloadSchema: "{}"}},
		Subscriptions: []route.SubscriptionRow{{Filters: []byte("[]"), ContextID: id}, {Source: route.Older}},
	}}
	stream, err := wal.Open(ctx, wal.Options{URL: url, Slot: slot, Publications: []string{eventsPublication, registryPublication}})
	require.NoError(t, err)
	defer func() { _ = stream.Close(context.WithoutCancel(ctx)) }()
	require.ErrorIs(t, stream.Run(ctx, got, func() wal.LSN { return 0 }), errAllRows)

	s, err := store.New(ctx, store.Config{URL: url, Slot: slot, PayloadSchemas: true, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer s.Close()
	loaded, err := s.LoadShard(ctx, nil, 0, nil)
	require.NoError(t, err)
	require.Len(t, loaded.Tenants, 1)
	want := loaded.Tenants[0]
	require.NoError(t, want.Err)
	assert.Equal(t, want.Endpoints[0], got.Endpoints[0])
	assert.True(t, got.Endpoints[0].Active && got.Endpoints[0].VerifySSL)
	assert.Equal(t, want.EventTypes, got.EventTypes)
	assert.Equal(t, want.Subscriptions, got.Subscriptions)
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
		return errors.Join(r.err, errAllRows)
	}
	return r.err
}
