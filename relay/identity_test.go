package relay_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestFilterUnderAnIdentityOfAnotherColumn: the log has neither the id of the old row nor the large filter, which the update has not touched. It counts as before.
func TestFilterUnderAnIdentityOfAnotherColumn(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	p.exec(`CREATE UNIQUE INDEX key ON one.webhook_subscriptions (event_type, endpoint_id)`)
	p.exec(`ALTER TABLE one.webhook_subscriptions REPLICA IDENTITY USING INDEX key`)
	p.exec(`UPDATE one.webhook_subscriptions SET event_filters = jsonb_build_object('$type', jsonb_build_object('$in',
		(SELECT jsonb_agg(md5(random()::text)) || '["order.created", "order.changed"]' FROM generate_series(1, 560))))`)
	var size int
	require.NoError(t, p.pool.QueryRow(ctx, `SELECT pg_column_size(event_filters) FROM one.webhook_subscriptions`).Scan(&size))
	require.Greater(t, size, 10_000, "it is not kept apart from its row")
	p.run(slog.DiscardHandler, nil)
	p.events("one", 1)
	require.Eventually(t, func() bool { return p.arrived() == 1 }, time.Minute, 10*time.Millisecond)

	p.exec(`UPDATE one.webhook_subscriptions SET event_type = 'order.changed'`) // a column of the identity: the old row is in the log
	p.exec(`INSERT INTO one.webhook_events (id, event_type, aggregate_id, aggregate_type) VALUES (gen_random_uuid(), 'order.changed', gen_random_uuid(), 'order')`)
	p.exec(`UPDATE one.webhook_subscriptions SET event_type = 'order.created'`)
	p.events("one", 1)
	require.Eventually(t, func() bool { return p.arrived() >= 2 }, time.Minute, 10*time.Millisecond)
}
