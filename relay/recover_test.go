package relay_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestRecoveryThatCannotBeComputed ends with what the server says, and the next one of the tenant does not wait for it.
func TestRecoveryThatCannotBeComputed(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	p.earlier("one", 3, 1)
	for range 2 {
		p.exec(`SELECT outbox_relay.recover_endpoint('one', (SELECT id FROM one.webhook_endpoints), since => now() - interval '1 day')`)
	}
	p.exec(`ALTER TABLE outbox_relay.recoveries DROP CONSTRAINT recoveries_rate_check`) // whatever came past it
	p.exec(`UPDATE outbox_relay.recoveries SET rate = 'NaN' WHERE id = 1`)
	p.run(slog.DiscardHandler, nil)
	require.Eventually(t, func() bool {
		return get[int](p, `SELECT count(*) FROM outbox_relay.recoveries WHERE done_at IS NULL`) == 0
	}, time.Minute, 10*time.Millisecond)
	require.Contains(t, get[string](p, `SELECT error FROM outbox_relay.recoveries WHERE id = 1`), "SQLSTATE 22008")
	require.True(t, get[bool](p, `SELECT queued = 3 AND error IS NULL FROM outbox_relay.recoveries WHERE id = 2`))
	require.Eventually(t, func() bool { return p.arrived() == 3 }, time.Minute, 10*time.Millisecond)
}
