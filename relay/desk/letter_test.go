package desk_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

// letters buries one delivery of shop a day ago, two of billing now, and one of an endpoint that is deleted then.
func letters(b *bundle) (shop, billing outbox.UUID, dead []outbox.UUID) {
	b.t.Helper()
	shop, billing = b.endpoint("Shop", "none"), b.endpoint("Billing", "none")
	gone := b.endpoint("Gone", "none")
	for i, endpoint := range []outbox.UUID{shop, billing, billing, gone} {
		id := b.deliver(b.event([]string{"order.created", "order.paid"}[i%2], "{}"), endpoint, "failed", "")
		b.bury(id, fmt.Sprintf("now() - interval '%d hours'", []int{24, 3, 2, 1}[i]))
		dead = append(dead, id)
	}
	b.exec(`DELETE FROM acme.webhook_endpoints WHERE id = $1::uuid`, gone)
	return shop, billing, dead
}

func TestDeadLettersAreFiltered(t *testing.T) {
	t.Parallel()
	b := setup(t)
	shop, billing, dead := letters(b)
	ids := func(f desk.LetterFilter, states ...string) []outbox.UUID {
		list, err := b.desk.DeadLetters(b.ctx, f, states, 10)
		require.NoError(t, err)
		all := []outbox.UUID{}
		for i := range list {
			all = append(all, list[i].DeliveryID)
		}
		return all
	}
	assert.Equal(t, []outbox.UUID{dead[3], dead[2], dead[1], dead[0]}, ids(desk.LetterFilter{}, "open"), "the latest first")
	assert.Equal(t, []outbox.UUID{dead[0]}, ids(desk.LetterFilter{Endpoint: shop}, "open"))
	assert.Equal(t, []outbox.UUID{dead[3], dead[1]}, ids(desk.LetterFilter{Type: "order.paid"}, "open"))
	assert.Equal(t, []outbox.UUID{dead[3], dead[2]}, ids(desk.LetterFilter{Since: time.Now().Add(-150 * time.Minute)}, "open"))
	assert.Equal(t, []outbox.UUID{dead[0]}, ids(desk.LetterFilter{Until: time.Now().Add(-4 * time.Hour)}, "open"))

	discarded, err := b.desk.Discard(b.ctx, dead[0])
	require.NoError(t, err)
	assert.True(t, discarded)
	discarded, err = b.desk.Discard(b.ctx, dead[0])
	require.NoError(t, err)
	assert.False(t, discarded)
	queued, err := b.desk.Resend(b.ctx, dead[1])
	require.NoError(t, err)
	assert.True(t, queued)
	assert.Equal(t, []outbox.UUID{dead[3], dead[2]}, ids(desk.LetterFilter{}, "open"))
	assert.Equal(t, []outbox.UUID{dead[1]}, ids(desk.LetterFilter{}, "replayed"))
	assert.Equal(t, []outbox.UUID{dead[1], dead[0]}, ids(desk.LetterFilter{}, "replayed", "discarded"))

	x, err := b.desk.DeadLetter(b.ctx, dead[3])
	require.NoError(t, err)
	assert.True(t, x.EndpointGone)
	assert.Equal(t, `{"a":1}`, *x.Body)
	assert.Equal(t, "internal error", x.Answer)
	assert.Equal(t, "http_5xx", x.ErrorCode)
	assert.Equal(t, 4, x.Attempts)

	b.exec(`UPDATE acme.webhook_endpoints SET paused_at = now() WHERE id = $1::uuid`, billing)
	piles, err := b.desk.Piles(b.ctx, desk.LetterFilter{Since: time.Now().Add(-150 * time.Minute)})
	require.NoError(t, err)
	require.Len(t, piles, 2)
	assert.Equal(t, int64(1), piles[0].N)
	for _, p := range piles {
		assert.Equal(t, p.EndpointID != billing, p.EndpointGone)
		assert.Equal(t, p.EndpointID == billing, p.Holds)
	}
}

func TestReplayIsSpreadAndNeverTwice(t *testing.T) {
	t.Parallel()
	b := setup(t)
	shop := b.endpoint("Shop", "none")
	b.exec(`INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, request_body, attempts)
		SELECT gen_random_uuid(), gen_random_uuid(), $1::uuid, 'https://receiver.example', 'POST', '{}', '{}', 1 FROM generate_series(1, 30)`, shop)
	until := b.again().Now().Add(time.Second)
	n, err := b.desk.Replay(b.ctx, desk.LetterFilter{Until: until, Endpoint: shop}, 20, time.Hour)
	require.NoError(t, err)
	assert.Equal(t, int64(20), n)
	assert.Greater(t, get[float64](b, `SELECT extract(epoch FROM max(due_at) - min(due_at))::float8 FROM outbox_relay.retry_queue`), 1800.0)
	n, err = b.desk.Replay(b.ctx, desk.LetterFilter{Until: until, Endpoint: shop}, 20, 0)
	require.NoError(t, err)
	assert.Equal(t, int64(10), n)
	n, err = b.desk.Replay(b.ctx, desk.LetterFilter{Until: until, Endpoint: shop}, 20, 0)
	require.NoError(t, err)
	assert.Zero(t, n)
	assert.Equal(t, int64(30), get[int64](b, `SELECT count(*) FROM outbox_relay.retry_queue`))
	assert.Equal(t, int64(30), get[int64](b, `SELECT count(*) FROM acme.webhook_deliveries WHERE replay = 1 AND delivery_status = 'pending'`))
}

func TestDiscardMany(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, billing, _ := letters(b)
	n, err := b.desk.DiscardMany(b.ctx, desk.LetterFilter{Endpoint: billing}, 1)
	require.NoError(t, err)
	assert.Equal(t, int64(1), n)
	n, err = b.desk.DiscardMany(b.ctx, desk.LetterFilter{Endpoint: billing}, 500)
	require.NoError(t, err)
	assert.Equal(t, int64(1), n)
	n, err = b.desk.DiscardMany(b.ctx, desk.LetterFilter{}, 500)
	require.NoError(t, err)
	assert.Equal(t, int64(2), n)
	piles, err := b.desk.Piles(b.ctx, desk.LetterFilter{})
	require.NoError(t, err)
	assert.Empty(t, piles)
}
