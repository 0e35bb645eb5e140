package desk_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

func ids(list []desk.Delivery) []outbox.UUID {
	all := make([]outbox.UUID, len(list))
	for i := range list {
		all[i] = list[i].ID
	}
	return all
}

func TestDeliveriesAreFiltered(t *testing.T) {
	t.Parallel()
	b := setup(t)
	shop, billing := b.endpoint("Shop", "none"), b.endpoint("Billing", "none")
	created, paid := b.event("order.created", "{}"), b.event("order.paid", "{}")
	first := b.deliver(created, shop, "success", "attempt_number = 2, completed_at = now()")
	second := b.deliver(created, billing, "retrying", "attempt_number = 3, response_time_ms = 12, error_code = 'timeout'")
	b.queue(second, billing, "now() + interval '1 hour'", "")
	third := b.deliver(paid, shop, "pending", "error_code = 'deferred', error_message = 'breaker'")
	b.queue(third, shop, "'infinity'", "")
	other := b.deliver(paid, billing, "success", "relayed = false") // of another dispatcher
	between := time.Now()
	<-time.After(2 * time.Millisecond) // ids are of milliseconds
	gone := b.deliver(outbox.NewUUID(), shop, "failed", "error_code = 'skipped'")

	for name, tc := range map[string]struct {
		filter desk.DeliveryFilter
		want   []outbox.UUID
	}{
		"all, the newest first": {desk.DeliveryFilter{}, []outbox.UUID{gone, third, second, first}},
		"limit":                 {desk.DeliveryFilter{Limit: 1}, []outbox.UUID{gone}},
		"endpoint":              {desk.DeliveryFilter{Endpoint: billing}, []outbox.UUID{second}},
		"event":                 {desk.DeliveryFilter{Event: created}, []outbox.UUID{second, first}},
		"type":                  {desk.DeliveryFilter{Type: "order.paid"}, []outbox.UUID{third}},
		"status":                {desk.DeliveryFilter{Statuses: []string{"pending", "retrying"}}, []outbox.UUID{third, second}},
		"since":                 {desk.DeliveryFilter{Since: between.Add(time.Millisecond)}, []outbox.UUID{gone}},
		"until":                 {desk.DeliveryFilter{Until: between.Add(time.Millisecond), Endpoint: shop}, []outbox.UUID{third, first}},
		"nothing":               {desk.DeliveryFilter{Type: "order.paid", Endpoint: billing}, []outbox.UUID{}},
	} {
		if tc.filter.Limit == 0 {
			tc.filter.Limit = 10
		}
		list, err := b.desk.Deliveries(b.ctx, tc.filter)
		require.NoError(t, err, name)
		assert.Equal(t, tc.want, ids(list), name)
	}
	list, err := b.desk.Deliveries(b.ctx, desk.DeliveryFilter{Limit: 10})
	require.NoError(t, err)
	assert.NotContains(t, ids(list), other)
	assert.Equal(t, []int{0, 0, 3, 2}, []int{list[0].Attempts, list[1].Attempts, list[2].Attempts, list[3].Attempts})
	assert.Equal(t, []string{"", "order.paid", "order.created", "order.created"}, []string{list[0].EventType, list[1].EventType, list[2].EventType, list[3].EventType})
	assert.True(t, list[1].Queued)
	assert.True(t, list[1].DueAt.IsZero(), "parked")
	assert.WithinDuration(t, time.Now().Add(time.Hour), list[2].DueAt.Time, time.Minute)
	assert.Equal(t, "Billing", list[2].EndpointName)
	text, err := json.Marshal(list[3])
	require.NoError(t, err)
	assert.NotContains(t, string(text), "due_at", "what is not there is left out")
	assert.Contains(t, string(text), `"id":"`+first.String()+`"`)
}

func TestDeliveryShowsWhyItWaits(t *testing.T) {
	t.Parallel()
	b := setup(t)
	event := b.event("order.created", "{}")
	const lease = `leased_by = gen_random_uuid()`
	for name, tc := range map[string]struct {
		status, columns string
		due             string // empty: not queued
		leased          bool
		before          string // SQL on the endpoint $1
		want            string
	}{
		"ended":            {status: "success", want: ""},
		"backoff":          {status: "retrying", columns: "response_time_ms = 1, error_code = 'http_5xx', error_message = 'answered 503'", due: "now() + interval '1 hour'", want: "the last attempt failed (http_5xx)"},
		"breaker":          {status: "pending", columns: "error_code = 'deferred', error_message = 'breaker'", due: "now() + interval '1 hour'", want: "the breaker of its endpoint was open"},
		"unknown word":     {status: "pending", columns: "error_code = 'deferred', error_message = 'weather'", due: "now() + interval '1 hour'", want: "weather"},
		"due":              {status: "pending", columns: "error_code = 'deferred', error_message = 'drain'", due: "now() - interval '1 minute'", want: "it is due: the next relay that looks takes it"},
		"leased":           {status: "pending", due: "now() + interval '1 minute'", leased: true, want: "a relay has it: its attempt is under way, or next"},
		"lease ran out":    {status: "pending", due: "now() - interval '1 minute'", leased: true, want: "it is due again: the relay that had it did not say what became of it"},
		"paused":           {status: "pending", due: "'infinity'", before: "UPDATE acme.webhook_endpoints SET paused_at = now() WHERE id = $1::uuid", want: "its endpoint is paused"},
		"disabled":         {status: "pending", due: "'infinity'", before: "UPDATE acme.webhook_endpoints SET is_active = false, disabled_at = now() WHERE id = $1::uuid", want: "its endpoint is disabled"},
		"parked":           {status: "pending", columns: "error_code = 'deferred', error_message = 'paused'", due: "'infinity'", want: "it is parked: its endpoint or tenant was paused"},
		"open breaker":     {status: "pending", due: "now()", before: "INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, open_until) VALUES ('acme', $1::uuid, '2099-01-02 03:04:05Z')", want: "it is due, and the breaker of its endpoint is open until 2099-01-02T03:04:05Z"},
		"probed":           {status: "pending", due: "now()", before: "INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, open_until) VALUES ('acme', $1::uuid, '2026-01-02 03:04:05Z', now() - interval '1 s')", want: "it is due, and its endpoint is probed with one delivery at a time (breaker.half_open): every attempt has failed since 2026-01-02T03:04:05Z"},
		"out of the queue": {status: "retrying", want: "it has no place in the retry queue: deliveries resend gives it one"},
	} {
		endpoint := b.endpoint(name, "none")
		id := b.deliver(event, endpoint, tc.status, tc.columns)
		if tc.due != "" {
			b.queue(id, endpoint, tc.due, "")
		}
		if tc.leased {
			b.exec(`UPDATE outbox_relay.retry_queue SET `+lease+` WHERE delivery_id = $1::uuid`, id)
		}
		if tc.before != "" {
			b.exec(tc.before, endpoint)
		}
		x, err := b.again().Delivery(b.ctx, id)
		require.NoError(t, err, name)
		assert.Equal(t, tc.want, x.Why, name)
		assert.Equal(t, 4, x.MaxTries)
		assert.Equal(t, tc.leased, !x.LeasedBy.IsZero(), name)
	}
	endpoint := b.endpoint("of a paused tenant", "none")
	id := b.deliver(event, endpoint, "pending", "")
	b.queue(id, endpoint, "now()", "")
	b.exec(`SELECT outbox_relay.pause_tenant('acme')`)
	x, err := b.again().Delivery(b.ctx, id)
	require.NoError(t, err)
	assert.Equal(t, "the tenant is paused", x.Why)
}

func TestDeliveryShowsItsPlaceAndItsAttempts(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "strict")
	event := b.event("order.created", "{}")
	key := "'" + endpoint.String() + "', "
	head := b.deliver(event, endpoint, "retrying", "attempt_number = 2, response_time_ms = 5, error_code = 'timeout', error_message = 'no answer'")
	b.queue(head, endpoint, "now() + interval '1 hour'", key+"'0/10', 3")
	var waiting []outbox.UUID
	for range 3 {
		id := b.deliver(b.event("order.created", "{}"), endpoint, "pending", "error_code = 'deferred', error_message = 'order'")
		b.queue(id, endpoint, "'infinity'", key+"'0/20', 0")
		waiting = append(waiting, id)
	}
	b.exec(`INSERT INTO acme.webhook_delivery_attempts (delivery_id, webhook_endpoint_id, replay, attempt_number, error_class, response_status_code, error_message, response_body, response_time_ms, attempted_at)
		VALUES ($1::uuid, $2::uuid, 1, 1, 'timeout', NULL, 'no answer', NULL, 30000, now()), ($1::uuid, $2::uuid, 0, 2, 'http_5xx', 500, 'answered 500', 'oops', 7, now()),
		($1::uuid, $2::uuid, 0, 1, 'connect', NULL, 'refused', NULL, 1, now())`, head, endpoint)

	x, err := b.desk.Delivery(b.ctx, head)
	require.NoError(t, err)
	require.NotNil(t, x.Place)
	assert.Equal(t, desk.Place{Key: endpoint, Behind: 3}, *x.Place)
	require.Len(t, x.Failures, 3)
	assert.Equal(t, []string{"connect", "http_5xx", "timeout"}, []string{x.Failures[0].Class, x.Failures[1].Class, x.Failures[2].Class})
	assert.Equal(t, "oops", x.Failures[1].Answer)

	x, err = b.desk.Delivery(b.ctx, waiting[2])
	require.NoError(t, err)
	assert.Equal(t, 3, x.Place.Before)
	assert.Equal(t, head, x.Place.Head.ID)
	assert.Equal(t, "no answer", x.Place.Head.Error)
	assert.Equal(t, "it waits behind 3 others of the same key", x.Why)

	skipped, err := b.desk.Skip(b.ctx, head, "the receiver cannot read it")
	require.NoError(t, err)
	assert.True(t, skipped)
	x, err = b.desk.Delivery(b.ctx, head)
	require.NoError(t, err)
	assert.Equal(t, "failed", x.Status)
	assert.Equal(t, "open", x.DeadLetter)
	assert.Equal(t, "the receiver cannot read it", x.Error)
	assert.Nil(t, x.Place)
	x, err = b.again().Delivery(b.ctx, waiting[0])
	require.NoError(t, err)
	assert.Equal(t, 0, x.Place.Before)
	assert.Equal(t, "it is due: the next relay that looks takes it", x.Why)
	skipped, err = b.desk.Skip(b.ctx, head, "")
	require.NoError(t, err)
	assert.False(t, skipped)
}

func TestDeliveryUnderItsLeaseIsNotSkipped(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "none")
	id := b.deliver(b.event("order.created", "{}"), endpoint, "pending", "")
	b.queue(id, endpoint, "now() + interval '1 minute'", "")
	b.exec(`UPDATE outbox_relay.retry_queue SET leased_by = gen_random_uuid()`)
	_, err := b.desk.Skip(b.ctx, id, "")
	require.EqualError(t, err, "skip delivery: delivery "+id.String()+" is in flight")
	assert.NotEmpty(t, hint(err))
}

func TestResend(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "none")
	id := b.deliver(b.event("order.created", "{}"), endpoint, "success", "request_body = NULL, completed_at = now()")
	queued, err := b.desk.Resend(b.ctx, id)
	require.NoError(t, err)
	assert.True(t, queued)
	queued, err = b.desk.Resend(b.ctx, id)
	require.NoError(t, err)
	assert.False(t, queued)
	x, err := b.again().Delivery(b.ctx, id)
	require.NoError(t, err)
	assert.Equal(t, 1, x.Replay)
	assert.Equal(t, 0, x.Attempts)
	assert.Equal(t, "it is due: the next relay that looks takes it", x.Why)
}

func TestWrongIDsAreNamed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("Shop", "none")
	event := b.event("order.created", "{}")
	id := b.deliver(event, endpoint, "pending", "")
	_, err := b.desk.Delivery(b.ctx, event)
	require.EqualError(t, err, "tenant acme has no delivery "+event.String())
	assert.Equal(t, "the id is there as something else: outbox-relay events explain -t acme "+event.String(), hint(err))
	_, err = b.desk.Event(b.ctx, endpoint, false)
	assert.Contains(t, hint(err), "outbox-relay endpoints show")
	_, err = b.desk.DeadLetter(b.ctx, id)
	assert.Contains(t, hint(err), "outbox-relay deliveries show")
	_, err = b.desk.Delivery(b.ctx, outbox.UUID{1})
	assert.Equal(t, "see: outbox-relay deliveries list -t acme", hint(err))
	b.exec(`UPDATE acme.webhook_deliveries SET relayed = false WHERE id = $1::uuid`, id)
	_, err = b.desk.Delivery(b.ctx, id)
	require.EqualError(t, err, "delivery "+id.String()+" of tenant acme was made by another dispatcher")
	assert.Equal(t, "all there is of it is its row in webhook_deliveries", hint(err))
	_, err = b.desk.DeadLetter(b.ctx, id)
	require.EqualError(t, err, "tenant acme has no dead letter "+id.String())
	assert.Contains(t, hint(err), "a delivery which another dispatcher made")
	_, err = b.desk.Resend(b.ctx, outbox.UUID{1})
	require.ErrorContains(t, err, "does not exist")
	assert.NotEmpty(t, hint(err))
	_, err = b.desk.Discard(b.ctx, outbox.UUID{1})
	require.ErrorContains(t, err, "tenant acme has no dead letter")
	_, err = b.desk.Pause(b.ctx, outbox.UUID{1}, "")
	require.ErrorContains(t, err, "does not exist")
}
