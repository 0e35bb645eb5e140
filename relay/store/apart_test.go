package store_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// byTenant sorts errors of tenants by their names.
func byTenant(list []store.TenantError) map[string]store.TenantError {
	m := make(map[string]store.TenantError, len(list))
	for _, e := range list {
		m[e.Tenant] = e
	}
	return m
}

func requireCode(t *testing.T, want string, err error) {
	t.Helper()
	var pgErr *pgconn.PgError
	require.ErrorAs(t, err, &pgErr)
	require.Equal(t, want, pgErr.Code)
}

// Whatever is wrong with some tenants, the others and the position are recorded.
func TestRecordApart(t *testing.T) {
	t.Parallel()
	faults := []struct {
		tenant, sql, code string
	}{
		{"attempts", "DROP TABLE attempts.webhook_delivery_attempts", "42P01"},
		{"checked", "ALTER TABLE checked.webhook_deliveries ADD CHECK (request_url = '') NOT VALID", "23514"},
		{"column_", "ALTER TABLE column_.webhook_deliveries RENAME error_code TO error_kode", "42703"},
		{"deferred", `CREATE FUNCTION deferred.no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END';
			CREATE CONSTRAINT TRIGGER no AFTER INSERT ON deferred.webhook_deliveries DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION deferred.no()`, "P0001"},
		{"narrow", "ALTER TABLE narrow.webhook_deliveries ALTER request_url TYPE varchar(3)", "22001"},
		{"revoked", "REVOKE INSERT ON revoked.webhook_deliveries FROM outbox_relay_runner", "42501"},
		{"tableless", "DROP TABLE tableless.webhook_deliveries", "42P01"}, // it may be back in a moment
		{"sealed", "REVOKE USAGE ON SCHEMA sealed FROM outbox_relay_runner", "42501"},
	}
	tenants := []string{"aa_healthy", "dropped", "endpoints", "zz_healthy"}
	for _, f := range faults {
		tenants = append(tenants, f.tenant)
	}
	b := setup(t, tenants...)
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	snap, _, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	require.NoError(t, b.store.SaveSnapshot(t.Context(), p.Epoch, snap))

	var outcomes []store.Outcome
	for _, name := range tenants {
		e := b.endpoint(name)
		outcomes = append(outcomes, succeeded(deliver(name, e)), failed(deliver(name, e), store.Retrying))
	}
	kept := b.endpoint("endpoints")
	outcomes = append(outcomes, succeeded(deliver("endpoints", kept)))
	queued := b.claimOne("endpoints", b.endpoint("endpoints"))
	outcomes = append(outcomes, succeeded(queued))
	for _, f := range faults {
		b.exec(f.sql)
	}
	b.exec("DROP SCHEMA dropped CASCADE")
	b.exec("DELETE FROM endpoints.webhook_endpoints WHERE id <> $1", kept)

	p.LSN, p.High = 1000, 2000
	list, err := b.store.Record(t.Context(), b.owner, &p, outcomes)
	require.NoError(t, err)
	broken := byTenant(list)
	require.Len(t, broken, len(faults)+1)
	for _, f := range faults {
		e := broken[f.tenant]
		assert.True(t, e.Suspended, f.tenant)
		assert.Zero(t, e.Discarded, f.tenant)
		requireCode(t, f.code, e.Err)
		assert.Equal(t, "suspended|missed|"+snap.String()+"|-|-|-|"+e.Err.Error(),
			b.row("state, backfill, backfill_from, backfill_upto, backfill_cursor, backfill_done_at, reason", "outbox_relay.tenants WHERE schema = $1", f.tenant))
	}
	gone := broken["dropped"]
	require.ErrorIs(t, &gone, store.ErrGone)
	assert.Equal(t, 2, gone.Discarded)
	assert.False(t, gone.Suspended)
	for _, name := range []string{"dropped", "endpoints"} {
		assert.Equal(t, "active", b.row("state", "outbox_relay.tenants WHERE schema = $1", name))
	}
	for _, name := range []string{"aa_healthy", "zz_healthy"} {
		assert.Equal(t, 2, b.count(name+".webhook_deliveries"), name)
		assert.Equal(t, "active", b.row("state", "outbox_relay.tenants WHERE schema = $1", name))
	}
	assert.Equal(t, 4, b.count("endpoints.webhook_deliveries"), "whatever has become of the endpoints")
	assert.Equal(t, 3, b.count("outbox_relay.retry_queue"))
	assert.Equal(t, "0/3E8|0/7D0", b.row("lsn, high_lsn", "outbox_relay.progress"))

	// What was left out does no harm when it comes again; what was written is found.
	again, err := b.store.Record(t.Context(), b.owner, &p, outcomes)
	require.NoError(t, err)
	assert.Len(t, again, len(faults)+1)
	assert.Equal(t, 2, b.count("aa_healthy.webhook_deliveries"))
}

// What has been written before is found by the batch that comes again, whose tenants are not written apart for it.
func TestRecordAgainAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	outcomes := []store.Outcome{succeeded(deliver("a", b.endpoint("a"))), succeeded(deliver("b", b.endpoint("b")))}
	b.exec("REVOKE ALL ON outbox_relay.retry_queue FROM outbox_relay_runner") // which is locked when tenants are written apart
	b.record(outcomes[0])
	for range 3 { // the third time it is prepared
		b.record(outcomes...)
	}
	assert.Equal(t, 1, b.count("a.webhook_deliveries"))
	assert.Equal(t, 1, b.count("b.webhook_deliveries"))
}

// Without its unique index a tenant's deliveries could be recorded twice.
func TestRecordWithoutIndex(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	b.exec("DROP INDEX a.webhook_deliveries_relayed_key")
	list, err := b.store.Record(t.Context(), b.owner, nil, []store.Outcome{succeeded(deliver("a", b.endpoint("a")))})
	require.NoError(t, err)
	require.Len(t, list, 1)
	requireCode(t, "42P10", list[0].Err)
	assert.True(t, list[0].Suspended)
}

// A table that somebody has locked costs its tenant a suspension, and the others a moment.
func TestRecordLockedTable(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	outcomes := []store.Outcome{succeeded(deliver("a", b.endpoint("a"))), succeeded(deliver("b", b.endpoint("b")))}
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "LOCK TABLE a.webhook_deliveries")
	require.NoError(t, err)
	began := time.Now()
	list, err := b.store.Record(t.Context(), b.owner, nil, outcomes)
	require.NoError(t, err)
	assert.Less(t, time.Since(began), 30*time.Second, "nobody would end it but the test")
	require.NoError(t, tx.Rollback(t.Context()))
	require.Len(t, list, 1)
	requireCode(t, "55P03", list[0].Err)
	assert.True(t, list[0].Suspended)
	assert.Equal(t, 1, b.count("b.webhook_deliveries"))

	// Nothing is lost by it: without a checkpoint, what came since the tenant's admission is queued anew.
	b.exec("SELECT outbox_relay.resume_tenant('a')")
	assert.Equal(t, "active|missed|true|true", b.row("state, backfill, backfill_from::text = added_snapshot::text, backfill_upto IS NOT NULL", "outbox_relay.tenants WHERE schema = 'a'"))
}

func TestSuspend(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b", "c", "d", "e")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	b.exec("SELECT outbox_relay.pause_tenant('d', 'it moves'), outbox_relay.pause_tenant('e')")
	b.exec(`UPDATE outbox_relay.tenants SET backfill = 'unprocessed', backfill_upto = pg_current_snapshot(), backfill_cursor = gen_random_uuid(),
		backfill_done_at = CASE schema WHEN 'c' THEN now() END WHERE schema IN ('b', 'c')`)
	border := b.row("backfill_upto", "outbox_relay.tenants WHERE schema = 'b'")
	snap, _, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	require.NoError(t, b.store.SaveSnapshot(t.Context(), p.Epoch, snap))
	for range 2 {
		for _, name := range []string{"a", "b", "c", "d", "e", "nobody"} {
			require.NoError(t, b.store.Suspend(t.Context(), p.Epoch, name, "unreadable\x00"))
		}
	}
	const columns = "state, reason, backfill, backfill_from, backfill_upto, backfill_cursor, backfill_done_at"
	assert.Equal(t, border, b.row("backfill_border", "outbox_relay.tenants WHERE schema = 'b'"), "what is after it was the log's to bring")
	assert.Equal(t, "-", b.row("backfill_border", "outbox_relay.tenants WHERE schema = 'c'"))
	missed := "suspended|unreadable\uFFFD|missed|" + snap.String() + "|-|-|-"
	assert.Equal(t, missed, b.row(columns, "outbox_relay.tenants WHERE schema = 'a'"))
	assert.Equal(t, missed, b.row(columns, "outbox_relay.tenants WHERE schema = 'c'"))
	assert.Equal(t, "suspended|unreadable\uFFFD|unprocessed|-|-|-|-", b.row(columns, "outbox_relay.tenants WHERE schema = 'b'"))

	for name, want := range map[string]string{"a": "active|-", "d": "paused|it moves", "e": "paused|-"} {
		state, err := b.store.Unsuspend(t.Context(), name)
		require.NoError(t, err)
		assert.Equal(t, want, state+"|"+b.row("reason", "outbox_relay.tenants WHERE schema = $1", name), "what an operator has paused is paused again")
	}
}

// Errors that are not a tenant's own are the caller's to wait out; nobody is suspended for them.
func TestRecordServerError(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	b.exec(`CREATE FUNCTION a.full() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION USING ERRCODE = ''53100''; END';
		CREATE TRIGGER full_ BEFORE INSERT ON a.webhook_deliveries FOR EACH ROW EXECUTE FUNCTION a.full()`)
	outcomes := []store.Outcome{succeeded(deliver("a", b.endpoint("a")))}
	_, err := b.store.Record(t.Context(), b.owner, nil, outcomes)
	requireCode(t, "53100", err)
	assert.Equal(t, "active", b.row("state", "outbox_relay.tenants"))
	b.exec("DROP TRIGGER full_ ON a.webhook_deliveries")
	b.record(outcomes...)
	assert.Equal(t, 1, b.count("a.webhook_deliveries"))

	// Nor for what is wrong with the relay's own table.
	outcomes = []store.Outcome{deferred(deliver("a", outcomes[0].Delivery.EndpointID), 0)}
	b.exec("REVOKE ALL ON outbox_relay.retry_queue FROM outbox_relay_runner")
	_, err = b.store.Record(t.Context(), b.owner, nil, outcomes)
	requireCode(t, "42501", err)
	assert.Equal(t, "active", b.row("state", "outbox_relay.tenants"))
}

// TestRecordBeforeTheEndpointIsSeen: the log brings a commit before anybody else sees it, for as long as it waits for a synchronous standby. What an endpoint of
// such a commit is sent is recorded all the same.
func TestRecordBeforeTheEndpointIsSeen(t *testing.T) {
	t.Parallel()
	b := setup(t, "made", "adopted")
	b.exec("ALTER TABLE adopted.webhook_deliveries ADD FOREIGN KEY (webhook_endpoint_id) REFERENCES adopted.webhook_endpoints (id) ON DELETE CASCADE")
	b.exec("SELECT outbox_relay.add_tenant('adopted')")
	for _, tenant := range []string{"made", "adopted"} {
		tx, err := b.admin.Begin(t.Context())
		require.NoError(t, err)
		defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }() // or the pool could not be closed
		var e outbox.UUID
		require.NoError(t, tx.QueryRow(t.Context(), "INSERT INTO "+tenant+`.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id)
			VALUES ('e', 'https://example.com/hook', 'secret', gen_random_uuid()) RETURNING id`).Scan(&e))
		b.record(succeeded(deliver(tenant, e)), failed(deliver(tenant, e), store.Retrying))
		require.NoError(t, tx.Commit(t.Context()))
		assert.Equal(t, 2, b.count(tenant+".webhook_deliveries"), tenant)
		assert.Equal(t, 1, b.count("outbox_relay.retry_queue WHERE tenant = $1", tenant), tenant)
	}
}

// TestMarksBesideTablesMadeAnew: whoever marks a tenant waits for a migration that has made its tables anew and adds it again, and finds its row afterwards.
func TestMarksBesideTablesMadeAnew(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		mark func(ctx context.Context, b *bundle, p store.Progress, settled store.Snapshot, o store.Outcome) error
		want string
	}{
		"suspended by the recorder": {
			func(ctx context.Context, b *bundle, p store.Progress, _ store.Snapshot, o store.Outcome) error {
				p.LSN, p.High = 1000, 2000
				broken, err := b.store.Record(ctx, b.owner, &p, []store.Outcome{o})
				if err == nil && (len(broken) != 1 || !broken[0].Suspended) {
					err = fmt.Errorf("broken: %v", broken)
				}
				return err
			}, "suspended|missed",
		},
		"suspended by the session": {func(ctx context.Context, b *bundle, p store.Progress, _ store.Snapshot, _ store.Outcome) error {
			return b.store.Suspend(ctx, p.Epoch, "a", "broken")
		}, "suspended|missed"},
		"healed": {func(ctx context.Context, b *bundle, p store.Progress, settled store.Snapshot, _ store.Outcome) error {
			return b.store.Heal(ctx, store.HealOptions{Epoch: p.Epoch, Snapshot: settled, LSN: 5000})
		}, "active|missed"},
		"paused": {func(ctx context.Context, b *bundle, _ store.Progress, _ store.Snapshot, _ store.Outcome) error {
			_, err := b.admin.Exec(ctx, "SELECT outbox_relay.pause_tenant('a')")
			return err
		}, "paused|-"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, b := t.Context(), setup(t, "a")
			p, err := b.store.Lead(ctx, store.LeadOptions{})
			require.NoError(t, err)
			settled, err := b.store.Settled(ctx)
			require.NoError(t, err)
			o := failed(deliver("a", b.endpoint("a")), store.Retrying)
			b.exec("ALTER TABLE a.webhook_deliveries ADD CONSTRAINT broken CHECK (false) NOT VALID")
			migration, err := b.admin.Begin(ctx)
			require.NoError(t, err)
			_, err = migration.Exec(ctx, `CREATE TABLE a.fresh (LIKE a.webhook_subscriptions INCLUDING ALL); DROP TABLE a.webhook_subscriptions;
				ALTER TABLE a.fresh RENAME TO webhook_subscriptions; SELECT outbox_relay.add_tenant('a')`)
			require.NoError(t, err)
			marked := make(chan error, 1)
			go func() { marked <- test.mark(ctx, b, p, settled, o) }()
			require.Eventually(t, func() bool {
				return b.count(`pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT l.granted AND l.locktype = 'transactionid' AND a.datname = current_database()`) > 0
			}, 20*time.Second, 5*time.Millisecond, "it waits for the row")
			require.NoError(t, migration.Commit(ctx))
			require.NoError(t, <-marked)
			require.Equal(t, test.want, b.row("state, backfill", "outbox_relay.tenants"))
		})
	}
}
