package store_test

import (
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func TestLoadShard(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b", "broken", "dropped", `q"uote`)
	e := b.endpoint("a")
	typ := get[outbox.UUID](b, `INSERT INTO a.webhook_event_types (event_type, category, display_name, is_enabled, requires_verification)
		VALUES ('order.created', 'order', 'x', false, true) RETURNING id`)
	sub := get[outbox.UUID](b, `INSERT INTO a.webhook_subscriptions (endpoint_id, event_type_id, event_type, event_filters, context_id)
		VALUES ($1, $2, 'order.*', '{"a": 1.50}', $1) RETURNING id`, e, typ)
	older := get[outbox.UUID](b, `INSERT INTO a.webhook_event_subscriptions (webhook_endpoint_id, event_type_id, is_active)
		VALUES ($1, $2, false) RETURNING id`, e, typ)
	b.endpoint(`q"uote`)
	b.exec("SELECT outbox_relay.pause_tenant('b', 'asked to')")
	b.exec("ALTER TABLE broken.webhook_subscriptions RENAME event_filters TO filters")
	b.exec("DROP SCHEMA dropped CASCADE")

	reg, err := b.store.LoadShard(t.Context(), nil, 0, nil)
	require.NoError(t, err)
	require.Len(t, reg.Tenants, 5)
	a := reg.Tenants[0]
	require.Equal(t, "a", a.Schema)
	require.Equal(t, store.StateActive, a.State)
	require.NoError(t, a.Err)
	require.Len(t, a.Endpoints, 1)
	assert.Equal(t, e, a.Endpoints[0].ID)
	assert.Equal(t, []route.EventTypeRow{{ID: typ, EventType: "order.created", RequiresVerification: true}}, a.EventTypes)
	assert.Equal(t, []route.SubscriptionRow{
		{Source: route.Current, ID: sub, EndpointID: e, EventTypeID: typ, EventType: "order.*", Filters: []byte(`{"a": 1.50}`), Active: true, ContextID: e},
		{Source: route.Older, ID: older, EndpointID: e, EventTypeID: typ, Filters: []byte(`{}`)},
	}, a.Subscriptions)
	assert.Equal(t, "b paused asked to", fmt.Sprint(reg.Tenants[1].Schema, " ", reg.Tenants[1].State, " ", reg.Tenants[1].Reason))
	requireCode(t, "42703", reg.Tenants[2].Err)
	assert.Empty(t, reg.Tenants[2].Endpoints)
	requireCode(t, "42P01", reg.Tenants[3].Err)
	assert.Len(t, reg.Tenants[4].Endpoints, 1)
	assert.NotZero(t, reg.LSN)

	reg, err = b.store.LoadShard(t.Context(), []string{"b", "nobody"}, 0, nil)
	require.NoError(t, err)
	require.Len(t, reg.Tenants, 1)
}

// Old shapes allow nulls, and have other types.
func TestLoadShardNulls(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	b.exec(`DO $$
DECLARE col text; tbl text;
BEGIN
	FOR tbl, col IN SELECT c.relname, a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
		WHERE c.relnamespace = 'a'::regnamespace AND c.relname IN ('webhook_endpoints', 'webhook_event_types', 'webhook_subscriptions', 'webhook_event_subscriptions')
		AND a.attnum > 0 AND a.attnotnull AND a.attname <> 'id' LOOP
		EXECUTE format('ALTER TABLE a.%I ALTER %I DROP NOT NULL, ALTER %I DROP DEFAULT', tbl, col, col);
	END LOOP;
	ALTER TABLE a.webhook_endpoints ALTER timeout_seconds TYPE bigint, ALTER max_concurrency TYPE smallint, ALTER secret_token TYPE text;
	INSERT INTO a.webhook_endpoints (id, secondary_secret_expires_at) VALUES (gen_random_uuid(), '-infinity');
	INSERT INTO a.webhook_event_types (id) VALUES (gen_random_uuid());
	INSERT INTO a.webhook_subscriptions (id) VALUES (gen_random_uuid());
	INSERT INTO a.webhook_event_subscriptions (id) VALUES (gen_random_uuid());
END $$`)
	reg, err := b.store.LoadShard(t.Context(), nil, 0, nil)
	require.NoError(t, err)
	require.NoError(t, reg.Tenants[0].Err)
	e := reg.Tenants[0].Endpoints[0]
	assert.True(t, e.Active)
	assert.True(t, e.VerifySSL)
	assert.Equal(t, int32(-1), e.MaxRetryAttempts)
	assert.Zero(t, e.TimeoutSeconds)
	assert.True(t, e.SecondarySecretExpires.Before(time.Now()))
	assert.False(t, e.SecondarySecretExpires.IsZero())
	assert.Len(t, reg.Tenants[0].EventTypes, 1)
	assert.Len(t, reg.Tenants[0].Subscriptions, 2)
}

// TestLoadShardOfNumbersBeyondFloats: a numeric holds more than a float64 does. One row with such a number must not be the end of its tenant, whose tables could
// not be read any more, and is what the stream makes of it.
func TestLoadShardOfNumbersBeyondFloats(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	want := make(map[outbox.UUID]float64)
	for text, rate := range map[string]float64{"1e400": math.Inf(1), "Infinity": math.Inf(1), "1e-400": 0, "0.1": 0.1, "1.7976931348623157e308": math.MaxFloat64} {
		e := b.endpoint("a")
		b.exec("UPDATE a.webhook_endpoints SET rate_limit_per_second = $2::text::numeric WHERE id = $1", e, text)
		want[e] = rate
	}
	want[b.endpoint("a")] = 0
	for e := range want {
		b.record(deferred(deliver("a", e), 0))
	}
	assert.Len(t, b.claim(b.owner, 10, time.Hour), len(want), "deliveries of the tenant that are claimed together")
	reg, err := b.store.LoadShard(t.Context(), nil, 0, nil)
	require.NoError(t, err)
	require.NoError(t, reg.Tenants[0].Err)
	got := make(map[outbox.UUID]float64)
	for _, e := range reg.Tenants[0].Endpoints {
		got[e.ID] = e.RatePerSecond
		assert.Equal(t, 2.0, e.BackoffMultiplier) //nolint:testifylint // it is exact
	}
	assert.Equal(t, want, got)
}

// BenchmarkLoadShard starts as a relay does: on a fresh connection.
func BenchmarkLoadShard(b *testing.B) {
	s := setup(b)
	const tenants = 200
	for i := range tenants {
		name := fmt.Sprintf("tenant_%d", i)
		s.addTenant(name)
		s.exec("INSERT INTO " + name + `.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id)
			SELECT 'e', 'https://example.com', 'secret', gen_random_uuid() FROM generate_series(1, 10)`)
	}
	for b.Loop() {
		st := s.open()
		reg, err := st.LoadShard(b.Context(), nil, 0, nil)
		require.NoError(b, err)
		require.Len(b, reg.Tenants, tenants)
		st.Close()
	}
	b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N)/tenants, "ms/tenant")
}
