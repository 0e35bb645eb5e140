package store_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// resend is what an operator does.
func (b *bundle) resend(d *store.Delivery) {
	b.t.Helper()
	require.True(b.t, get[bool](b, "SELECT outbox_relay.resend($1, $2)", d.Tenant, d.ID))
}

// insertEvent writes the event of a delivery.
func (b *bundle) insertEvent(d *store.Delivery) {
	b.t.Helper()
	b.exec("INSERT INTO a.webhook_events (id, event_type, aggregate_id, aggregate_type) VALUES ($1, 'x.y', gen_random_uuid(), 'x')", d.EventID)
}

// claimAgain claims the only delivery that is due, with a message as the relay makes one.
func (b *bundle) claimAgain(like *store.Delivery) *store.Delivery {
	b.t.Helper()
	claimed, _, err := b.store.Claim(b.t.Context(), b.owner, store.ClaimOptions{N: 10, Lease: time.Hour})
	require.NoError(b.t, err)
	require.Len(b.t, claimed, 1)
	d := &claimed[0].Delivery
	if d.Message == nil {
		m := *like.Message
		m.Body, m.Header = []byte(`{"made":"anew"}`), nil
		d.Message = &m
	}
	return d
}

// TestResendKeepsTheBody of a delivery that was delivered once, from its first failure on: its event may go.
func TestResendKeepsTheBody(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	d := deliver("a", b.endpoint("a"))
	b.insertEvent(d)
	b.record(succeeded(d))
	b.resend(d)
	b.record(failed(b.claimAgain(d), store.Retrying))
	const kept, from = "replay, request_body, request_headers", "a.webhook_deliveries"
	assert.Equal(t, `1|{"made":"anew"}|{"content-type": "application/json"}`, b.row(kept, from), "and the headers that belong to it")

	b.exec("DELETE FROM a.webhook_events")
	b.exec("UPDATE outbox_relay.retry_queue SET due_at = now()")
	again := b.claimAgain(d)
	assert.JSONEq(t, `{"made":"anew"}`, string(again.Message.Body))
	b.record(failed(again, store.Failed))
	assert.Equal(t, `1|{"made":"anew"}`, b.row("replay, request_body", "a.webhook_dead_letters"))
	assert.Equal(t, `1|{"made":"anew"}|{"content-type": "application/json"}`, b.row(kept, from))
}

// TestSkippedLetterGetsItsBody when it is replayed in vain: a delivery that was delivered once and skipped then kept none.
func TestSkippedLetterGetsItsBody(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	d := deliver("a", b.endpoint("a"))
	b.insertEvent(d)
	b.record(succeeded(d))
	b.resend(d)
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('a', $1)", d.ID))
	require.Equal(t, "-", b.row("request_body", "a.webhook_dead_letters"))
	b.resend(d)
	b.record(failed(b.claimAgain(d), store.Failed))
	assert.Equal(t, `2|{"made":"anew"}|{"content-type": "application/json"}`, b.row("replay, request_body, request_headers", "a.webhook_dead_letters"))
}
