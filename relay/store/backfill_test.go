package store_test

import (
	"encoding/json"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// event inserts an event; set, if not empty, is more of columns and values.
func (b *bundle) event(tenant, columns, values string) outbox.UUID {
	b.t.Helper()
	return get[outbox.UUID](b, "INSERT INTO "+tenant+".webhook_events (id, event_type, aggregate_id, aggregate_type"+columns+`)
		VALUES ($1, 'order.created', gen_random_uuid(), 'order'`+values+") RETURNING id", outbox.NewUUID())
}

func ids(p *store.Page) []outbox.UUID {
	var list []outbox.UUID
	for i := range p.Events {
		list = append(list, p.Events[i].ID)
	}
	return list
}

func (b *bundle) pages(epoch int64, tenant string, n int) []outbox.UUID {
	b.t.Helper()
	var all []outbox.UUID
	for range 100 {
		p := b.page(tenant, n)
		all = append(all, ids(p)...)
		require.NoError(b.t, b.store.RecordBackfill(b.t.Context(), epoch, p, nil))
		if p.Done {
			return all
		}
	}
	b.t.Fatal("no end")
	return nil
}

func TestBackfillModes(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	names, err := b.store.Backfills(t.Context())
	require.NoError(t, err)
	assert.Empty(t, names)
	assert.True(t, b.page("a", 10).Done)

	old := b.event("a", ", occurred_at, xid", ", now() - interval '2 days', NULL")
	done := b.event("a", ", processed_at, xid", ", now(), NULL")
	recent := b.event("a", ", xid", ", NULL")
	present := b.event("a", "", "")
	running, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = running.Exec(t.Context(), "INSERT INTO a.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('x.y', gen_random_uuid(), 'x')")
	require.NoError(t, err)
	mark := get[string](b, "SELECT pg_current_snapshot()::text")
	missed := b.event("a", ", processed_at", ", now()")
	upto := get[string](b, "SELECT pg_current_snapshot()::text")
	require.NoError(t, running.Commit(t.Context()))
	b.event("a", "", "") // comes with the log

	set := `UPDATE outbox_relay.tenants SET backfill = $1, backfill_since = now() - interval '1 day', backfill_from = $2, backfill_upto = $3, backfill_border = $4,
		backfill_cursor = NULL, backfill_done_at = NULL`
	for _, test := range []struct {
		mode         string
		from, border *string
		want         []outbox.UUID
	}{
		{"unprocessed", nil, nil, []outbox.UUID{old, recent, present}},
		{"unprocessed", nil, &mark, []outbox.UUID{old, recent, present, missed}},
		{"since", nil, nil, []outbox.UUID{done, recent, present, missed}},
		{"missed", &mark, nil, []outbox.UUID{missed}},
		{"missed", nil, nil, []outbox.UUID{old, done, recent, present, missed}},
	} {
		for _, n := range []int{1, 2, 100} {
			b.exec(set, test.mode, test.from, upto, test.border)
			names, err = b.store.Backfills(t.Context())
			require.NoError(t, err)
			require.Equal(t, []store.Backfill{{Tenant: "a", Upto: upto}}, names)
			assert.Equal(t, test.want, b.pages(p.Epoch, "a", n), test.mode)
			names, err = b.store.Backfills(t.Context())
			require.NoError(t, err)
			require.Empty(t, names)
		}
	}
}

func TestBackfillEvent(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	id := b.event("a", ", event_name, aggregate_version, event_data, event_metadata, correlation_id, occurred_at, context_id",
		`, 'Order', 3, '{"b": 1.50, "a": 12345678901234567890}', '{"traceparent": "x"}', '01890a5d-ac96-774b-bcce-b302099a8057', '2026-01-02 03:04:05.678901+00', NULL`)
	odd := b.event("a", ", occurred_at, event_data", ", 'infinity', 'null'")
	b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_upto = pg_current_snapshot()")
	p := b.page("a", 10)
	require.Equal(t, []outbox.UUID{id, odd}, ids(p))
	assert.True(t, p.Done)
	e := p.Events[0]
	correlation, err := outbox.ParseUUID("01890a5d-ac96-774b-bcce-b302099a8057")
	require.NoError(t, err)
	assert.False(t, e.AggregateID.IsZero())
	assert.True(t, e.OccurredAt.Equal(time.Date(2026, 1, 2, 3, 4, 5, 678901000, time.UTC)))
	e.AggregateID, e.OccurredAt = outbox.UUID{}, time.Time{}
	assert.Equal(t, outbox.Event{
		ID: id, Type: "order.created", Name: "Order", AggregateType: "order", AggregateVersion: 3, CorrelationID: correlation,
		Data: json.RawMessage(`{"a": 12345678901234567890, "b": 1.50}`), Metadata: json.RawMessage(`{"traceparent": "x"}`),
	}, e)
	assert.Equal(t, 9999, p.Events[1].OccurredAt.Year())
	assert.Equal(t, "null", string(p.Events[1].Data))

	// What an adopted table allows keeps no backfill: those of its events that can be sent come after it.
	b.exec(`ALTER TABLE a.webhook_events ALTER event_type DROP NOT NULL, ALTER aggregate_version TYPE int8`)
	b.exec("UPDATE a.webhook_events SET event_type = NULL WHERE id = $1", id)
	b.exec("UPDATE a.webhook_events SET aggregate_version = 1764000000000 WHERE id = $1", odd)
	b.exec("UPDATE outbox_relay.tenants SET backfill_upto = pg_current_snapshot()")
	p = b.page("a", 10)
	require.Equal(t, []outbox.UUID{id, odd}, ids(p))
	assert.Empty(t, p.Events[0].Type)
	assert.Equal(t, int32(math.MaxInt32), p.Events[1].AggregateVersion)
}

// Large events make short pages, and a short page is not the end.
func TestBackfillLargeEvents(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	var want []outbox.UUID
	for range 5 {
		want = append(want, b.event("a", ", event_data", ", '\""+strings.Repeat("x", 5<<20)+"\"'"))
	}
	b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_upto = pg_current_snapshot()")
	assert.Len(t, b.page("a", 100).Events, 2)
	assert.Equal(t, want, b.pages(p.Epoch, "a", 100))
}

// TestBackfillUnreadable: an event whose text would have more than 1 GB can be stored, but not read. It keeps no other from being queued, whatever the plan. Here it is
// a type that says so of a value, which costs less.
func TestBackfillUnreadable(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	b.exec(`CREATE TYPE public.vast`)
	b.exec(`CREATE FUNCTION public.vast_in(cstring) RETURNS public.vast LANGUAGE internal STRICT IMMUTABLE AS 'textin'`)
	b.exec(`CREATE FUNCTION public.vast_out(public.vast) RETURNS cstring LANGUAGE internal STRICT IMMUTABLE AS 'textout'`)
	b.exec(`CREATE TYPE public.vast (INPUT = public.vast_in, OUTPUT = public.vast_out, LIKE = text)`)
	b.exec(`CREATE FUNCTION public.vast_text(v public.vast) RETURNS text LANGUAGE plpgsql IMMUTABLE COST 0.00001 AS $$
		BEGIN IF pg_column_size(v) > 100 THEN RAISE program_limit_exceeded; END IF; RETURN '{}'; END $$`)
	b.exec(`CREATE CAST (public.vast AS text) WITH FUNCTION public.vast_text`)
	b.exec(`ALTER TABLE a.webhook_events ALTER event_data DROP DEFAULT, ALTER event_data TYPE public.vast USING '{}'`)
	var want []outbox.UUID
	for i := range 12 {
		if slices.Contains([]int{0, 4, 5, 11}, i) {
			b.event("a", ", event_data", ", '"+strings.Repeat("x", 200)+"'")
		} else {
			want = append(want, b.event("a", ", event_data", ", '{}'"))
		}
	}
	for _, scan := range []string{"on", "off"} { // without the index all rows are made before they are sorted
		b.exec("ALTER DATABASE " + b.admin.Config().ConnConfig.Database + " SET enable_indexscan = " + scan)
		b.store = b.open()
		for _, n := range []int{1, 3, 100} {
			b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_upto = pg_current_snapshot(), backfill_cursor = NULL, backfill_done_at = NULL")
			assert.Equal(t, want, b.pages(p.Epoch, "a", n), "%d", n)
		}
	}
}

func TestRecordBackfill(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	e, gone := b.endpoint("a"), b.endpoint("a")
	one, two := b.event("a", "", ""), b.event("a", "", "")
	start := func() {
		b.exec("UPDATE outbox_relay.tenants SET state = 'active', backfill = 'missed', backfill_upto = pg_current_snapshot(), backfill_cursor = NULL, backfill_done_at = NULL")
	}
	start()
	outcomes := func(events ...outbox.UUID) (list []store.Outcome) {
		for _, id := range events {
			for _, endpoint := range []outbox.UUID{e, gone} {
				d := deliver("a", endpoint)
				d.EventID = id
				list = append(list, deferred(d, 0))
			}
		}
		return list
	}
	sent := deliver("a", e)
	sent.EventID = one
	b.record(succeeded(sent))
	b.exec("DELETE FROM a.webhook_endpoints WHERE id = $1", gone) // while its page is matched: who claims these finds it out

	// An epoch that is over moves nothing.
	page := b.page("a", 1)
	require.ErrorIs(t, b.store.RecordBackfill(t.Context(), p.Epoch-1, page, outcomes(one)), store.ErrFenced)
	assert.Equal(t, 1, b.count("a.webhook_deliveries"))
	// A page that is recorded twice, as after an unclear commit, moves the cursor once.
	for range 2 {
		require.NoError(t, b.store.RecordBackfill(t.Context(), p.Epoch, page, outcomes(one)))
		assert.Equal(t, one.String()+"|-", b.row("backfill_cursor, backfill_done_at", "outbox_relay.tenants"))
	}
	assert.Equal(t, "success", b.row("delivery_status", "a.webhook_deliveries WHERE webhook_endpoint_id = $1", e), "what has been recorded is not queued again")

	// A backfill that begins anew has its cursor to itself.
	page = b.page("a", 5)
	require.True(t, page.Done)
	start()
	require.NoError(t, b.store.RecordBackfill(t.Context(), p.Epoch, page, outcomes(two)))
	assert.Equal(t, "-|-", b.row("backfill_cursor, backfill_done_at", "outbox_relay.tenants"))
	assert.Equal(t, []outbox.UUID{one, two}, b.pages(p.Epoch, "a", 5))
	assert.Equal(t, two.String()+"|true", b.row("backfill_cursor, backfill_done_at IS NOT NULL", "outbox_relay.tenants"))
	assert.Equal(t, 4, b.count("a.webhook_deliveries"))
	assert.Equal(t, 3, b.count("outbox_relay.retry_queue"))

	// A tenant that cannot be written to is suspended, and its backfill is still to be done.
	start()
	page = b.page("a", 5)
	b.exec("REVOKE INSERT ON a.webhook_deliveries FROM outbox_relay_runner")
	err = b.store.RecordBackfill(t.Context(), p.Epoch, page, outcomes(two))
	var te *store.TenantError
	require.ErrorAs(t, err, &te)
	assert.True(t, te.Suspended)
	assert.Equal(t, "suspended|missed|-|-|-", b.row("state, backfill, backfill_cursor, backfill_done_at, backfill_upto", "outbox_relay.tenants"))

	b.exec("REVOKE SELECT ON a.webhook_events FROM outbox_relay_runner")
	start()
	_, err = b.store.BackfillPage(t.Context(), "a", 5)
	require.ErrorAs(t, err, &te)
}

func TestBackfillTakesUpWhatWaits(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	e, key := b.endpoint("a"), outbox.NewUUID()
	var out []store.Outcome
	events := make([]outbox.UUID, 6)
	for i := range events {
		events[i] = b.event("a", "", "")
		d := deliver("a", e)
		d.EventID = events[i]
		switch i {
		case 0:
			out = append(out, succeeded(d))
		case 1:
			out = append(out, failed(d, store.Failed))
		case 2, 3:
			d.Order = store.Place{Key: key, LSN: pglogrepl.LSN(1000 + i)}
			out = append(out, failed(d, store.Retrying))
		case 4:
			out = append(out, deferred(d, time.Hour))
		}
	}
	b.record(out...)
	// One of another dispatcher has nothing to do with the queue.
	b.exec(`INSERT INTO a.webhook_deliveries (webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method) VALUES ($1, $2, 'retrying', 'u', 'POST')`, events[1], e)

	backfill := func(tenant string) {
		b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_upto = pg_current_snapshot(), backfill_place = '0/FFFF', backfill_cursor = NULL, backfill_done_at = NULL WHERE schema = $1", tenant)
		page := b.page(tenant, 10)
		require.True(t, page.Done)
		var outcomes []store.Outcome
		for i := range page.Events {
			d := deliver(tenant, e)
			d.EventID, d.Order = page.Events[i].ID, store.Place{LSN: page.Places[i]}
			if i == 2 || i == 3 {
				d.Order.Key = key
			}
			o := deferred(d, 0)
			o.Reason = store.DeferBackfill
			outcomes = append(outcomes, o)
		}
		require.NoError(t, b.store.RecordBackfill(t.Context(), p.Epoch, page, outcomes))
	}
	const queue = `string_agg(q.tenant || ' ' || array_position($1::uuid[], d.webhook_event_id) || ' ' || d.attempt_number || ' ' ||
		CASE WHEN q.due_at = 'infinity' THEN 'parked' WHEN q.due_at <= now() THEN 'due' ELSE 'later' END, ', ' ORDER BY array_position($1::uuid[], d.webhook_event_id))`
	state := func(tenant string) string {
		return b.row(queue, "outbox_relay.retry_queue q JOIN "+tenant+".webhook_deliveries d ON d.id = q.delivery_id", events)
	}
	backfill("a")
	assert.Equal(t, "a 3 1 later, a 4 1 parked, a 5 1 later, a 6 1 due", state("a"), "what is in the queue stays as it is")

	// Its schema is renamed: the queue has the old name, which is removed.
	b.exec("ALTER SCHEMA a RENAME TO z")
	b.exec("SELECT outbox_relay.remove_tenant('a')")
	b.exec("SELECT outbox_relay.add_tenant('z')")
	assert.Zero(t, b.count("outbox_relay.retry_queue"))
	for range 2 {
		backfill("z")
		assert.Equal(t, "z 3 1 due, z 4 1 parked, z 5 1 due, z 6 1 due", state("z"), "in the order of the events of a key, and with their attempts")
	}
}

// TestTakingUpNeedsNoLock: an application may hold that of an endpoint for as long as it likes, which is no reason to suspend its tenant.
func TestTakingUpNeedsNoLock(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	left := deliver("a", b.endpoint("a"))
	left.EventID = b.event("a", "", "")
	b.record(failed(left, store.Retrying))
	b.exec("DELETE FROM outbox_relay.retry_queue")
	b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_upto = pg_current_snapshot()")
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "SELECT outbox_relay.lock_order('a', ARRAY[$1::uuid])", left.EndpointID)
	require.NoError(t, err)
	again := deliver("a", left.EndpointID)
	again.EventID = left.EventID
	o := deferred(again, 0)
	o.Reason = store.DeferBackfill
	err = b.store.RecordBackfill(t.Context(), p.Epoch, b.page("a", 10), []store.Outcome{o})
	require.NoError(t, tx.Rollback(t.Context()))
	require.NoError(t, err)
	assert.Equal(t, left.ID.String()+"|true", b.row("delivery_id, due_at <= now()", "outbox_relay.retry_queue"))
}

// TestBackfillDoesNotReadAllForEachPage: what was missed came after the server has counted the table last.
func TestBackfillDoesNotReadAllForEachPage(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	const insert = `INSERT INTO a.webhook_events (event_type, aggregate_id, aggregate_type) SELECT 'order.created', gen_random_uuid(), 'order' FROM generate_series(1, $1::int)`
	b.exec("ALTER TABLE a.webhook_events SET (autovacuum_enabled = off)")
	b.exec(insert, 100_000)
	b.exec("ANALYZE a.webhook_events")
	from := get[string](b, "SELECT pg_current_snapshot()::text")
	b.exec(insert, 100_000)
	b.exec("UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_from = $1::pg_snapshot, backfill_upto = pg_current_snapshot()", from)
	db := b.open()
	for range 3 {
		p, err := db.BackfillPage(t.Context(), "a", 500)
		require.NoError(t, err)
		require.Len(t, p.Events, 500)
		require.NoError(t, db.RecordBackfill(t.Context(), get[int64](b, "SELECT epoch FROM outbox_relay.progress"), p, nil))
	}
	db.Close() // its statistics are complete when its connections have ended
	read := func() int {
		return get[int](b, `SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0)::int FROM pg_stat_all_tables WHERE schemaname = 'a' AND relname = 'webhook_events'`)
	}
	require.Eventually(t, func() bool { return read() > 0 }, time.Minute, 10*time.Millisecond)
	assert.Less(t, read(), 200_000, "all of it once, to see where to begin")
}
