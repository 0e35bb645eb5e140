package store_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
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
	b.exec("UPDATE a.webhook_dead_letters SET dead_at = now() - interval '1 day'")
	again := b.claimAgain(d)
	again.URL, again.Method = "https://example.com/moved", "PUT" // the endpoint, since then
	b.record(failed(again, store.Failed))
	assert.Equal(t, `2|{"made":"anew"}|{"content-type": "application/json"}|https://example.com/moved|PUT|http_5xx|503|-|true`,
		b.row("replay, request_body, request_headers, request_url, request_method, last_error_code, last_status_code, replayed_at, now() - dead_at < '1 h'", "a.webhook_dead_letters"))
}

// TestLateSuccessClosesTheDeadLetter: the delivery was given up by one replica while another one still waited for an answer.
func TestLateSuccessClosesTheDeadLetter(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	other := outbox.NewUUID()
	mine := b.claimOne("a", b.endpoint("a"))
	b.exec("UPDATE outbox_relay.retry_queue SET due_at = now()")
	claimed, _, err := b.store.Claim(t.Context(), other, store.ClaimOptions{N: 1, Lease: time.Hour})
	require.NoError(t, err)
	require.Len(t, claimed, 1)
	broken, err := b.store.Record(t.Context(), other, nil, []store.Outcome{failed(&claimed[0].Delivery, store.Failed)})
	require.NoError(t, err)
	require.Empty(t, broken)
	require.Equal(t, 1, b.count("a.webhook_dead_letters WHERE replayed_at IS NULL"))

	mine.Attempts = 2
	b.record(succeeded(mine))
	assert.Equal(t, "success|3|false", b.row("delivery_status, attempt_number, max_attempts_reached", "a.webhook_deliveries"))
	assert.Equal(t, 0, b.count("a.webhook_dead_letters WHERE replayed_at IS NULL"))
	assert.Zero(t, get[int64](b, "SELECT outbox_relay.replay('a')"), "it has been delivered")
}

// TestRepeatedBatchDoesNotUndoAResend: the first commit was unclear, and somebody has sent the delivery again since.
func TestRepeatedBatchDoesNotUndoAResend(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	const state = "delivery_status, replay, (SELECT count(*) FROM outbox_relay.retry_queue)"
	for name, end := range map[string]func(d *store.Delivery) store.Outcome{
		"success": succeeded,
		"dead":    func(d *store.Delivery) store.Outcome { return failed(d, store.Failed) },
	} {
		d := b.claimOne("a", b.endpoint("a"))
		b.insertEvent(d)
		from := "a.webhook_deliveries WHERE id = '" + d.ID.String() + "'"
		outcome := end(d)
		b.record(outcome)
		b.resend(d)
		b.record(outcome)
		require.Equal(t, "pending|1|1", b.row(state, from), name)
		again := b.claimAgain(d)
		b.record(outcome)
		require.Equal(t, "pending|1|1", b.row(state, from), name)
		delivered := succeeded(again)
		delivered.Result.Started = time.Now()
		b.record(delivered)
		require.Equal(t, "success|1|0", b.row(state, from), name)
	}
}
