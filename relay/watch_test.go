package relay_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestSlotIsWatchedBesideALockedQueue: whoever has locked the retry queue holds the log back, and a slot that is about to be lost for it is told of.
func TestSlotIsWatchedBesideALockedQueue(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.cfg.Database.WALBudget = 1 << 20
	messages := make(chan string, 1000)
	p.run(heard{slog.DiscardHandler, messages}, nil)

	lock, err := p.pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = lock.Rollback(ctx) }()
	_, err = lock.Exec(ctx, `LOCK TABLE outbox_relay.retry_queue IN ACCESS EXCLUSIVE MODE`)
	require.NoError(t, err)
	p.exec(`SELECT pg_logical_emit_message(true, 'x', repeat('x', 4 << 20))`)
	told, left := 0, 0
	hear := func() {
		for len(messages) > 0 {
			text := <-messages
			left += strings.Count(text, "the metrics of the retry queue stay as they are")
			told += strings.Count(text, "comes to its limit")
		}
	}
	require.Eventually(t, func() bool {
		hear()
		return p.gauge("slot_retained_bytes") > 4<<20 && told == 1 && left == 1
	}, time.Minute, 10*time.Millisecond)
	assert.Zero(t, p.gauge("slot_time_left_seconds"))

	for range 2 {
		retained := p.gauge("slot_retained_bytes")
		p.exec(`SELECT pg_logical_emit_message(true, 'x', repeat('x', 1 << 20))`)
		require.Eventually(t, func() bool { return p.gauge("slot_retained_bytes") > retained }, time.Minute, 10*time.Millisecond)
	}
	hear()
	assert.Equal(t, 1, left, "it has been said")
	require.NoError(t, lock.Rollback(ctx))
}
