package store_test

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// What of a delivery's row is the same in every run.
const deliveryColumns = `delivery_status, attempt_number, request_body IS NOT NULL, request_signature, response_status_code, response_body,
response_time_ms, error_message, error_code, next_retry_at - now() > '59 min', max_attempts_reached, relayed, completed_at IS NOT NULL`

func TestRecordFirstOutcomes(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	const from = "a.webhook_deliveries WHERE id = $1"
	const queued = "outbox_relay.retry_queue WHERE delivery_id = $1"
	leased := store.Outcome{Delivery: deliver("a", e), Status: store.Leased, Due: 90 * time.Minute, Reason: "hold"}
	for _, test := range []struct {
		name           string
		outcome        store.Outcome
		row, queue     string
		attempts, dead int
	}{
		{
			name: "success", outcome: succeeded(deliver("a", e)), queue: "none",
			row: "success|1|false|sha256=abc|202|-|250|-|-|-|false|true|true",
		},
		{
			name: "retrying", outcome: failed(deliver("a", e), store.Retrying), queue: "a|true|-", attempts: 1,
			row: "retrying|1|true|sha256=def|503|try\uFFFD later\uFFFD|900|answered 503|http_5xx|true|false|true|false",
		},
		{
			name: "pending", outcome: deferred(deliver("a", e), time.Hour), queue: "a|true|-",
			row: "pending|1|true|-|-|-|-|window|deferred|true|false|true|false",
		},
		{
			name: "leased", outcome: leased, queue: "a|true|" + b.owner.String(),
			row: "pending|1|true|-|-|-|-|hold|deferred|true|false|true|false",
		},
		{
			name: "failed", outcome: failed(deliver("a", e), store.Failed), queue: "none", attempts: 1, dead: 1,
			row: "failed|1|true|sha256=def|503|try\uFFFD later\uFFFD|900|answered 503|http_5xx|-|true|true|true",
		},
		{
			name: "cancelled", outcome: store.Outcome{Delivery: deliver("a", e), Status: store.Cancelled, Reason: "the endpoint is gone"}, queue: "none",
			row: "cancelled|1|true|-|-|-|-|the endpoint is gone|cancelled|-|false|true|true",
		},
	} {
		id := test.outcome.Delivery.ID
		for range 2 { // repeating a batch changes nothing
			b.record(test.outcome)
			assert.Equal(t, test.row, b.row(deliveryColumns, from, id), test.name)
			assert.Equal(t, test.queue, b.row("tenant, due_at > now() + interval '59 min', leased_by", queued, id), test.name)
			assert.Equal(t, test.attempts, b.count("a.webhook_delivery_attempts WHERE delivery_id = $1", id), test.name)
			assert.Equal(t, test.dead, b.count("a.webhook_dead_letters WHERE delivery_id = $1", id), test.name)
		}
	}
	assert.Equal(t, 6, b.count("a.webhook_deliveries"))
}

func TestRecordColumns(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	d := deliver("a", b.endpoint("a"))
	b.record(failed(d, store.Failed))

	headers := `{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "content-type": "application/json"}`
	body := string(d.Message.Body)
	assert.Equal(t, strings.Join([]string{d.EventID.String(), d.EndpointID.String(), d.URL, "POST", headers, body, "true"}, "|"),
		b.row(`webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, request_body,
			completed_at - attempted_at = interval '900 ms' AND now() - attempted_at BETWEEN '1 s' AND '1 min'`, "a.webhook_deliveries"))
	assert.Equal(t, strings.Join([]string{
		d.EventID.String(), d.EndpointID.String(), d.URL, "POST", headers, body,
		"1", "answered 503", "http_5xx", "503", "try\uFFFD later\uFFFD", "-",
	}, "|"),
		b.row(`webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, request_body, attempts, last_error, last_error_code,
			last_status_code, last_response_body, replayed_at`, "a.webhook_dead_letters WHERE delivery_id = $1", d.ID))
	assert.Equal(t, d.EndpointID.String()+"|1|http_5xx|503|answered 503|try\uFFFD later\uFFFD|900|true",
		b.row(`webhook_endpoint_id, attempt_number, error_class, response_status_code, error_message, response_body, response_time_ms,
			now() - attempted_at BETWEEN '1 s' AND '1 min'`, "a.webhook_delivery_attempts WHERE delivery_id = $1", d.ID))

	wide := deliver("a", d.EndpointID)
	o := failed(wide, store.Retrying)
	o.Result.Signature, o.Result.Class, o.Result.Body = strings.Repeat("é", 300), delivery.Class(strings.Repeat("x", 200)), []byte("\x00\x01")
	b.record(o)
	assert.Equal(t, "255|100|\uFFFD\x01", b.row("length(request_signature), length(error_code), response_body", "a.webhook_deliveries WHERE id = $1", wide.ID))
}

// TestRecordAlike records rows that are alike, of which one differs in one column.
func TestRecordAlike(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e, other := b.endpoint("a"), b.endpoint("a")
	for name, differ := range map[string]func(*store.Outcome){
		"in nothing":  func(*store.Outcome) {},
		"endpoint":    func(o *store.Outcome) { o.Delivery.EndpointID = other },
		"URL":         func(o *store.Outcome) { o.Delivery.URL += "/other" },
		"method":      func(o *store.Outcome) { o.Delivery.Method = "PUT" },
		"attempt":     func(o *store.Outcome) { o.Delivery.Attempts = 3 },
		"status":      func(o *store.Outcome) { o.Result.Status = 299 },
		"no status":   func(o *store.Outcome) { o.Result.Status = 0 },
		"header":      func(o *store.Outcome) { o.Delivery.Message.Header[0].Value = "other" },
		"no header":   func(o *store.Outcome) { o.Delivery.Message.Header = nil },
		"contentType": func(o *store.Outcome) { o.Delivery.Message.ContentType = "application/cloudevents+json" },
	} {
		for at := range 3 { // the one that differs
			var outcomes []store.Outcome
			for i := range 3 {
				for _, o := range []store.Outcome{succeeded(deliver("a", e)), failed(deliver("a", e), store.Failed)} {
					if i == at {
						differ(&o)
					}
					outcomes = append(outcomes, o)
				}
			}
			b.record(outcomes...)
			for i, o := range outcomes {
				d, status := o.Delivery, "-"
				if o.Result.Status > 0 {
					status = fmt.Sprint(o.Result.Status)
				}
				want := strings.Join([]string{d.EndpointID.String(), d.URL, d.Method, fmt.Sprint(d.Attempts), status, "true"}, "|")
				require.Equal(t, want, b.row("webhook_endpoint_id, request_url, request_method, attempt_number, response_status_code, request_headers = $2",
					"a.webhook_deliveries WHERE id = $1", d.ID, d.Message.HeaderJSON()), "%s, row %d of those where %d differs", name, i/2, at)
			}
		}
	}
}

// A delivery that somebody else has recorded under another id is left as it is, and so is everything around it.
func TestRecordConflict(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	d := deliver("a", b.endpoint("a"))
	b.record(succeeded(d))
	for _, status := range []store.Status{store.Success, store.Retrying, store.Pending, store.Leased, store.Failed, store.Cancelled} {
		again := *d
		again.ID = outbox.NewUUID()
		b.record(failed(&again, status))
	}
	assert.Equal(t, "1|success", b.row("(SELECT count(*) FROM a.webhook_deliveries), delivery_status", "a.webhook_deliveries"))
	assert.Zero(t, b.count("outbox_relay.retry_queue"))
	assert.Zero(t, b.count("a.webhook_dead_letters"))
	assert.Zero(t, b.count("a.webhook_delivery_attempts"))

	// What a polling dispatcher wrote is no obstacle.
	old := deliver("a", d.EndpointID)
	b.exec(`INSERT INTO a.webhook_deliveries (webhook_event_id, webhook_endpoint_id, request_url, request_method) VALUES ($1, $2, 'u', 'POST'), ($1, $2, 'u', 'POST')`,
		old.EventID, old.EndpointID)
	b.record(succeeded(old))
	assert.Equal(t, 3, b.count("a.webhook_deliveries WHERE webhook_event_id = $1", old.EventID))
}

// claimOne queues a delivery and takes it under a lease.
func (b *bundle) claimOne(tenant string, endpoint outbox.UUID) *store.Delivery {
	b.t.Helper()
	b.record(deferred(deliver(tenant, endpoint), 0))
	claimed, _, err := b.store.Claim(b.t.Context(), b.owner, store.ClaimOptions{N: 1, Lease: time.Hour})
	require.NoError(b.t, err)
	require.Len(b.t, claimed, 1)
	return &claimed[0].Delivery
}

// A tenant whose rows are a copy of another's does not end what that one waits for.
func TestRecordOfACopy(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	own := b.claimOne("a", b.endpoint("a"))
	b.exec("INSERT INTO b.webhook_endpoints SELECT * FROM a.webhook_endpoints")
	b.exec("INSERT INTO b.webhook_deliveries SELECT * FROM a.webhook_deliveries")
	foreign := *own
	foreign.Tenant = "b"
	const queued = "outbox_relay.retry_queue WHERE delivery_id = $1"
	before := b.row("tenant, due_at, leased_by", queued, own.ID)
	for _, outcome := range []store.Outcome{failed(&foreign, store.Retrying), failed(&foreign, store.Failed), succeeded(&foreign)} {
		b.record(outcome)
		assert.Equal(t, before, b.row("tenant, due_at, leased_by", queued, own.ID), outcome.Status)
	}
	assert.Equal(t, "success", b.row("delivery_status", "b.webhook_deliveries"))
	b.record(succeeded(own))
	assert.Equal(t, "none", b.row("tenant", queued, own.ID))
}

func TestRecordQueued(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	const from = "a.webhook_deliveries WHERE id = $1"
	const queued = "outbox_relay.retry_queue WHERE delivery_id = $1"
	for _, test := range []struct {
		name           string
		outcome        func(*store.Delivery) store.Outcome
		row, queue     string
		attempts, dead int
	}{
		{name: "success", outcome: succeeded, row: "success|1|false|sha256=abc|202|-|250|-|-|-|false|true|true", queue: "none"},
		{
			name: "retrying", outcome: func(d *store.Delivery) store.Outcome { return failed(d, store.Retrying) }, queue: "-|true", attempts: 1,
			row: "retrying|1|true|sha256=def|503|try\uFFFD later\uFFFD|900|answered 503|http_5xx|true|false|true|false",
		},
		{
			name: "pending", outcome: func(d *store.Delivery) store.Outcome { return deferred(d, time.Hour) }, queue: "-|true",
			row: "pending|1|true|-|-|-|-|window|deferred|true|false|true|false",
		},
		{
			name: "failed", outcome: func(d *store.Delivery) store.Outcome { return failed(d, store.Failed) }, queue: "none", attempts: 1, dead: 1,
			row: "failed|1|true|sha256=def|503|try\uFFFD later\uFFFD|900|answered 503|http_5xx|-|true|true|true",
		},
		{
			name: "cancelled", queue: "none",
			outcome: func(d *store.Delivery) store.Outcome {
				return store.Outcome{Delivery: d, Status: store.Cancelled, Reason: "not any more"}
			},
			row: "cancelled|1|true|-|-|-|-|not any more|cancelled|-|false|true|true",
		},
	} {
		d := b.claimOne("a", e)
		d.URL, d.Method = "https://example.com/moved", "PUT" // the endpoint, since it was queued
		o := test.outcome(d)
		sent := "https://example.com/hook|POST"
		if o.Attempted {
			sent = d.URL + "|" + d.Method
		}
		for range 2 {
			b.record(o)
			assert.Equal(t, test.row, b.row(deliveryColumns, from, d.ID), test.name)
			assert.Equal(t, sent, b.row("request_url, request_method", from, d.ID), test.name)
			assert.Equal(t, test.queue, b.row("leased_by, due_at > now() + interval '59 min'", queued, d.ID), test.name)
			assert.Equal(t, test.attempts, b.count("a.webhook_delivery_attempts WHERE delivery_id = $1", d.ID), test.name)
			assert.Equal(t, test.dead, b.count("a.webhook_dead_letters WHERE delivery_id = $1", d.ID), test.name)
		}
	}
}

// Attempts are counted over deferrals: pending is for what was never attempted.
func TestRecordDeferredAfterAttempt(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	d := b.claimOne("a", b.endpoint("a"))
	for n := 1; n <= 3; n++ {
		o := failed(d, store.Retrying)
		o.Due = 0
		b.record(o)
		claimed, _, err := b.store.Claim(t.Context(), b.owner, store.ClaimOptions{N: 1, Lease: time.Hour})
		require.NoError(t, err)
		require.Len(t, claimed, 1)
		require.Equal(t, n, claimed[0].Attempts)
		b.record(deferred(&claimed[0].Delivery, 0))
		require.Equal(t, fmt.Sprintf("retrying|%d|http_5xx|503|try\uFFFD later\uFFFD|900|sha256=def|true", n), b.row(`delivery_status, attempt_number, (SELECT max(error_class) FROM a.webhook_delivery_attempts),
			response_status_code, response_body, response_time_ms, request_signature, now() - attempted_at > '1 s'`, "a.webhook_deliveries"), "the last attempt is still to be seen")
		claimed, _, err = b.store.Claim(t.Context(), b.owner, store.ClaimOptions{N: 1, Lease: time.Hour})
		require.NoError(t, err)
		require.Len(t, claimed, 1)
		require.Equal(t, n, claimed[0].Attempts)
		d = &claimed[0].Delivery
	}
	assert.Equal(t, 3, b.count("a.webhook_delivery_attempts"))
}

// Once the lease is lost only a success counts: it is a fact.
func TestRecordLostLease(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	other := outbox.NewUUID()
	for _, status := range []store.Status{store.Retrying, store.Pending, store.Failed, store.Cancelled} {
		d := b.claimOne("a", e)
		b.exec("UPDATE outbox_relay.retry_queue SET leased_by = $1 WHERE delivery_id = $2", other, d.ID)
		b.record(failed(d, status))
		assert.Equal(t, "pending|1", b.row("delivery_status, attempt_number", "a.webhook_deliveries WHERE id = $1", d.ID), status)
		assert.Equal(t, other.String(), b.row("leased_by", "outbox_relay.retry_queue WHERE delivery_id = $1", d.ID), status)
	}
	assert.Zero(t, b.count("a.webhook_delivery_attempts"))
	assert.Zero(t, b.count("a.webhook_dead_letters"))

	d := b.claimOne("a", e)
	b.exec("UPDATE outbox_relay.retry_queue SET leased_by = $1 WHERE delivery_id = $2", other, d.ID)
	b.record(succeeded(d))
	assert.Equal(t, "success|1", b.row("delivery_status, attempt_number", "a.webhook_deliveries WHERE id = $1", d.ID))
	assert.Zero(t, b.count("outbox_relay.retry_queue WHERE delivery_id = $1", d.ID))
}

// A delivery may be handed to the queue and end within one flush.
func TestRecordLeaseAndOutcomeInOneBatch(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	for _, test := range []struct {
		outcome func(*store.Delivery) store.Outcome
		status  string
		queue   string
	}{
		{succeeded, "success|1", "none"},
		{func(d *store.Delivery) store.Outcome { return failed(d, store.Retrying) }, "retrying|1", "-"},
		{func(d *store.Delivery) store.Outcome { return failed(d, store.Failed) }, "failed|1", "none"},
	} {
		d := deliver("a", e)
		before := *d
		lease := store.Outcome{Delivery: &before, Status: store.Leased, Due: time.Hour, Reason: "hold"}
		d.Queued = true
		last := test.outcome(d)
		for range 2 {
			b.record(lease, last)
			assert.Equal(t, test.status, b.row("delivery_status, attempt_number", "a.webhook_deliveries WHERE id = $1", d.ID))
			assert.Equal(t, test.queue, b.row("leased_by", "outbox_relay.retry_queue WHERE delivery_id = $1", d.ID))
		}
	}
}

func TestRecordDisable(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	gone, fine := b.endpoint("a"), b.endpoint("a")
	before := b.row("updated_at, verified_at, last_used_at", "a.webhook_endpoints WHERE id = $1", gone)
	o := failed(deliver("a", gone), store.Failed)
	o.Result.Class, o.Disable = delivery.ClassGone, true
	o2 := o
	o2.Delivery = deliver("a", gone)
	b.record(o, o2, succeeded(deliver("a", fine)))
	assert.Equal(t, "false|gone|true", b.row("is_active, disabled_reason, disabled_at = (SELECT min(dead_at) FROM a.webhook_dead_letters)", "a.webhook_endpoints WHERE id = $1", gone))
	assert.Equal(t, before, b.row("updated_at, verified_at, last_used_at", "a.webhook_endpoints WHERE id = $1", gone))
	assert.Equal(t, "true|-|-", b.row("is_active, disabled_reason, disabled_at", "a.webhook_endpoints WHERE id = $1", fine))
	b.exec("UPDATE a.webhook_endpoints SET disabled_reason = 'by hand', disabled_at = NULL WHERE id = $1", gone)
	o.Delivery = deliver("a", gone) // it was in flight
	b.record(o)
	assert.Equal(t, "false|by hand|-", b.row("is_active, disabled_reason, disabled_at", "a.webhook_endpoints WHERE id = $1", gone))
}

func TestRecordFenced(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	old, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	old.LSN, old.High = 100, 200
	_, err = b.store.Record(t.Context(), b.owner, &old, []store.Outcome{succeeded(deliver("a", e))})
	require.NoError(t, err)

	other := b.open()
	p, err := other.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	assert.Equal(t, store.Progress{Epoch: old.Epoch + 1, LSN: 100, High: 200}, p)

	old.LSN = 300
	_, err = b.store.Record(t.Context(), b.owner, &old, []store.Outcome{succeeded(deliver("a", e))})
	require.ErrorIs(t, err, store.ErrFenced)
	_, err = b.store.Record(t.Context(), b.owner, &old, nil)
	require.ErrorIs(t, err, store.ErrFenced)
	require.ErrorIs(t, b.store.SaveSnapshot(t.Context(), old.Epoch, store.Snapshot{}), store.ErrFenced)
	require.ErrorIs(t, b.store.Suspend(t.Context(), old.Epoch, "a", "x"), store.ErrFenced)
	assert.Equal(t, 1, b.count("a.webhook_deliveries"))
	assert.Equal(t, "0/64|0/C8", b.row("lsn, high_lsn", "outbox_relay.progress"))
	assert.Equal(t, "active", b.row("state", "outbox_relay.tenants"))

	// The position moves without outcomes, and never back.
	p.LSN, p.High = 400, 100
	_, err = other.Record(t.Context(), b.owner, &p, nil)
	require.NoError(t, err)
	p.LSN = 50
	_, err = other.Record(t.Context(), b.owner, &p, nil)
	require.NoError(t, err)
	assert.Equal(t, "0/190|0/C8", b.row("lsn, high_lsn", "outbox_relay.progress"))
}

// Two relays that record the same deliveries of the same tenants in different order wait for each other; neither is chosen as the victim.
func TestRecordWithoutDeadlock(t *testing.T) {
	t.Parallel()
	tenants := []string{"a", "b", "c"}
	b := setup(t, tenants...)
	endpoints := make(map[string]outbox.UUID)
	for _, name := range tenants {
		endpoints[name] = b.endpoint(name)
	}
	for range 10 {
		var batch []store.Outcome
		for i := range 300 {
			name := tenants[i%3]
			d := deliver(name, endpoints[name])
			switch i % 4 {
			case 0:
				batch = append(batch, succeeded(d))
			case 1:
				batch = append(batch, deferred(d, 0))
			case 2:
				batch = append(batch, failed(d, store.Failed))
			default:
				batch = append(batch, failed(d, store.Retrying))
			}
		}
		var group sync.WaitGroup
		errs := make([]error, 2)
		for worker := range 2 {
			mine := make([]store.Outcome, len(batch))
			for i := range batch {
				at := i
				if worker == 1 {
					at = len(batch) - 1 - i
				}
				d := *batch[i].Delivery
				if worker == 1 {
					d.ID = outbox.NewUUID()
				}
				mine[at] = batch[i]
				mine[at].Delivery = &d
			}
			group.Go(func() { _, errs[worker] = b.store.Record(t.Context(), outbox.NewUUID(), nil, mine) })
		}
		group.Wait()
		require.NoError(t, errs[0])
		require.NoError(t, errs[1])
	}
	for _, name := range tenants {
		assert.Equal(t, 1000, b.count(name+".webhook_deliveries"))
	}
}

// Two relays that end the same queued deliveries do not deadlock either, and exactly one outcome of each counts.
func TestRecordQueuedWithoutDeadlock(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	endpoints := map[string]outbox.UUID{"a": b.endpoint("a"), "b": b.endpoint("b")}
	for range 5 {
		var batch []store.Outcome
		for i := range 200 {
			name := []string{"a", "b"}[i%2]
			batch = append(batch, deferred(deliver(name, endpoints[name]), 0))
		}
		b.record(batch...)
		claimed, _, err := b.store.Claim(t.Context(), b.owner, store.ClaimOptions{N: len(batch), Lease: time.Hour})
		require.NoError(t, err)
		require.Len(t, claimed, len(batch))
		var group sync.WaitGroup
		errs := make([]error, 2)
		for worker := range 2 {
			var mine []store.Outcome
			for i := range claimed {
				at := i
				if worker == 1 {
					at = len(claimed) - 1 - i
				}
				d := claimed[at].Delivery
				if at%2 == 0 {
					mine = append(mine, succeeded(&d))
				} else {
					mine = append(mine, failed(&d, store.Failed))
				}
			}
			group.Go(func() { _, errs[worker] = b.store.Record(t.Context(), b.owner, nil, mine) })
		}
		group.Wait()
		require.NoError(t, errs[0])
		require.NoError(t, errs[1])
	}
	assert.Zero(t, b.count("outbox_relay.retry_queue"))
	assert.Equal(t, "500|500|500", b.row(`count(*) FILTER (WHERE delivery_status = 'success'), count(*) FILTER (WHERE delivery_status = 'failed'),
		(SELECT count(*) FROM (SELECT FROM a.webhook_dead_letters UNION ALL SELECT FROM b.webhook_dead_letters) x)`,
		"(SELECT * FROM a.webhook_deliveries UNION ALL SELECT * FROM b.webhook_deliveries) d"))
}

// Bodies beyond what one statement may carry go into several.
func TestRecordLargeBodies(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	body := []byte(`"` + strings.Repeat("x", 12<<20) + `"`)
	outcomes := make([]store.Outcome, 7)
	for i := range outcomes {
		d := deliver("a", e)
		d.Message.Body = body
		outcomes[i] = deferred(d, 0)
	}
	b.record(outcomes...)
	assert.Equal(t, fmt.Sprintf("7|%d", 7*len(body)), b.row("count(*), sum(length(request_body))", "a.webhook_deliveries"))
}

// After a broken connection the same batch is simply recorded again.
func TestRecordAfterBrokenConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	outcomes := []store.Outcome{succeeded(deliver("a", b.endpoint("a")))}
	b.record(outcomes...)
	b.exec("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'outbox-relay' AND datname = current_database()")
	ctx := t.Context()
	require.EventuallyWithT(t, func(t *assert.CollectT) {
		broken, err := b.store.Record(ctx, b.owner, nil, outcomes)
		assert.NoError(t, err)
		assert.Empty(t, broken)
	}, time.Minute, 10*time.Millisecond)
	assert.Equal(t, 1, b.count("a.webhook_deliveries"))
}

// TestRecordPrepared: what is recorded over and over is prepared, each tenant's for itself, and nothing is lost when the table is another one by then or
// somebody has taken the statements away, as a pooler does that gives each transaction another session.
func TestRecordPrepared(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	ea, eb := b.endpoint("a"), b.endpoint("b")
	prepared := func() (n int) {
		t.Helper()
		known, err := b.store.Prepared(t.Context())
		require.NoError(t, err)
		const list = `SELECT count(*) FROM pg_catalog.pg_prepared_statements WHERE name ~ '^outbox_relay_'`
		require.NoError(t, b.store.Recording().QueryRow(t.Context(), list).Scan(&n))
		require.Equal(t, n, known)
		return n
	}
	rows := 0
	record := func() {
		t.Helper()
		rows++
		b.record(succeeded(deliver("a", ea)), succeeded(deliver("b", eb)))
		require.Equal(t, rows, b.count("a.webhook_deliveries"))
		require.Equal(t, rows, b.count("b.webhook_deliveries"))
	}
	record()
	require.Zero(t, prepared(), "once is not often")
	for range 5 {
		record()
	}
	require.Equal(t, 3, prepared(), "the settings, and the insert of each tenant")

	b.exec(`ALTER TABLE a.webhook_deliveries RENAME TO was; CREATE TABLE a.webhook_deliveries (LIKE a.was INCLUDING ALL); INSERT INTO a.webhook_deliveries SELECT * FROM a.was;
		ALTER TABLE a.webhook_deliveries ADD more integer; GRANT ALL ON a.webhook_deliveries TO PUBLIC`)
	record()
	assert.Equal(t, rows-1, b.count("a.was"))

	_, err := b.store.Recording().Exec(t.Context(), "DEALLOCATE ALL")
	require.NoError(t, err)
	for range 6 {
		record()
	}
	assert.Zero(t, prepared(), "not again on this connection")
}

// TestRecordReadsLittle: the plan of what is recorded over and over was made while the queue was empty, and is good when it is not any more.
func TestRecordReadsLittle(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec("VACUUM ANALYZE outbox_relay.retry_queue")
	db, err := store.New(t.Context(), store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	record := func(n int) {
		t.Helper()
		for range n {
			b.record(deferred(deliver("a", e), 0))
		}
		claimed, _, err := db.Claim(t.Context(), b.owner, store.ClaimOptions{N: n, Lease: time.Hour})
		require.NoError(t, err)
		require.Len(t, claimed, n)
		outcomes := make([]store.Outcome, n)
		for i := range claimed {
			outcomes[i] = succeeded(&claimed[i].Delivery)
		}
		broken, err := db.Record(t.Context(), b.owner, nil, outcomes)
		require.NoError(t, err)
		require.Empty(t, broken)
	}
	for range 3 {
		record(1)
	}
	b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at)
		SELECT gen_random_uuid(), 'a', $1, now() + interval '1 hour' FROM generate_series(1, 20000) i`, e)
	record(10)
	db.Close() // its statistics are complete when its connections have ended
	read := func() int {
		return get[int](b, `SELECT coalesce(sum(seq_tup_read), 0)::int FROM pg_stat_all_tables WHERE schemaname = 'outbox_relay' AND relname = 'retry_queue'`)
	}
	written := func() int {
		return get[int](b, `SELECT coalesce(sum(n_tup_del), 0)::int FROM pg_stat_all_tables WHERE schemaname = 'outbox_relay' AND relname = 'retry_queue'`)
	}
	require.Eventually(t, func() bool { return written() == 13 }, time.Minute, 10*time.Millisecond)
	assert.Less(t, read(), 5000)
}
