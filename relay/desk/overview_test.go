package desk_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func (b *bundle) survey(tenants ...string) *desk.Overview {
	b.t.Helper()
	o, err := desk.Survey(b.ctx, connect(b.t, b.dsn), []string{b.slot}, tenants, time.Minute)
	require.NoError(b.t, err)
	return o
}

func TestSurveyOfAQuietDatabase(t *testing.T) {
	t.Parallel()
	b := setup(t)
	o := b.survey("acme")
	assert.Empty(t, o.Gaps)
	require.Len(t, o.Slots, 1)
	s := o.Slots[0]
	assert.True(t, s.Exists)
	assert.Nil(t, s.Leader)
	assert.Equal(t, "reserved", s.WALStatus)
	assert.Nil(t, s.Limit, "max_slot_wal_keep_size is not set")
	assert.Zero(t, o.Queue.Total)
	assert.Nil(t, o.Deliveries.Success)
	assert.Empty(t, o.Endpoints.Worst)
	assert.WithinDuration(t, time.Now(), o.At.Time, time.Minute)

	o, err := desk.Survey(b.ctx, connect(t, b.dsn), []string{"nosuchslot"}, nil, time.Minute)
	require.NoError(t, err)
	assert.False(t, o.Slots[0].Exists)
	_, err = desk.Survey(b.ctx, connect(t, pgtest.Database(t)), []string{b.slot}, nil, time.Minute)
	assert.Equal(t, "run: outbox-relay migrate", hint(err))
}

func TestSurvey(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`CREATE SCHEMA "odd ""one"`)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, `odd "one`, schema.AddOptions{}))
	b.exec(`CREATE SCHEMA broken`)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "broken", schema.AddOptions{}))
	b.exec(`ALTER TABLE broken.webhook_dead_letters RENAME dead_at TO gone`)

	healthy, failing, shut := b.endpoint("healthy", "none"), b.endpoint("failing", "none"), b.endpoint("shut", "none")
	disabled, paused, ordered := b.endpoint("disabled", "none"), b.endpoint("paused", "none"), b.endpoint("ordered", "strict")
	b.exec(`UPDATE acme.webhook_endpoints SET is_active = false, disabled_at = now(), disabled_reason = 'gone' WHERE id = $1`, disabled)
	b.exec(`UPDATE acme.webhook_endpoints SET paused_at = now(), disabled_reason = 'they move house' WHERE id = $1`, paused)
	b.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, failing_since, failed_at, open_until, last_error) VALUES
		('acme', $1, now() - interval '1 hour', now(), NULL, 'answered 500'), ('acme', $2, NULL, NULL, now() + interval '1 hour', 'answered 503'),
		('elsewhere', $1, now() - interval '1 day', now(), NULL, 'is another endpoint')`, failing, shut)
	ev := outbox.NewUUID
	for range 8 {
		b.deliver(ev(), healthy, "success", "")
	}
	old := b.deliver(ev(), healthy, "success", "created_at = now() - interval '2 minutes'")
	b.bury(old, "now() - interval '2 hours'")
	for range 2 {
		b.bury(b.deliver(ev(), failing, "failed", ""), "now()")
	}
	// One of them was given up without an attempt.
	b.exec(`UPDATE acme.webhook_deliveries SET response_time_ms = NULL WHERE id = (SELECT delivery_id FROM acme.webhook_dead_letters WHERE webhook_endpoint_id = $1 LIMIT 1)`, failing)
	b.exec(`UPDATE acme.webhook_dead_letters SET discarded_at = now() WHERE delivery_id = (SELECT delivery_id FROM acme.webhook_dead_letters WHERE webhook_endpoint_id = $1 LIMIT 1)`, failing)
	for range 3 {
		b.queue(b.deliver(ev(), shut, "pending", "error_code = 'deferred', error_message = 'breaker'"), shut, "now() - interval '90 s'", "")
	}
	b.queue(b.deliver(ev(), healthy, "pending", ""), healthy, "now() - interval '60 s'", "")
	head := b.deliver(ev(), ordered, "retrying", "error_code = 'http_5xx', error_message = 'answered 500', attempt_number = 2, response_time_ms = 5")
	b.queue(head, ordered, "now() + interval '5 minutes'", "'"+ordered.String()+"', '0/1', 1")
	for _, n := range []string{"2", "3"} {
		b.queue(b.deliver(ev(), ordered, "pending", ""), ordered, "'infinity'", "'"+ordered.String()+"', '0/1', "+n)
	}
	for _, n := range []string{"1", "2"} {
		b.queue(b.deliver(ev(), paused, "pending", ""), paused, "'infinity'", "'"+paused.String()+"', '0/1', "+n)
	}
	b.exec(`INSERT INTO outbox_relay.recoveries (tenant, endpoint_id, since, rate, scanned, queued, error) VALUES
		('acme', $1, now(), 2.5, 7, 3, NULL), ('acme', $1, now(), NULL, 0, 0, 'its endpoint is gone')`, disabled)

	b.exec(`UPDATE acme.webhook_deliveries SET created_at = now() WHERE id <> $1`, old) // the machine may have been slow till here
	o := b.survey("acme", "broken", `odd "one`, "nosuchtenant")
	assert.Len(t, o.Gaps, 3, "%v", o.Gaps)
	assert.Contains(t, o.Gap(desk.PartEndpoints), "tenant broken: column")
	assert.Contains(t, o.Gap(desk.PartDeliveries), "tenant nosuchtenant: relation")

	assert.Equal(t, map[string]desk.Count{"success": {N: 8}, "failed": {N: 2}, "pending": {N: 8}, "retrying": {N: 1}}, o.Deliveries.PerMinute)
	assert.InDelta(t, 8./10, *o.Deliveries.Success, .001)
	assert.InDelta(t, 1.9, o.Deliveries.PerSecond, .001)

	q := &o.Queue
	assert.Equal(t, desk.Count{N: 9}, q.Total)
	assert.Equal(t, desk.Count{N: 1}, q.Due)
	assert.InDelta(t, 60, q.OldestDue, 30)
	assert.Equal(t, desk.Count{N: 3}, q.Shut)
	assert.Equal(t, desk.Count{N: 4}, q.Parked)
	require.Len(t, q.Worst, 4)
	first := q.Worst[0]
	if first.EndpointID == ordered { // as many wait for it
		first = q.Worst[1]
	}
	assert.Equal(t, "shut", first.Name)
	assert.Equal(t, int64(3), first.Due)
	assert.Equal(t, map[string]int64{"breaker": 3}, first.Reasons)
	require.Len(t, q.Blocked, 1, "what is paused does not wait behind anything")
	assert.Equal(t, int64(2), q.Blocked[0].Behind)
	assert.Equal(t, head, q.Blocked[0].HeadID)
	assert.Equal(t, 2, q.Blocked[0].Attempts)
	assert.Equal(t, "http_5xx", q.Blocked[0].Reason)

	e := &o.Endpoints
	assert.Equal(t, []desk.Count{{N: 1}, {N: 1}, {N: 1}, {N: 1}}, []desk.Count{e.Failing, e.Open, e.Disabled, e.Paused})
	var names []string
	for _, x := range e.Worst {
		names = append(names, x.Name)
	}
	assert.Equal(t, "failing shut disabled paused", strings.Join(names, " "))
	assert.Equal(t, "answered 500", e.Worst[0].State.LastError)

	assert.Equal(t, desk.Count{N: 2}, o.Letters.Open)
	assert.Equal(t, desk.Count{N: 1}, o.Letters.LastHour)
	require.Len(t, o.Letters.Worst, 2)

	require.Len(t, o.Recoveries, 1)
	r := &o.Recoveries[0]
	assert.Equal(t, []any{"acme", disabled, 2.5, int64(7), int64(3)}, []any{r.Tenant, r.EndpointID, r.Rate, r.Scanned, r.Queued})
}

// What has piled up is counted to a limit, and the number says so.
func TestSurveyIsBounded(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("slow", "none")
	b.exec(`INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, attempts)
		SELECT gen_random_uuid(), gen_random_uuid(), $1, '', '', '{}', 1 FROM generate_series(1, 301)`, endpoint)
	o := b.survey("acme")
	assert.Empty(t, o.Gaps)
	assert.Equal(t, desk.Count{N: 300, More: true}, o.Letters.Open)
	assert.Equal(t, desk.Count{N: 300, More: true}, o.Letters.LastHour)
}

// Of more tenants than can be looked into, those in trouble are.
func TestSurveyOfManyTenants(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("off", "none")
	b.exec(`UPDATE acme.webhook_endpoints SET is_active = false, disabled_at = now() WHERE id = $1`, endpoint)
	b.exec(`DO $$ DECLARE t text; BEGIN
		FOR t IN SELECT 't' || n FROM generate_series(1, 200) n UNION ALL SELECT 'zoo' LOOP
			EXECUTE format('CREATE SCHEMA %1$s CREATE VIEW webhook_endpoints AS SELECT * FROM acme.webhook_endpoints WHERE %2$L::bool
				CREATE VIEW webhook_dead_letters AS SELECT * FROM acme.webhook_dead_letters CREATE VIEW webhook_deliveries AS SELECT * FROM acme.webhook_deliveries WHERE %2$L::bool', t, t = 'zoo');
		END LOOP; END $$`)
	b.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id) VALUES ('zoo', gen_random_uuid()), ('gone', gen_random_uuid())`)
	var tenants []string
	for n := range 200 {
		tenants = append(tenants, fmt.Sprintf("t%d", n+1))
	}
	b.exec(`INSERT INTO acme.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method, relayed, created_at)
		SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::int8), 12, '0') || '7' || substr(replace(gen_random_uuid()::text, '-', ''), 14))::uuid, gen_random_uuid(), $1, 'success', '', '', true,
		now() - interval '2 s' FROM generate_series(1, 200)`, endpoint)
	o := b.survey(append(tenants, "zoo")...)
	assert.Equal(t, []desk.Gap{{desk.PartEndpoints, "only 200 of 201 tenants were looked into"}}, o.Gaps)
	require.Len(t, o.Endpoints.Worst, 1)
	assert.Equal(t, "zoo", o.Endpoints.Worst[0].Tenant)
	span := o.At.Sub(get[time.Time](b, `SELECT min(created_at) FROM acme.webhook_deliveries`)).Seconds()
	require.Less(t, span, 10., "the test is too slow to see a rate")
	assert.InEpsilon(t, 99/span, o.Deliveries.PerSecond, .001, "of the 99 that are looked at, the rate within their time")
}

func TestSurveyGoesRoundLocks(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`CREATE SCHEMA free`)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "free", schema.AddOptions{}))
	b.exec(`INSERT INTO free.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id, is_active, disabled_at) VALUES ('off', '', '', gen_random_uuid(), false, now())`)
	c := connect(t, b.dsn)
	_, err := c.Exec(b.ctx, `BEGIN; LOCK TABLE acme.webhook_endpoints`)
	require.NoError(t, err)
	o := b.survey("acme", "free")
	assert.Equal(t, []desk.Gap{{desk.PartEndpoints, "tenant acme: somebody has locked it"}}, o.Gaps)
	assert.Equal(t, desk.Count{N: 1}, o.Endpoints.Disabled)
	_, err = c.Exec(b.ctx, `ROLLBACK`)
	require.NoError(t, err)
}

// Many locks cost no more time than one part has: the rest of the overview is there.
func TestSurveyDoesNotWaitForEachLock(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`DO $$ BEGIN FOR n IN 1 .. 40 LOOP
		EXECUTE format('CREATE SCHEMA t%s CREATE TABLE webhook_deliveries (LIKE acme.webhook_deliveries) CREATE TABLE webhook_endpoints (LIKE acme.webhook_endpoints)', n);
	END LOOP; END $$`)
	tenants, lock := []string{}, "BEGIN"
	for n := range 40 {
		tenants = append(tenants, fmt.Sprintf("t%d", n+1))
		lock += fmt.Sprintf("; LOCK TABLE t%[1]d.webhook_deliveries, t%[1]d.webhook_endpoints", n+1)
	}
	c := connect(t, b.dsn)
	_, err := c.Exec(b.ctx, lock)
	require.NoError(t, err)
	began := time.Now()
	o, err := desk.Survey(b.ctx, connect(t, b.dsn), []string{b.slot}, tenants, desk.OverviewPatience)
	require.NoError(t, err)
	assert.Less(t, time.Since(began), 10*time.Second, "what outbox-relay status has for all of it")
	for _, part := range []string{desk.PartDeliveries, desk.PartEndpoints} {
		assert.Regexp(t, `[0-9]+ of 40 tenants were left out: it took too long$`, o.Gap(part))
	}
	_, err = c.Exec(b.ctx, `ROLLBACK`)
	require.NoError(t, err)
}

// Nor do many looks at a slow server, none of which takes too long by itself.
func TestSurveyOfASlowQueue(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(`ALTER TABLE acme.webhook_deliveries RENAME TO fast`)
	b.exec(`CREATE VIEW acme.webhook_deliveries AS SELECT d.* FROM acme.fast d, (SELECT pg_sleep(1) OFFSET 0) s`)
	for n := range 5 {
		endpoint := b.endpoint(fmt.Sprint("slow", n), "strict")
		for range 2 {
			id := outbox.NewUUID()
			b.exec(`INSERT INTO acme.fast (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method) VALUES ($1, gen_random_uuid(), $2, 'pending', '', '')`, id, endpoint)
			b.exec(`SELECT outbox_relay.enqueue('acme', $1, $2, now(), $2, '0/1', 0)`, id, endpoint)
		}
	}
	o, err := desk.Survey(b.ctx, connect(t, b.dsn), []string{b.slot}, nil, 4*time.Second)
	require.NoError(t, err)
	assert.Equal(t, "it took too long", o.Gap(desk.PartQueue))
	assert.Equal(t, desk.Count{N: 10}, o.Queue.Total)
	assert.Len(t, o.Queue.Worst, 5)
	assert.Len(t, o.Queue.Blocked, 5)
	assert.NotEmpty(t, o.Queue.Worst[0].Reasons)
	assert.Empty(t, o.Queue.Worst[4].Reasons, "the first took all the time there was")
}

// A burst is looked at as far as the latest of it, and counted as that, not as what a minute of it would be.
func TestSurveyOfABurst(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("slow", "none")
	const insert = `INSERT INTO acme.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method, response_time_ms, created_at)
		SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000)::int8), 12, '0') || '70008000' || lpad(to_hex(i), 12, '0'))::uuid, gen_random_uuid(), $1::uuid, 'retrying', '', '',
		5, now() - interval '1 s' FROM generate_series(1, 25000) i`
	b.exec(insert, endpoint)
	b.exec(`UPDATE acme.webhook_deliveries SET delivery_status = 'success' WHERE id IN (SELECT id FROM acme.webhook_deliveries ORDER BY id DESC LIMIT 5000)`)
	f := &b.survey("acme").Deliveries
	assert.Equal(t, desk.Count{N: 20000, More: true}, f.Looked)
	assert.Equal(t, map[string]desk.Count{"success": {N: 5000, More: true}, "retrying": {N: 15000, More: true}}, f.PerMinute)
	assert.InDelta(t, .25, *f.Success, 0)
}
