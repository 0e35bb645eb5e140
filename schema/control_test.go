package schema_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
)

// The one endpoint of these tests promises a strict order; its deliveries are numbered like their events.
const (
	endpointID = "e0000000-0000-4000-8000-000000000000"
	deliveries = `INSERT INTO acme.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method, request_body, relayed)
SELECT ('d0000000-0000-4000-8000-00000000000' || n)::uuid, ('a0000000-0000-4000-8000-00000000000' || n)::uuid, '` + endpointID + `', 'pending', 'http://127.0.0.1:1/', 'POST', '{}', true
FROM generate_series(1, 5) n`
	// waiting lists what waits in the queue, in order: the head, then what is parked, with a star.
	waiting = `SELECT coalesce(string_agg(right(q.delivery_id::text, 1) || CASE WHEN q.due_at = 'infinity' THEN '*' ELSE '' END, ' '
  ORDER BY q.order_lsn, q.order_n, q.delivery_id), '') FROM outbox_relay.retry_queue q`
)

func delivery(n string) string { return "d0000000-0000-4000-8000-00000000000" + n }

// controlled is a tenant whose endpoint has five deliveries waiting in order.
func controlled(t *testing.T) *bundle {
	t.Helper()
	b := setup(t)
	b.exec("CREATE SCHEMA acme; SELECT outbox_relay.add_tenant('acme')")
	b.exec(`INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id, delivery_order)
VALUES ('` + endpointID + `', 'one', 'http://127.0.0.1:1/', 's', gen_random_uuid(), 'strict')`)
	b.exec(`INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, occurred_at)
SELECT ('a0000000-0000-4000-8000-00000000000' || n)::uuid, 'a.b', gen_random_uuid(), 'a', '2026-01-01'::timestamptz + n * interval '1 hour' FROM generate_series(1, 5) n`)
	b.exec(deliveries)
	b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
SELECT d.id, 'acme', d.webhook_endpoint_id, CASE WHEN right(d.id::text, 1) = '1' THEN now() ELSE 'infinity' END, d.webhook_endpoint_id, '0/10', right(d.id::text, 1)::int
FROM acme.webhook_deliveries d`)
	require.Equal(t, "1 2* 3* 4* 5*", get[string](b, waiting))
	return b
}

func TestSkipGivesUpWhatWaits(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	skip := func(n string) bool {
		return get[bool](b, "SELECT outbox_relay.skip('acme', $1, 'it never ends')", delivery(n))
	}
	require.True(t, skip("1"))
	require.Equal(t, "2 3* 4* 5*", get[string](b, waiting), "the next one goes on")
	require.True(t, skip("4"))
	require.Equal(t, "2 3* 5*", get[string](b, waiting))
	require.False(t, skip("4"), "it does not wait any more")
	require.Equal(t, []string{"1 skipped it never ends", "4 skipped it never ends"},
		list(b, "SELECT concat_ws(' ', right(delivery_id::text, 1), last_error_code, last_error) FROM acme.webhook_dead_letters ORDER BY 1"))
	require.Equal(t, "failed", get[string](b, "SELECT delivery_status::text FROM acme.webhook_deliveries WHERE id = $1", delivery("1")))

	b.exec("UPDATE outbox_relay.retry_queue SET leased_by = gen_random_uuid(), due_at = now() + interval '1 h' WHERE delivery_id = $1", delivery("2"))
	_, err := b.conn.Exec(b.ctx, "SELECT outbox_relay.skip('acme', $1)", delivery("2"))
	require.ErrorContains(t, err, "in flight")
}

// TestSkipOfWhatDiedBefore: the letter is of the round that was given up, not of the one before.
func TestSkipOfWhatDiedBefore(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	skipped := func() string {
		t.Helper()
		require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
		return get[string](b, "SELECT concat_ws('|', request_method, request_url, last_status_code, last_response_body) FROM acme.webhook_dead_letters")
	}
	b.exec("UPDATE acme.webhook_deliveries SET delivery_status = 'retrying', response_status_code = 503, response_body = 'busy' WHERE id = $1", delivery("1"))
	require.Equal(t, "POST|http://127.0.0.1:1/|503|busy", skipped())
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")))
	require.Equal(t, "POST|http://127.0.0.1:1/", skipped(), "nobody has answered since")
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")))
	b.exec("UPDATE acme.webhook_deliveries SET delivery_status = 'retrying', request_method = 'PUT', request_url = 'http://127.0.0.1:2/', response_status_code = 500, response_body = 'no' WHERE id = $1", delivery("1"))
	require.Equal(t, "PUT|http://127.0.0.1:2/|500|no", skipped())
}

func TestReplayKeepsTheOrder(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	for _, n := range []string{"1", "2", "4"} {
		require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery(n)))
	}
	require.Equal(t, "3 5*", get[string](b, waiting))
	require.Equal(t, int64(2), get[int64](b, "SELECT outbox_relay.replay('acme', max => 2)"), "the oldest first")
	require.Equal(t, "1 2* 3* 5*", get[string](b, waiting), "before what was first and is parked now")
	require.Equal(t, int64(1), get[int64](b, "SELECT outbox_relay.replay('acme', endpoint => $1, event_type => 'a.b', until => now() + interval '1 h')", endpointID))
	require.Equal(t, "1 2* 3* 4* 5*", get[string](b, waiting))
	require.Zero(t, get[int64](b, "SELECT outbox_relay.replay('acme')"), "none is queued twice")
	require.Equal(t, int64(3), get[int64](b, "SELECT count(*) FROM acme.webhook_deliveries WHERE replay = 1 AND delivery_status = 'pending'"))
	require.Equal(t, int64(3), get[int64](b, "SELECT count(*) FROM acme.webhook_dead_letters WHERE replayed_at IS NOT NULL"))

	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("5")))
	require.True(t, get[bool](b, "SELECT outbox_relay.discard('acme', $1)", delivery("5")))
	require.False(t, get[bool](b, "SELECT outbox_relay.discard('acme', $1)", delivery("5")))
	require.Zero(t, get[int64](b, "SELECT outbox_relay.replay('acme')"), "nobody wants it")
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("5")), "unless it is named")
	require.False(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("5")))
}

func TestResend(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	require.False(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")), "it waits")
	b.exec("DELETE FROM outbox_relay.retry_queue; UPDATE acme.webhook_deliveries SET delivery_status = 'success', request_body = NULL, completed_at = now()")
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")), "its body is made of the event again")
	require.Equal(t, "1", get[string](b, waiting))

	refused := func(why string, n string) (hint string) {
		t.Helper()
		_, err := b.conn.Exec(b.ctx, "SELECT outbox_relay.resend('acme', $1)", delivery(n))
		var pg *pgconn.PgError
		require.ErrorAs(t, err, &pg)
		assert.Equal(t, "OR002", pg.Code)
		assert.Contains(t, pg.Message, why)
		assert.NotEmpty(t, pg.Hint)
		return pg.Hint
	}
	refused("does not exist in", "9")
	b.exec("DELETE FROM acme.webhook_events WHERE id::text LIKE '%2'")
	assert.Contains(t, refused("neither the event nor the body", "2"), "it is sent to every endpoint that subscribes to it now")
	b.exec("UPDATE acme.webhook_deliveries SET relayed = false WHERE id = $1", delivery("3"))
	refused("another dispatcher", "3")
	b.exec("UPDATE acme.webhook_deliveries SET delivery_status = 'pending' WHERE id = $1", delivery("4"))
	b.exec("INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, request_body, attempts) "+
		"SELECT id, webhook_event_id, webhook_endpoint_id, request_url, request_method, '{}', '{\"kept\": 1}', 3 FROM acme.webhook_deliveries WHERE id = $1", delivery("4"))
	b.exec("DELETE FROM acme.webhook_deliveries WHERE id = $1", delivery("4"))
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("4")), "the dead letter has all that was in the row")
	require.Equal(t, `{"kept": 1}`, get[string](b, "SELECT request_body FROM acme.webhook_deliveries WHERE id = $1", delivery("4")))
}

// TestSkipOfWhatWasDelivered: a letter without a body says so, and one that has its body back keeps it.
func TestSkipOfWhatWasDelivered(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	b.exec("DELETE FROM outbox_relay.retry_queue; UPDATE acme.webhook_deliveries SET delivery_status = 'success', request_body = NULL, completed_at = now()")
	again := func() {
		t.Helper()
		require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")))
	}
	letter := func() string {
		t.Helper()
		require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1, 'no more')", delivery("1")))
		return get[string](b, "SELECT concat_ws('|', last_error, request_body) FROM acme.webhook_dead_letters")
	}
	again()
	require.Equal(t, "no more (no body is kept: it can be sent again while its event is there)", letter())
	again()
	b.exec("UPDATE acme.webhook_deliveries SET request_body = '{1}', delivery_status = 'retrying' WHERE id = $1", delivery("1")) // an attempt has failed
	require.Equal(t, "no more|{1}", letter())
}

func TestPauseHoldsAndResumeWakes(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	pause := func() bool {
		return get[bool](b, "SELECT outbox_relay.pause_endpoint('acme', $1, 'they move house')", endpointID)
	}
	resume := func() bool { return get[bool](b, "SELECT outbox_relay.resume_endpoint('acme', $1)", endpointID) }
	state := func() string {
		return get[string](b, "SELECT concat_ws(' ', is_active, paused_at IS NOT NULL, disabled_reason) FROM acme.webhook_endpoints")
	}
	require.True(t, pause())
	require.False(t, pause())
	require.Equal(t, "t t they move house", state())
	b.exec("UPDATE outbox_relay.retry_queue SET due_at = 'infinity'")
	require.True(t, resume())
	require.False(t, resume())
	require.Equal(t, "t f", state())
	require.Equal(t, "1 2* 3* 4* 5*", get[string](b, waiting), "the head alone")

	b.exec("UPDATE acme.webhook_endpoints SET is_active = false, disabled_reason = '410', disabled_at = now()")
	require.True(t, resume())
	require.Equal(t, "t f", state())
}

// TestReplaysDoNotClogTheQueue: a claim looks at a few due rows only, and those must not be ones that wait behind others.
func TestReplaysDoNotClogTheQueue(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	for _, n := range []string{"1", "2", "3", "4"} { // from the front to the back, and then the other way round
		require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery(n)))
	}
	for _, n := range []string{"4", "3", "2", "1"} {
		require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery(n)))
	}
	require.Equal(t, "1 2* 3* 4* 5*", get[string](b, waiting))

	b.exec("UPDATE outbox_relay.retry_queue SET leased_by = gen_random_uuid(), due_at = now() - interval '1 s' WHERE delivery_id = $1", delivery("2"))
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")))
	require.Equal(t, "1 2* 3* 4* 5*", get[string](b, waiting), "a lease that has run out is none")
	require.Zero(t, get[int64](b, "SELECT count(*) FROM outbox_relay.retry_queue WHERE leased_by IS NOT NULL"))
}

// TestReplayWaitsForWhatIsInFlight: an older delivery of a key is not due while a replica has a younger one.
func TestReplayWaitsForWhatIsInFlight(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
	const lease = "UPDATE outbox_relay.retry_queue SET leased_by = gen_random_uuid(), due_at = now() + interval '1 h' WHERE right(delivery_id::text, 1) IN ('2', '3')"
	b.exec(lease) // a run
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")))
	require.Equal(t, "1* 2 3 4* 5*", get[string](b, waiting))

	// What the recorder does once an attempt has ended.
	ended := func(n string) {
		b.exec("DELETE FROM outbox_relay.retry_queue WHERE delivery_id = $1", delivery(n))
		b.exec("SELECT outbox_relay.wake_next('acme', ARRAY[$1::uuid], ARRAY[$1::uuid])", endpointID)
	}
	for _, wake := range []string{"wake('acme', '" + endpointID + "')", "wake_parked_heads()", "resume_endpoint('acme', '" + endpointID + "')"} {
		b.exec("SELECT outbox_relay." + wake)
		require.Equal(t, "1* 2 3 4* 5*", get[string](b, waiting), wake)
	}
	ended("2")
	require.Equal(t, "1* 3 4* 5*", get[string](b, waiting), "the rest of the run is in flight")
	ended("3")
	require.Equal(t, "1 4* 5*", get[string](b, waiting), "the first by its place")

	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
	b.exec("UPDATE outbox_relay.retry_queue SET leased_by = gen_random_uuid(), due_at = now() + interval '1 h' WHERE delivery_id = $1", delivery("4"))
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")))
	b.exec("UPDATE outbox_relay.retry_queue SET due_at = now() - interval '1 s' WHERE delivery_id = $1", delivery("4"))
	require.Equal(t, int64(1), get[int64](b, "SELECT woken FROM outbox_relay.wake_parked_heads()"), "the lease has run out")
	require.Equal(t, "1 4 5*", get[string](b, waiting))
}

// TestControlSeesItsOwnTenant: another one has the same ids, with a delivery in flight that would be the first of the key.
func TestControlSeesItsOwnTenant(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	b.exec("INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, leased_by, order_key, order_lsn, order_n) "+
		"VALUES ($1, 'copy', $2, now() + interval '1 h', gen_random_uuid(), $2, '0/1', 0)", delivery("0"), endpointID)
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
	require.Equal(t, "0 2 3* 4* 5*", get[string](b, waiting))
	require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery("1")))
	require.Equal(t, "0 1 2* 3* 4* 5*", get[string](b, waiting), "by its place")
	b.exec("UPDATE outbox_relay.retry_queue SET due_at = 'infinity' WHERE tenant = 'acme'")
	require.Equal(t, int64(1), get[int64](b, "SELECT outbox_relay.wake('acme', $1)", endpointID))

	// Its delivery has the id of ours as well: nobody takes that for ours.
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
	b.exec("UPDATE outbox_relay.retry_queue SET delivery_id = $1 WHERE tenant = 'copy'", delivery("1"))
	for _, call := range []string{"resend('acme', $1)", "replay('acme', event => (SELECT webhook_event_id FROM acme.webhook_deliveries WHERE id = $1))"} {
		_, err := b.conn.Exec(b.ctx, "SELECT outbox_relay."+call, delivery("1"))
		require.ErrorContains(t, err, "waits for another tenant", call)
	}
	require.Equal(t, int64(1), get[int64](b, "SELECT count(*) FROM acme.webhook_dead_letters WHERE replayed_at IS NULL"))
}

// TestRowsOfTheLogWaitForABackfill: what the log brought of a key does not go before events that are still to be queued from the tables.
func TestRowsOfTheLogWaitForABackfill(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	b.exec("UPDATE outbox_relay.retry_queue SET due_at = 'infinity'")
	b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_upto = pg_current_snapshot(), backfill_done_at = NULL")
	wakes := []string{"wake_parked_heads() w", "wake('acme', '" + endpointID + "') w (woken)", "wake_next('acme', ARRAY['" + endpointID + "'::uuid], ARRAY['" + endpointID + "'::uuid]) w (woken)"}
	for _, wake := range wakes {
		require.Zero(t, get[int64](b, "SELECT w.woken FROM outbox_relay."+wake), wake)
	}
	b.exec("UPDATE outbox_relay.retry_queue SET order_lsn = '0/0' WHERE delivery_id = $1", delivery("1"))
	for _, wake := range wakes {
		require.Equal(t, int64(1), get[int64](b, "SELECT w.woken FROM outbox_relay."+wake), wake)
		require.Equal(t, "1 2* 3* 4* 5*", get[string](b, waiting), wake)
		b.exec("UPDATE outbox_relay.retry_queue SET due_at = 'infinity'")
	}
	b.exec("UPDATE outbox_relay.retry_queue SET order_lsn = '0/1' WHERE delivery_id = $1", delivery("1"))
	b.exec("UPDATE outbox_relay.tenants SET backfill_done_at = now()")
	require.Equal(t, int64(1), get[int64](b, "SELECT woken FROM outbox_relay.wake_parked_heads()"), "the last event is queued")
}

// TestReplaySeesAClaimUnderWay: a claim that has not committed counts, and one that comes later does not get the first row.
func TestReplaySeesAClaimUnderWay(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
	b.exec("BEGIN; UPDATE outbox_relay.retry_queue SET leased_by = gen_random_uuid(), due_at = now() + interval '1 h' WHERE delivery_id = '" + delivery("2") + "'")
	done := b.meanwhile("SELECT outbox_relay.resend('acme', '" + delivery("1") + "')::text")
	b.exec("COMMIT")
	resent := <-done
	require.NoError(t, resent.err)
	require.Equal(t, "true", resent.value)
	require.Equal(t, "1* 2 3* 4* 5*", get[string](b, waiting))
}

// TestControlLocksTheOrderFirst has the recorder hold the order of an endpoint while a function is called, and then want what that function changes.
func TestControlLocksTheOrderFirst(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	for _, n := range []string{"1", "2", "3"} {
		require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery(n)))
	}
	for _, step := range []struct{ call, want string }{
		{"resume_endpoint('acme', '" + endpointID + "')", "UPDATE acme.webhook_endpoints SET is_active = false"},
		{"replay('acme', max => 1)", "UPDATE acme.webhook_dead_letters SET dead_at = now()"},
		{"resend('acme', '" + delivery("2") + "')", "UPDATE acme.webhook_dead_letters SET dead_at = now()"},
		{"skip('acme', '" + delivery("4") + "')", "UPDATE acme.webhook_deliveries SET attempted_at = now()"},
	} {
		b.exec("BEGIN")
		b.exec("SELECT outbox_relay.lock_order('acme', ARRAY[$1::uuid])", endpointID)
		done := b.meanwhile("SELECT outbox_relay." + step.call + "::text")
		b.exec(step.want)
		b.exec("COMMIT")
		require.NoError(t, (<-done).err, step.call)
	}
}

// TestWakingWaitsForNobody has one tenant's table locked and another's broken, and the order of one endpoint taken.
func TestWakingWaitsForNobody(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, tenant := range []string{"a", "b", "c", "d", "e", "f", "g"} {
		b.exec("CREATE SCHEMA " + tenant)
		b.exec("SELECT outbox_relay.add_tenant($1)", tenant)
		b.exec("INSERT INTO " + tenant + ".webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id) VALUES ('e', 'http://127.0.0.1:1/', 's', gen_random_uuid())")
		b.exec("INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT gen_random_uuid(), '" + tenant + "', id, 'infinity' FROM " + tenant + ".webhook_endpoints")
	}
	b.exec("UPDATE c.webhook_endpoints SET paused_at = now()")
	b.exec("DROP TABLE d.webhook_endpoints CASCADE")
	b.exec("ALTER TABLE e.webhook_endpoints RENAME TO behind; CREATE VIEW e.webhook_endpoints AS SELECT * FROM e.behind WHERE 1 / (is_active::int - 1) = 0; GRANT SELECT ON e.webhook_endpoints TO " + schema.RunnerRole)
	_, dsn := b.login("IN ROLE " + schema.RunnerRole)
	relay := connect(t, dsn)
	_, err := relay.Exec(b.ctx, "SET lock_timeout = '1min'")
	require.NoError(t, err)
	b.exec("BEGIN")
	b.exec("LOCK TABLE b.webhook_endpoints")
	b.exec("SELECT outbox_relay.lock_order('f', ARRAY(SELECT id FROM f.webhook_endpoints))")
	began := time.Now()
	var n int64
	require.NoError(t, relay.QueryRow(b.ctx, "SELECT woken FROM outbox_relay.wake_parked_heads()").Scan(&n))
	require.Less(t, time.Since(began), 30*time.Second)
	b.exec("ROLLBACK")
	parked := "SELECT tenant FROM outbox_relay.retry_queue WHERE due_at = 'infinity' ORDER BY 1"
	require.Equal(t, []string{"b", "c", "e", "f"}, list(b, parked), "locked, paused, broken, taken")
	require.EqualValues(t, 3, n)
	require.NoError(t, relay.QueryRow(b.ctx, "SELECT woken FROM outbox_relay.wake_parked_heads()").Scan(&n))
	require.Equal(t, []string{"c", "e"}, list(b, parked))
}

// TestReplayGoesOnBehindAnother: what another call has taken meanwhile is not all there is.
func TestReplayGoesOnBehindAnother(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	for _, n := range []string{"1", "2", "3", "4", "5"} {
		require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery(n)))
	}
	b.exec("BEGIN")
	require.Equal(t, int64(2), get[int64](b, "SELECT outbox_relay.replay('acme', max => 2)"))
	done := b.meanwhile("SELECT outbox_relay.replay('acme', max => 2)::text")
	b.exec("COMMIT")
	other := <-done
	require.NoError(t, other.err)
	require.Equal(t, "2", other.value)
	require.Equal(t, "1 2* 3* 4*", get[string](b, waiting))
}

// TestReplayWhileTheEndpointGoes: what cannot be sent any more is not marked as if it had been.
func TestReplayWhileTheEndpointGoes(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("1")))
	b.exec("BEGIN")
	b.exec("SELECT outbox_relay.lock_order('acme', ARRAY[$1::uuid])", endpointID)
	done := b.meanwhile("SELECT outbox_relay.replay('acme')::text")
	b.exec("DELETE FROM acme.webhook_endpoints")
	b.exec("COMMIT")
	other := <-done
	require.NoError(t, other.err)
	require.Equal(t, "0", other.value)
	require.Equal(t, int64(1), get[int64](b, "SELECT count(*) FROM acme.webhook_dead_letters WHERE replayed_at IS NULL"))
}

// answer is what a statement on another connection led to.
type answer struct {
	value string
	err   error
}

// meanwhile runs a statement with one value on another connection and returns once it waits for a lock.
func (b *bundle) meanwhile(sql string) <-chan answer {
	b.t.Helper()
	other, done := connect(b.t, b.dsn), make(chan answer, 1)
	go func() {
		var a answer
		a.err = other.QueryRow(b.ctx, sql).Scan(&a.value)
		done <- a
	}()
	look := connect(b.t, b.dsn)
	require.Eventually(b.t, func() bool {
		var waits bool
		err := look.QueryRow(b.ctx, "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)", other.PgConn().PID()).Scan(&waits)
		return err == nil && waits
	}, time.Minute, time.Millisecond, sql)
	return done
}

func TestRecoverIsARequest(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	get[int64](b, "SELECT outbox_relay.recover_endpoint('acme', $1, event => 'a0000000-0000-4000-8000-000000000003', rate => 5)", endpointID)
	get[int64](b, "SELECT outbox_relay.recover_endpoint('acme', $1, since => '2026-02-03')", endpointID)
	require.Equal(t, []string{"3 5", "0"}, list(b, "SELECT concat_ws(' ', extract(hour FROM since AT TIME ZONE current_setting('TimeZone')), rate) FROM outbox_relay.recoveries ORDER BY id"))
	b.exec("UPDATE acme.webhook_events SET occurred_at = 'infinity' WHERE id::text LIKE '%5'")
	for _, args := range []string{
		"since => NULL", "since => now(), event => gen_random_uuid()", "event => gen_random_uuid()", "since => 'infinity'", "event => 'a0000000-0000-4000-8000-000000000005'",
		"since => now(), rate => 'NaN'", "since => now(), rate => 1e-13", "since => now(), rate => 0", "since => now(), rate => -1", "since => now(), rate => 1000000.1",
	} {
		_, err := b.conn.Exec(b.ctx, "SELECT outbox_relay.recover_endpoint('acme', '"+endpointID+"', "+args+")")
		var pg *pgconn.PgError
		require.ErrorAs(t, err, &pg, args)
		assert.Equal(t, "OR002", pg.Code, args)
		if strings.Contains(args, "rate") {
			assert.Contains(t, pg.Message, "is not between 0.001 and 1000000", args)
		}
	}
	for _, rate := range []string{"NaN", "1e-13"} {
		_, err := b.conn.Exec(b.ctx, "UPDATE outbox_relay.recoveries SET rate = $1::text::numeric", rate)
		require.ErrorContains(t, err, "recoveries_rate_check")
	}
}

// TestRecoveryOfWhatIsNotActive: the relay would end it at once. Whoever resumes the endpoint may ask for it in the same transaction.
func TestRecoveryOfWhatIsNotActive(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	b.exec("UPDATE acme.webhook_endpoints SET is_active = false")
	const call = "SELECT outbox_relay.recover_endpoint('acme', $1, since => now())"
	_, err := b.conn.Exec(b.ctx, call, endpointID)
	var pg *pgconn.PgError
	require.ErrorAs(t, err, &pg)
	require.Equal(t, "OR002", pg.Code)
	require.Contains(t, pg.Message, "is not active")
	require.Contains(t, pg.Hint, "Resume it first")
	require.Zero(t, get[int64](b, "SELECT count(*) FROM outbox_relay.recoveries"))

	b.exec("BEGIN")
	b.exec("SELECT outbox_relay.resume_endpoint('acme', $1)", endpointID)
	b.exec(call, endpointID)
	b.exec("COMMIT")
	require.Equal(t, int64(1), get[int64](b, "SELECT count(*) FROM outbox_relay.recoveries"))
}

// TestControlOfWhatAPolicyHides: rows of the queue come and go with the rights of the owner, those of the tenant with the caller's. A delivery must not end
// in between, with nothing that works on it, nor a letter stay open whose delivery is sent again.
func TestControlOfWhatAPolicyHides(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	role, app := b.application()
	hide := func(table, column string) {
		b.exec("ALTER TABLE acme." + table + " ENABLE ROW LEVEL SECURITY; CREATE POLICY mine ON acme." + table + " TO " + role + " USING (" + column + "::text !~ '[24]$')")
	}
	call := func(sql, n string) (done bool, err error) {
		err = app.QueryRow(b.ctx, "SELECT outbox_relay."+sql+"('acme', $1)", delivery(n)).Scan(&done)
		return done, err
	}
	refused := func(sql, n, why string) {
		t.Helper()
		_, err := call(sql, n)
		var pg *pgconn.PgError
		require.ErrorAs(t, err, &pg, sql)
		require.Equal(t, "OR002", pg.Code, pg.Message)
		require.Contains(t, pg.Message, why)
		require.NotEmpty(t, pg.Hint)
	}
	does := func(sql, n string) {
		t.Helper()
		done, err := call(sql, n)
		require.NoError(t, err, sql)
		require.True(t, done, sql)
	}
	hide("webhook_deliveries", "id")
	refused("skip", "2", "cannot change delivery "+delivery("2"))
	require.Equal(t, "1 2* 3* 4* 5*", get[string](b, waiting), "it waits as before")
	does("skip", "1")
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("2")), "for who sees it")
	b.exec("DELETE FROM acme.webhook_deliveries WHERE id = $1", delivery("5"))
	refused("skip", "5", "cannot change delivery "+delivery("5"))
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("5")), "its row is gone, who sees all of them can tell")
	require.Equal(t, "3 4*", get[string](b, waiting))

	b.exec("ALTER TABLE acme.webhook_deliveries DISABLE ROW LEVEL SECURITY")
	hide("webhook_dead_letters", "delivery_id")
	refused("resend", "2", "cannot mark the dead letter of delivery "+delivery("2"))
	require.Equal(t, "3 4*", get[string](b, waiting))
	done, err := call("discard", "2")
	require.NoError(t, err)
	require.False(t, done)
	var n int64
	require.NoError(t, app.QueryRow(b.ctx, "SELECT outbox_relay.replay('acme')").Scan(&n))
	require.EqualValues(t, 1, n, "what it sees")
	require.Equal(t, "1 3* 4*", get[string](b, waiting))

	// One that it may see and not change.
	b.exec("CREATE POLICY all_of_them ON acme.webhook_dead_letters FOR SELECT TO " + role + " USING (true)")
	require.NoError(t, app.QueryRow(b.ctx, "SELECT outbox_relay.replay('acme')").Scan(&n))
	require.Zero(t, n)
	refused("resend", "2", "cannot mark the dead letter of delivery "+delivery("2"))
	b.exec("UPDATE acme.webhook_deliveries SET delivery_status = 'success', completed_at = now() WHERE id = $1", delivery("2"))
	does("resend", "2") // it had no letter, for all that is known
	require.True(t, get[bool](b, "SELECT outbox_relay.skip('acme', $1)", delivery("3")))
	b.exec("DELETE FROM acme.webhook_dead_letters WHERE delivery_id = $1", delivery("3")) // it was discarded long ago
	refused("resend", "3", "cannot mark the dead letter of delivery "+delivery("3"))
	b.exec("GRANT " + schema.RunnerRole + " TO " + role)
	does("resend", "3")
}

// controlCalls are the functions for applications, each with the tenant to come.
func controlCalls() []string {
	return []string{
		"pause_endpoint('%s', '" + endpointID + "')", "resume_endpoint('%s', '" + endpointID + "')", "resend('%s', '" + delivery("1") + "')", "replay('%s')",
		"skip('%s', '" + delivery("1") + "')", "discard('%s', '" + delivery("1") + "')", "recover_endpoint('%s', '" + endpointID + "', since => now())",
	}
}

// application logs in with what the README tells to grant for the tenant acme.
func (b *bundle) application() (role string, app *pgx.Conn) {
	b.t.Helper()
	role, dsn := b.login("")
	b.exec("GRANT USAGE ON SCHEMA outbox_relay, acme TO " + role)
	b.exec(grantControl(b.t) + " TO " + role)
	b.exec("GRANT SELECT, UPDATE ON acme.webhook_endpoints TO " + role)
	b.exec("GRANT SELECT, INSERT, UPDATE ON acme.webhook_deliveries, acme.webhook_dead_letters TO " + role)
	b.exec("GRANT SELECT ON acme.webhook_events TO " + role)
	return role, connect(b.t, dsn)
}

// grantControl is the README's own GRANT EXECUTE, up to the role.
func grantControl(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	found := regexp.MustCompile(`GRANT EXECUTE ON FUNCTION outbox_relay\.replay[^;]*?\sTO `).FindString(string(text))
	require.NotEmpty(t, found)
	return strings.TrimSuffix(found, " TO ")
}

func TestControlAsksForLeave(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	b.exec("CREATE SCHEMA other; SELECT outbox_relay.add_tenant('other')")
	role, dsn := b.login("")
	app := connect(t, dsn)
	call := func(sql, tenant, code string) {
		t.Helper()
		_, err := app.Exec(b.ctx, "SELECT outbox_relay."+replaceTenant(sql, tenant))
		if code == "" {
			require.NoError(t, err, sql)
			return
		}
		var pg *pgconn.PgError
		require.ErrorAs(t, err, &pg, sql)
		require.Equal(t, code, pg.Code, sql)
	}
	for _, sql := range controlCalls() {
		call(sql, "acme", "42501")
	}
	b.exec("GRANT USAGE ON SCHEMA outbox_relay TO " + role)
	b.exec(grantControl(t) + " TO " + role)
	for _, sql := range controlCalls() {
		call(sql, "acme", "42501")
	}
	b.exec("GRANT USAGE ON SCHEMA acme TO " + role)
	b.exec("GRANT SELECT, UPDATE ON acme.webhook_endpoints TO " + role)
	b.exec("GRANT SELECT, INSERT, UPDATE ON acme.webhook_deliveries, acme.webhook_dead_letters TO " + role)
	b.exec("GRANT SELECT ON acme.webhook_events TO " + role)
	for _, sql := range controlCalls() {
		call(sql, "acme", "")
		call(sql, "other", "42501")
		call(sql, "nosuch", "OR002")
	}
	_, err := app.Exec(b.ctx, "DELETE FROM outbox_relay.retry_queue")
	require.Error(t, err, "it has no rights of the relay's")
	b.exec("REVOKE ALL ON acme.webhook_endpoints FROM " + role)
	call(controlCalls()[0], "acme", "42501")
	b.exec("GRANT " + schema.RunnerRole + " TO " + role)
	call(controlCalls()[0], "acme", "")
}

// TestNoTenantsCodeRunsWithTheOwnersRights has every tenant table be a view with a function in it over a table with triggers, which note with whose
// rights they run.
func TestNoTenantsCodeRunsWithTheOwnersRights(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	role, app := b.application()
	b.exec("CREATE TABLE acme.spied (who text)")
	b.exec("GRANT INSERT ON acme.spied TO public")
	b.exec(`CREATE FUNCTION acme.spy() RETURNS boolean LANGUAGE plpgsql AS 'BEGIN INSERT INTO acme.spied VALUES (current_user); RETURN true; END';
		CREATE FUNCTION acme.on_write() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN INSERT INTO acme.spied VALUES (current_user); RETURN NEW; END'`)
	for _, table := range []string{"webhook_endpoints", "webhook_events", "webhook_deliveries", "webhook_dead_letters"} {
		b.exec("ALTER TABLE acme." + table + " RENAME TO " + table + "_behind")
		b.exec("CREATE TRIGGER spy BEFORE INSERT OR UPDATE ON acme." + table + "_behind FOR EACH ROW EXECUTE FUNCTION acme.on_write()")
		b.exec("CREATE VIEW acme." + table + " AS SELECT * FROM acme." + table + "_behind WHERE acme.spy()")
		b.exec("GRANT SELECT, INSERT, UPDATE ON acme." + table + " TO " + role + ", " + schema.RunnerRole)
	}
	for _, sql := range controlCalls() {
		b.exec("TRUNCATE acme.spied")
		// What cannot be done to a view is refused, which is as good.
		_, _ = app.Exec(b.ctx, "SELECT outbox_relay."+replaceTenant(sql, "acme"))
		require.Equal(t, []string{role}, list(b, "SELECT DISTINCT who FROM acme.spied"), sql)
	}
	b.exec("TRUNCATE acme.spied; UPDATE outbox_relay.retry_queue SET due_at = 'infinity'; GRANT " + schema.RunnerRole + " TO " + role)
	_, err := app.Exec(b.ctx, "SELECT woken FROM outbox_relay.wake_parked_heads()")
	require.NoError(t, err)
	require.Equal(t, []string{role}, list(b, "SELECT DISTINCT who FROM acme.spied"))
}

func replaceTenant(call, tenant string) string { return strings.Replace(call, "%s", tenant, 1) }

// TestReplayOfNoAggregate: the nil UUID stands for no aggregate, by which nothing waits for anything.
func TestReplayOfNoAggregate(t *testing.T) {
	t.Parallel()
	b := controlled(t)
	b.exec("DELETE FROM outbox_relay.retry_queue")
	b.exec("UPDATE acme.webhook_endpoints SET delivery_order = 'aggregate'")
	b.exec("UPDATE acme.webhook_events SET aggregate_id = '00000000-0000-0000-0000-000000000000' WHERE id::text ~ '[123]$'")
	for _, n := range []string{"1", "2", "4"} {
		require.True(t, get[bool](b, "SELECT outbox_relay.resend('acme', $1)", delivery(n)))
	}
	require.Equal(t, []string{"1 false", "2 false", "4 true"}, list(b, "SELECT right(delivery_id::text, 1) || ' ' || (order_key IS NOT NULL) FROM outbox_relay.retry_queue ORDER BY 1"))
}
