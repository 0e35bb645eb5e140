package relay_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// heard passes on the messages of a log.
type heard struct {
	slog.Handler

	messages chan string
}

func (h heard) Enabled(context.Context, slog.Level) bool { return true }

func (h heard) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.Value.String()
		return true
	})
	select {
	case h.messages <- text:
	default:
	}
	return nil
}

func (h heard) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h heard) WithGroup(string) slog.Handler      { return h }

// TestSuspensionThatFails: a tenant whose table is not published is to be suspended, which the database refuses, and somebody mends it meanwhile. What it commits from
// then on is delivered: no part of the relay has it as suspended.
func TestSuspensionThatFails(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	messages := make(chan string, 1000)
	p.run(heard{slog.DiscardHandler, messages}, nil)
	p.events("one", 1)
	require.Eventually(t, func() bool { return p.arrived() == 1 }, time.Minute, 10*time.Millisecond)

	lock, err := p.pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = lock.Rollback(ctx) }()
	_, err = lock.Exec(ctx, `SELECT FROM outbox_relay.tenants WHERE schema = 'one' FOR UPDATE`)
	require.NoError(t, err)
	p.exec(`ALTER PUBLICATION outbox_relay_events DROP TABLE one.webhook_events`)
	require.Eventually(t, func() bool {
		var waits bool
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
			AND query LIKE '%''suspended''%')`).Scan(&waits))
		return waits
	}, time.Minute, 10*time.Millisecond)
	p.exec(`ALTER PUBLICATION outbox_relay_events ADD TABLE one.webhook_events`)
	for failed := false; !failed; {
		select {
		case text := <-messages:
			failed = strings.Contains(text, `suspend tenant "one"`) && strings.Contains(text, "lock timeout")
		case <-ctx.Done():
			require.NoError(t, ctx.Err(), "it is not suspended")
		}
	}
	require.NoError(t, lock.Rollback(ctx))
	p.events("one", 5)
	require.Eventually(t, func() bool { return p.arrived() == 6 }, time.Minute, 10*time.Millisecond)
}
