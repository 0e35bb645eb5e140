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
		began, arrived := time.Now(), p.arrived()
		var at, now string
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT lsn::text FROM outbox_relay.progress`).Scan(&at))
		p.events("one", 1)
		require.Eventually(t, func() bool {
			require.NoError(t, p.pool.QueryRow(ctx, `SELECT lsn::text FROM outbox_relay.progress`).Scan(&now))
			return now != at && p.arrived() > arrived && time.Since(began) > 2*time.Second
		}, time.Minute, 10*time.Millisecond)
		p.exec(`SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1`, p.cfg.Database.Slot)
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
