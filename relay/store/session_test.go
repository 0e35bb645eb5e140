package store_test

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestSettingsOfOthers has a database whose owner likes other settings.
func TestSettingsOfOthers(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	ok, err := b.store.Verified(t.Context(), store.Endpoint{Tenant: "a", ID: e}, "https://example.com/hook")
	require.NoError(t, err)
	require.True(t, ok)
	b.record(deferred(deliver("a", e), 0))
	for _, setting := range []string{
		"bytea_output = 'escape'", "standard_conforming_strings = off", "DateStyle = 'SQL, DMY'", "IntervalStyle = 'sql_standard'", "TimeZone = 'Asia/Kathmandu'",
		"xmlbinary = 'hex'", "extra_float_digits = -15", "default_transaction_isolation = 'serializable'", "default_transaction_read_only = on",
		"search_path = 'a'", "quote_all_identifiers = on",
	} {
		b.exec("DO $$ BEGIN EXECUTE format('ALTER ROLE relay_%1$s IN DATABASE %1$I SET " + strings.ReplaceAll(setting, "'", "''") + "', current_database()); END $$")
	}
	s := b.open()
	reg, err := s.LoadShard(t.Context(), nil, 0, nil)
	require.NoError(t, err)
	require.NoError(t, reg.Tenants[0].Err)
	require.Len(t, reg.Tenants[0].Endpoints, 1)
	assert.NotEmpty(t, reg.Tenants[0].Endpoints[0].VerifiedFor)
	_, err = s.Verifications(t.Context(), []string{"a"})
	require.NoError(t, err)
	claimed, _, err := s.Claim(t.Context(), b.owner, store.ClaimOptions{N: 10, Lease: time.Minute})
	require.NoError(t, err)
	require.Len(t, claimed, 1)
	broken, err := s.Record(t.Context(), b.owner, nil, []store.Outcome{succeeded(&claimed[0].Delivery)})
	require.NoError(t, err)
	assert.Empty(t, broken)
}

// TestUnreadableTenant: a value that we cannot read keeps nobody else from being loaded, in one go or one by one.
func TestUnreadableTenant(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b", "c")
	for _, tenant := range []string{"a", "b", "c"} {
		b.endpoint(tenant)
	}
	b.exec("ALTER TABLE b.webhook_event_types DROP CONSTRAINT webhook_event_types_pkey CASCADE, ALTER id DROP DEFAULT, ALTER id TYPE text")
	b.exec("INSERT INTO b.webhook_event_types (id, event_type, category, display_name) VALUES ('x', 'x.y', 'x', 'x')")
	reg, err := b.store.LoadShard(t.Context(), nil, 0, nil)
	require.NoError(t, err)
	require.Len(t, reg.Tenants, 3)
	for i, name := range []string{"a", "b", "c"} {
		assert.Equal(t, name, reg.Tenants[i].Schema)
		assert.Equal(t, name == "b", reg.Tenants[i].Err != nil, "%s: %v", name, reg.Tenants[i].Err)
	}
}

// TestFewLocks has a server without the locks for a batch of so many tenants: it is written in parts, and the position comes with the last of them.
func TestFewLocks(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	server, err := pgtest.Start(ctx, pgtest.Options{Config: map[string]string{
		"max_connections": "20", "max_locks_per_transaction": "10", "max_wal_senders": "2", "max_replication_slots": "2", "max_worker_processes": "0",
		"autovacuum_max_workers": "1",
	}})
	require.NoError(t, err)
	t.Cleanup(func() { _ = server.Close() })
	b := &bundle{t: t, dsn: server.URL("postgres"), slot: schema.Slot, owner: outbox.NewUUID()}
	b.url = b.dsn
	require.NoError(t, schema.Migrate(ctx, b.dsn, schema.Options{}))
	b.admin, err = pgxpool.New(ctx, b.dsn)
	require.NoError(t, err)
	t.Cleanup(b.admin.Close)
	b.exec("UPDATE outbox_relay.progress SET lsn = '0/0', high_lsn = '0/0'")
	const tenants = 150
	list := make([]store.Outcome, 0, tenants)
	for i := range tenants {
		name := fmt.Sprintf("t%d", i)
		b.addTenant(name)
		list = append(list, failed(deliver(name, outbox.NewUUID()), store.Failed))
	}
	s, err := store.New(ctx, store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(s.Close)
	p, err := s.Lead(ctx, store.LeadOptions{})
	require.NoError(t, err)
	// What is written with each part: a restart has to look from there on.
	b.exec(`CREATE TABLE public.seen (lsn pg_lsn, high pg_lsn);
		CREATE FUNCTION public.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (NEW.lsn, NEW.high_lsn); RETURN NULL; END $$;
		CREATE TRIGGER note AFTER UPDATE ON outbox_relay.progress FOR EACH ROW EXECUTE FUNCTION public.note()`)
	broken, err := s.Record(ctx, b.owner, &store.Progress{Epoch: p.Epoch, LSN: 100, High: 200}, list)
	require.NoError(t, err)
	assert.Empty(t, broken)
	for i := range tenants {
		require.Equal(t, 1, b.count(fmt.Sprintf("t%d.webhook_dead_letters", i)))
	}
	parts := b.count("public.seen")
	assert.Greater(t, parts, 1, "there were locks enough")
	assert.Equal(t, parts-1, b.count("public.seen WHERE lsn = '0/0' AND high = '0/C8'"))
	assert.Equal(t, 1, b.count("public.seen WHERE lsn = '0/64' AND high = '0/C8'"))

	// Whoever has taken over fences the parts as well.
	_, err = s.Lead(ctx, store.LeadOptions{})
	require.NoError(t, err)
	_, err = s.Record(ctx, b.owner, &store.Progress{Epoch: p.Epoch, LSN: 300, High: 300}, list)
	assert.ErrorIs(t, err, store.ErrFenced)
}
