package relay_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestEventWithoutAnID: an event whose id is the nil UUID is a dead letter, and what its tenant commits after it is delivered. Sent again, it goes out as it is.
func TestEventWithoutAnID(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	messages := make(chan string, 1000)
	p.run(heard{slog.DiscardHandler, messages}, nil)
	const nilID = "00000000-0000-0000-0000-000000000000"
	p.exec(`INSERT INTO one.webhook_events (id, event_type, aggregate_id, aggregate_type) VALUES ($1, 'order.created', $1, 'order')`, nilID)
	p.events("one", 3)
	require.Eventually(t, func() bool {
		var dead int
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT count(*) FROM one.webhook_dead_letters WHERE webhook_event_id = $1 AND last_error_code = 'event_invalid'
			AND last_error = 'its id is the nil UUID'`, nilID).Scan(&dead))
		return dead == 1 && p.arrived() == 3
	}, time.Minute, 10*time.Millisecond)
	for told := false; !told; {
		select {
		case text := <-messages:
			require.NotContains(t, text, "suspended")
			told = text == "an event is not valid one "+nilID+" order.created event_invalid its id is the nil UUID false 0"
		case <-ctx.Done():
			require.NoError(t, ctx.Err(), "nobody is told")
		}
	}

	p.exec(`SELECT outbox_relay.replay('one')`)
	require.Eventually(t, func() bool {
		var done int
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT count(*) FROM one.webhook_deliveries WHERE delivery_status = 'success' AND webhook_event_id = $1`, nilID).Scan(&done))
		return done == 1 && p.arrived() == 4
	}, time.Minute, 10*time.Millisecond)
	var state string
	require.NoError(t, p.pool.QueryRow(ctx, `SELECT state FROM outbox_relay.tenants`).Scan(&state))
	require.Equal(t, "active", state)
}
