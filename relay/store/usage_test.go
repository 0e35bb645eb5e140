package store_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestUsageNeedsNoDefault: that of an adopted table may be a function that finds what it calls by the search path, and ours is empty.
func TestUsageNeedsNoDefault(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	b.exec(`CREATE SCHEMA platform; CREATE FUNCTION platform.fresh() RETURNS uuid LANGUAGE sql AS 'SELECT gen_random_uuid()'`)
	b.exec(`SET search_path = platform; CREATE FUNCTION platform.uuid7() RETURNS uuid LANGUAGE plpgsql AS 'BEGIN RETURN fresh(); END'; RESET search_path`)
	b.exec(`ALTER TABLE a.webhook_delivery_stats ALTER COLUMN id SET DEFAULT platform.uuid7(); GRANT USAGE ON SCHEMA platform TO public`)
	u := &store.Usage{Endpoint: store.Endpoint{Tenant: "a", ID: b.endpoint("a")}, Day: time.Now().UTC(), Successes: 1, LastUsed: time.Now()}
	require.NoError(t, b.store.SaveUsage(t.Context(), "a", []*store.Usage{u}, nil))
	assert.Equal(t, "1", b.row("total_attempts", "a.webhook_delivery_stats"))
}

// TestAverageDoesNotDrift: it is written every half minute, and is that of the day all the same.
func TestAverageDoesNotDrift(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	u := store.Usage{Endpoint: store.Endpoint{Tenant: "a", ID: b.endpoint("a")}, Day: time.Now().UTC(), Successes: 1, LastUsed: time.Now()}
	b.exec("INSERT INTO a.webhook_delivery_stats (webhook_endpoint_id, date_recorded, total_attempts, avg_response_time_ms) VALUES ($1, $2, 2, 100)", u.ID, u.Day) // an older dispatcher's
	for range 100 {
		for _, took := range []time.Duration{110 * time.Millisecond, 90 * time.Millisecond} {
			u.Total = took
			require.NoError(t, b.store.SaveUsage(t.Context(), "a", []*store.Usage{&u}, nil))
		}
	}
	assert.Equal(t, "202|100", b.row("total_attempts, avg_response_time_ms", "a.webhook_delivery_stats"))
}

// TestMostCommonErrorIsTheDays: it is written every half minute, and is not that of the last one.
func TestMostCommonErrorIsTheDays(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	day := time.Now().UTC() // there may be another one in a moment
	save := func(errors map[string]int64) {
		u := store.Usage{Endpoint: store.Endpoint{Tenant: "a", ID: get[outbox.UUID](b, "SELECT id FROM a.webhook_endpoints")}, Day: day, Successes: 1, LastUsed: time.Now(), Errors: errors}
		for _, n := range errors {
			u.Failures += n
		}
		require.NoError(t, b.store.SaveUsage(t.Context(), "a", []*store.Usage{&u}, nil))
	}
	id := b.endpoint("a")
	b.exec("INSERT INTO a.webhook_delivery_stats (webhook_endpoint_id, date_recorded, most_common_error_code) VALUES ($1, $2, 'old')", id, day) // an older dispatcher's
	for _, step := range []struct {
		errors map[string]int64
		want   string
	}{
		{nil, "old"}, {map[string]int64{"timeout": 2}, "timeout"}, {map[string]int64{"http_5xx": 1}, "timeout"}, {nil, "timeout"}, {map[string]int64{"http_5xx": 2, "dns": 1}, "http_5xx"},
	} {
		save(step.errors)
		assert.Equal(t, step.want, b.row("most_common_error_code", "a.webhook_delivery_stats"))
	}
	assert.Equal(t, `{"dns": 1, "timeout": 2, "http_5xx": 3}|11`, b.row("error_counts, total_attempts", "a.webhook_delivery_stats"))
}
