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

// TestPauseBeginsAnew: however often a stream is ended, the next one begins at once, as long as each has worked.
func TestPauseBeginsAnew(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	messages := make(chan string, 1000)
	p.run(heard{slog.DiscardHandler, messages}, nil)

	const rounds = 4
	for range rounds {
		var before string
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT pg_current_wal_insert_lsn()::text`).Scan(&before))
		p.events("one", 1)
		require.Eventually(t, func() (moved bool) {
			require.NoError(t, p.pool.QueryRow(ctx, `SELECT confirmed_flush_lsn > $2::pg_lsn FROM pg_replication_slots WHERE slot_name = $1`, p.cfg.Database.Slot, before).Scan(&moved))
			return moved
		}, time.Minute, 10*time.Millisecond)
		worked := time.Now() // by a stream that began before, however late that was: it is to last for longer than the pause from here on
		require.Eventually(t, func() bool { return time.Since(worked) > time.Second }, time.Minute, 10*time.Millisecond)
		// What comes next is for the next stream: the server process of this one has ended.
		p.exec(`SELECT pg_terminate_backend(active_pid, 60000) FROM pg_replication_slots WHERE slot_name = $1`, p.cfg.Database.Slot)
	}
	var ends int
	require.Eventually(t, func() bool {
		for len(messages) > 0 {
			if text := <-messages; strings.HasPrefix(text, "the stream has ended, starting again") {
				ends++
				assert.Contains(t, text, "500ms", "round %d", ends)
			}
		}
		return ends == rounds
	}, time.Minute, 10*time.Millisecond)
}
