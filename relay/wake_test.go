package relay

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestWakerRounds: a round goes through a large queue part by part, at leisure; one for a reason does not rest, and sees all that was there when the reason came.
func TestWakerRounds(t *testing.T) {
	t.Parallel()
	var w waker
	at := time.Now()
	more := store.FirstID(at.Add(-time.Hour))
	look := func(next outbox.UUID) { w.reached(next, at) }
	pass := func(d time.Duration) { at = at.Add(d) }

	require.True(t, w.due(at, false), "the first of a leader")
	look(more)
	require.False(t, w.due(at, false))
	pass(time.Second)
	require.True(t, w.due(at, false), "its next part")
	require.False(t, w.hurried)
	look(outbox.UUID{})
	pass(wakeEvery / 2)
	require.False(t, w.due(at, false))
	pass(wakeEvery / 2)
	require.True(t, w.due(at, false), "the next round")
	look(more)

	pass(time.Millisecond)
	require.True(t, w.due(at, true), "a reason in the middle of it")
	require.True(t, w.hurried)
	look(more)
	pass(2 * wakeAgain)
	require.True(t, w.due(at, false))
	require.True(t, w.hurried, "the server is slow")
	look(outbox.UUID{})
	require.True(t, w.due(at, false), "what was before the place when the reason came")
	require.True(t, w.hurried)
	look(outbox.UUID{})
	require.False(t, w.due(at, false), "it has been seen to")

	pass(time.Second)
	require.True(t, w.due(at, true), "another reason")
	look(outbox.UUID{})
	pass(wakeAgain)
	require.True(t, w.due(at, false), "what was locked, or is written only now")
	require.True(t, w.hurried)
	look(outbox.UUID{})
	pass(time.Second)
	require.False(t, w.due(at, false))

	pass(wakeEvery)
	require.True(t, w.due(at, false))
	look(store.FirstID(at.Add(time.Millisecond)))
	pass(time.Second)
	require.False(t, w.due(at, false), "what came meanwhile is the next round's")
	pass(wakeEvery)
	require.True(t, w.due(at, false))
}

// endpoint makes one of acme. Tables have to be loaded then.
func (s *site) endpoint(columns, values string) (key laneKey) {
	s.t.Helper()
	key = laneKey{"acme", outbox.NewUUID()}
	s.exec(`INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id`+columns+`)
		SELECT $1, gen_random_uuid(), 'http://127.0.0.1:9', 'a secret of the test', gen_random_uuid()`+values, key.endpoint)
	return key
}

// queue puts rows into the retry queue. Key and due are SQL; i is the number of the row.
func (s *site) queue(of laneKey, n int, key, due string) {
	s.t.Helper()
	s.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
		SELECT gen_random_uuid(), $1, $2, `+due+`, `+key+`, '0/1', i FROM generate_series(1, $3) i`, of.tenant, of.endpoint, n)
}

// TestWhoTakesAgainIsWoken: what is parked for an endpoint that takes deliveries again comes back at once, part by part, and its health begins anew, once. A failure
// of one is no reason to forget it. Who is paused again, suspended or gone is left out.
func TestWhoTakesAgainIsWoken(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	takes, paused := s.endpoint(", disabled_reason, disabled_at", ", 'was down', now()"), s.endpoint(", paused_at", ", now()")
	require.NoError(t, s.loadTenants(ctx))
	for _, key := range []laneKey{{"gone", takes.endpoint}, takes, paused} {
		s.takesAgain(key)
	}
	const part = 20_000
	s.queue(takes, part+1, "NULL", "'infinity'")
	s.queue(paused, 1, "NULL", "'infinity'")
	parked := func() int { return s.count(`outbox_relay.retry_queue WHERE due_at = 'infinity'`) }
	s.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, failed_at) VALUES ('acme', $1, now(), now())`, takes.endpoint)
	w := waker{looked: time.Now()} // no round is due, which would find it in the end

	canceled, cancel := context.WithCancel(ctx)
	cancel()
	require.ErrorIs(t, w.wake(canceled, s.session), context.Canceled)
	require.Equal(t, part+2, parked())
	require.NoError(t, w.wake(ctx, s.session))
	require.Equal(t, 2, parked(), "a part, and nothing of the one that is paused again")
	require.Zero(t, s.count(`outbox_relay.endpoint_health`))
	require.Zero(t, s.count(`acme.webhook_endpoints WHERE disabled_reason IS NOT NULL OR disabled_at IS NOT NULL`))
	s.exec(`UPDATE acme.webhook_endpoints SET is_active = false, disabled_reason = 'down again' WHERE id = $1`, takes.endpoint) // the stream has yet to bring it
	require.NoError(t, w.wake(ctx, s.session))
	require.Equal(t, 1, parked())
	require.Equal(t, 1, s.count(`acme.webhook_endpoints WHERE disabled_reason = 'down again'`))
	require.Empty(t, s.takeWoken(), "it is over")

	s.queue(takes, 1, "NULL", "'infinity'")
	s.tenant("acme").setState(store.StateSuspended)
	s.takesAgain(takes)
	require.NoError(t, w.wake(ctx, s.session))
	require.Equal(t, 2, parked(), "what waits is woken when it is resumed")
}

// TestKeysAreFree when the queue has no rows of them, be it of a single one.
func TestKeysAreFree(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	e := s.endpoint(", delivery_order", ", 'aggregate'")
	require.NoError(t, s.loadTenants(ctx))
	waits, free := outbox.UUID{1}, outbox.UUID{2}
	s.queue(e, 1, "'"+waits.String()+"'", "now()")
	for _, key := range []outbox.UUID{waits, free} {
		s.dispatcher.block([]store.OrderedKey{{Tenant: "acme", Endpoint: e.endpoint, Key: key}})
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	require.ErrorIs(t, s.freeKeys(canceled), context.Canceled)
	require.Equal(t, 2, s.dispatcher.keys)
	require.NoError(t, s.freeKeys(ctx))
	require.Equal(t, 1, s.dispatcher.keys)
	s.exec(`DELETE FROM outbox_relay.retry_queue`)
	require.NoError(t, s.freeKeys(ctx))
	require.Zero(t, s.dispatcher.keys)
}
