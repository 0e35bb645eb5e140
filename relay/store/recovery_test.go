package store_test

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
)

// recovery asks for a recovery of an endpoint from a day ago on, and takes it to where it is ready.
func (b *bundle) recovery(endpoint outbox.UUID) store.Recovery {
	b.t.Helper()
	number := get[int64](b, `SELECT outbox_relay.recover_endpoint('a', $1, since => now() - interval '1 day')`, endpoint)
	return store.Recovery{Number: number, Endpoint: store.Endpoint{Tenant: "a", ID: endpoint}, Ready: true}
}

// TestRecoveryReadsLittle looks at one page of a recovery where the endpoint has 40,000 deliveries, half of them of an older dispatcher. It must not read
// them all, analyzed or not.
func TestRecoveryReadsLittle(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec(`INSERT INTO a.webhook_events (id, event_type, aggregate_id, aggregate_type)
		SELECT lpad(to_hex(i), 32, '0')::uuid, 'x.y', gen_random_uuid(), 'x' FROM generate_series(1, 41000) i`)
	b.exec(`INSERT INTO a.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, request_url, request_method, relayed)
		SELECT gen_random_uuid(), lpad(to_hex(i), 32, '0')::uuid, $1, 'u', 'POST', i % 2 = 0 FROM generate_series(1, 41000) i WHERE i % 41 > 0`, e)
	r := b.recovery(e)
	read := func() int {
		return get[int](b, `SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0)::int FROM pg_stat_all_tables WHERE schemaname = 'a' AND relname = 'webhook_deliveries'`)
	}
	before := read()
	for _, prepare := range []string{"SELECT", "ANALYZE a.webhook_deliveries"} {
		b.exec(prepare)
		db, err := store.New(t.Context(), store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.DiscardHandler)})
		require.NoError(t, err)
		page, err := db.RecoveryPage(t.Context(), r, 500)
		require.NoError(t, err)
		db.Close() // its statistics are complete when its connection has ended
		require.Len(t, page.Events, 12, "one of 41 has no delivery")
		require.Eventually(t, func() bool { return read() > before }, time.Minute, 10*time.Millisecond)
		assert.Less(t, read()-before, 2000, prepare)
		before = read()
	}
}

// TestRecoveryAfterALogicalRestore: the xids of a dump are those of another cluster, and may be ahead of this one's for years.
func TestRecoveryAfterALogicalRestore(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	const insert = `INSERT INTO a.webhook_events (id, event_type, aggregate_id, aggregate_type, xid) SELECT $1::uuid, 'x.y', $1::uuid, 'x', `
	old, restored, later := outbox.UUID{1}, outbox.UUID{2}, outbox.UUID{3}
	b.exec(insert+`NULL`, old)
	b.exec(insert+`((pg_snapshot_xmax(pg_current_snapshot())::text::int8 + 1000000)::text)::xid8`, restored)
	r := b.recovery(e)
	b.exec(insert+`pg_current_xact_id()`, later)
	page, err := b.store.RecoveryPage(t.Context(), r, 500)
	require.NoError(t, err)
	ids := make([]outbox.UUID, 0, 2)
	for i := range page.Events {
		ids = append(ids, page.Events[i].ID)
	}
	assert.Equal(t, []outbox.UUID{old, restored}, ids, "what was committed after the request comes by the log")
	assert.True(t, page.Done)
}

// TestRecoverySinceAnEventOfNoTime: an adopted table may have an event of a time that cannot be written.
func TestRecoverySinceAnEventOfNoTime(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	event := b.event("a", "", "")
	b.exec(`UPDATE a.webhook_events SET occurred_at = '20000-01-01'`)
	b.exec(`SELECT outbox_relay.recover_endpoint('a', $1, event => $2)`, e, event)
	list, err := b.store.Recoveries(t.Context(), p.Epoch)
	require.NoError(t, err)
	require.Len(t, list, 1)
	list[0].Ready = true
	page, err := b.store.RecoveryPage(t.Context(), list[0], 500)
	require.NoError(t, err)
	assert.Len(t, page.Events, 1)
}

// TestRecoveryOfWhatIsCommittedMeanwhile: an application resumes an endpoint and asks for what it missed in one transaction. What others commit before it ends
// comes in the log before that, when the endpoint takes nothing yet.
func TestRecoveryOfWhatIsCommittedMeanwhile(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), `SELECT outbox_relay.recover_endpoint('a', $1, since => now() - interval '1 day')`, e)
	require.NoError(t, err)
	event := outbox.NewUUID()
	b.exec(`INSERT INTO a.webhook_events (id, event_type, aggregate_id, aggregate_type) VALUES ($1::uuid, 'x.y', $1::uuid, 'x')`, event)
	require.NoError(t, tx.Commit(t.Context()))
	for range 2 { // it begins, and is there
		list, err := b.store.Recoveries(t.Context(), p.Epoch)
		require.NoError(t, err)
		require.Len(t, list, 1)
		list[0].Ready = true
		page, err := b.store.RecoveryPage(t.Context(), list[0], 500)
		require.NoError(t, err)
		require.Len(t, page.Events, 1)
		assert.Equal(t, event, page.Events[0].ID)
	}
}

// TestRecoveryOfATenantThatCannotBeWrittenTo: a page that was not written has not moved the recovery on.
func TestRecoveryOfATenantThatCannotBeWrittenTo(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	d := deliver("a", e)
	d.EventID = b.event("a", "", "")
	r := b.recovery(e)
	page, err := b.store.RecoveryPage(t.Context(), r, 500)
	require.NoError(t, err)
	require.Len(t, page.Events, 1)
	b.exec("ALTER TABLE a.webhook_deliveries ADD CONSTRAINT none CHECK (relayed IS NULL)")
	err = b.store.RecordRecovery(t.Context(), p.Epoch, page, []store.Outcome{deferred(d, 0)})
	var broken *store.TenantError
	require.ErrorAs(t, err, &broken)
	assert.True(t, broken.Suspended)
	const state = "done_at IS NULL, cursor, scanned, queued, error"
	assert.Equal(t, "true|-|0|0|-", b.row(state, "outbox_relay.recoveries"))
	b.exec("ALTER TABLE a.webhook_deliveries DROP CONSTRAINT none")
	require.NoError(t, b.store.RecordRecovery(t.Context(), p.Epoch, page, []store.Outcome{deferred(d, 0)}))
	assert.Equal(t, "false|"+d.EventID.String()+"|1|1|-", b.row(state, "outbox_relay.recoveries"))
	assert.Equal(t, 1, b.count("outbox_relay.retry_queue"))
}

// TestRecoveryIsPaced: what becomes due is rate a second, counted from where the last page ended or from now. A page counts once, and an end is one.
func TestRecoveryIsPaced(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	for range 4 {
		b.event("a", "", "")
	}
	r := b.recovery(e)
	b.exec("UPDATE outbox_relay.recoveries SET rate = 0.01")
	record := func(page *store.RecoveryPage, epoch int64) error {
		outcomes := make([]store.Outcome, len(page.Events))
		for i := range page.Events {
			d := deliver("a", e)
			d.EventID = page.Events[i].ID
			outcomes[i] = deferred(d, page.Due)
		}
		return b.store.RecordRecovery(t.Context(), epoch, page, outcomes)
	}
	const state = "done_at IS NULL, scanned, queued, error"
	for n, due := range []time.Duration{0, 100 * time.Second, 0, 100 * time.Second} {
		page, err := b.store.RecoveryPage(t.Context(), r, 1)
		require.NoError(t, err)
		require.InDelta(t, due, page.Due, float64(50*time.Second), "page %d", n)
		require.GreaterOrEqual(t, page.Due, time.Duration(0))
		require.ErrorIs(t, record(page, p.Epoch-1), store.ErrFenced)
		require.NoError(t, record(page, p.Epoch))
		require.NoError(t, record(page, p.Epoch), "a commit that was unclear")
		require.Equal(t, fmt.Sprintf("true|%d|%[1]d|-", n+1), b.row(state, "outbox_relay.recoveries"))
		if n == 1 { // the relay was away for long
			b.exec("UPDATE outbox_relay.recoveries SET paced_until = now() - interval '1 hour'")
		}
	}
	require.NoError(t, b.store.EndRecovery(t.Context(), p.Epoch-1, r.Number, "fenced"))
	require.Equal(t, "true|4|4|-", b.row(state, "outbox_relay.recoveries"))
	require.NoError(t, b.store.EndRecovery(t.Context(), p.Epoch, r.Number, "given up"))
	require.NoError(t, b.store.EndRecovery(t.Context(), p.Epoch, r.Number, "again"))
	require.Equal(t, "false|4|4|given up", b.row(state, "outbox_relay.recoveries"))
	page, err := b.store.RecoveryPage(t.Context(), r, 1)
	require.NoError(t, err)
	require.True(t, page.Done)
	require.NoError(t, record(page, p.Epoch))
	list, err := b.store.Recoveries(t.Context(), p.Epoch)
	require.NoError(t, err)
	require.Empty(t, list)
}

// TestRecoveryIsReadyAfterARestore: the place that it waits for is one of the old cluster's log, which the new one's may take years to come to.
func TestRecoveryIsReadyAfterARestore(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	b.recovery(b.endpoint("a"))
	b.exec("UPDATE outbox_relay.recoveries SET upto_lsn = 'A0/0', upto = pg_current_snapshot()")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	snapshot, lsn, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	require.NoError(t, b.store.Heal(t.Context(), store.HealOptions{Epoch: p.Epoch, Snapshot: snapshot, LSN: lsn, SystemID: "2", Restored: true}))
	list, err := b.store.Recoveries(t.Context(), p.Epoch)
	require.NoError(t, err)
	require.Empty(t, list, "what the heal missed is still being queued")
	b.exec("UPDATE outbox_relay.tenants SET backfill_done_at = now()")
	_, err = b.store.Recoveries(t.Context(), p.Epoch) // it begins
	require.NoError(t, err)
	_, lsn, err = b.store.Snapshot(t.Context())
	require.NoError(t, err)
	_, err = b.store.Record(t.Context(), b.owner, &store.Progress{Epoch: p.Epoch, LSN: lsn, High: lsn}, nil)
	require.NoError(t, err)
	list, err = b.store.Recoveries(t.Context(), p.Epoch)
	require.NoError(t, err)
	require.Len(t, list, 1)
	assert.True(t, list[0].Ready)
	b.exec("UPDATE outbox_relay.tenants SET state = 'suspended'")
	list, err = b.store.Recoveries(t.Context(), p.Epoch)
	require.NoError(t, err)
	require.Empty(t, list)
}

// TestSinceForever: what an application says instead of a time when it means everything.
func TestSinceForever(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.event("a", "", "")
	b.exec("SELECT outbox_relay.add_tenant('a', since => '-infinity')")
	assert.Len(t, b.page("a", 10).Events, 1)
	tenants, err := schema.Tenants(t.Context(), b.admin)
	require.NoError(t, err)
	assert.Equal(t, 1, tenants[0].BackfillSince.Year())
	number := get[int64](b, `SELECT outbox_relay.recover_endpoint('a', $1, since => '-infinity')`, e)
	page, err := b.store.RecoveryPage(t.Context(), store.Recovery{Number: number, Endpoint: store.Endpoint{Tenant: "a", ID: e}, Ready: true}, 10)
	require.NoError(t, err)
	assert.Len(t, page.Events, 1)

	for _, never := range []string{"add_tenant('a', since => 'infinity')", "recover_endpoint('a', '" + e.String() + "', since => 'infinity')"} {
		_, err = b.admin.Exec(t.Context(), "SELECT outbox_relay."+never)
		assert.ErrorContains(t, err, "since infinity is never", never)
	}
}
