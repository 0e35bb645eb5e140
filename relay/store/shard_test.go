package store_test

import (
	"context"
	"log/slog"
	"testing"

	"github.com/jackc/pglogrepl"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestShardsKeepToThemselves: what a leader is told of is of its own shard, before and after a tenant is moved.
func TestShardsKeepToThemselves(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	ctx := t.Context()
	b.exec("INSERT INTO outbox_relay.progress (slot, shard) VALUES ($1, 1)", b.slot+"_1")
	second, err := store.New(ctx, store.Config{URL: b.url, Slot: b.slot + "_1", Shard: 1, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(second.Close)
	stores := []*store.Store{b.store, second}
	each := func(want [2][]string, what string, list func(s *store.Store) []string) {
		t.Helper()
		for shard, s := range stores {
			assert.Equal(t, want[shard], list(s), "%s of shard %d", what, shard)
		}
	}
	tenants := func(s *store.Store) []string {
		names, err := s.Tenants(ctx)
		require.NoError(t, err)
		return names
	}
	loaded := func(position pglogrepl.LSN) func(s *store.Store) []string {
		return func(s *store.Store) (names []string) {
			reg, err := s.LoadShard(ctx, nil, position, nil)
			require.NoError(t, err)
			for _, rows := range reg.Tenants {
				if rows.Left {
					rows.Schema += " left"
				}
				names = append(names, rows.Schema)
			}
			return names
		}
	}
	recoveries := func(s *store.Store) (names []string) {
		list, err := s.Recoveries(ctx, 1)
		require.NoError(t, err)
		for _, r := range list {
			assert.True(t, r.Registered)
			names = append(names, r.Tenant)
		}
		return names
	}
	backfills := func(s *store.Store) (names []string) {
		list, err := s.Backfills(ctx)
		require.NoError(t, err)
		for _, backfill := range list {
			names = append(names, backfill.Tenant)
		}
		return names
	}
	each([2][]string{{"a", "b"}, {}}, "tenants", tenants)
	for _, tenant := range []string{"a", "b"} {
		b.exec("INSERT INTO outbox_relay.recoveries (tenant, endpoint_id, since) VALUES ($1, gen_random_uuid(), now())", tenant)
	}
	b.exec("SELECT outbox_relay.move_tenant('b', 1)")
	at, err := pglogrepl.ParseLSN(get[string](b, "SELECT moved_lsn::text FROM outbox_relay.tenants WHERE schema = 'b'"))
	require.NoError(t, err)
	each([2][]string{{"a"}, {"b"}}, "tenants", tenants)
	each([2][]string{{"a", "b left"}, {"b"}}, "what a leader from before the move loads", loaded(at-1))
	each([2][]string{{"a"}, {"b"}}, "what a leader from after the move loads", loaded(at))
	each([2][]string{{"a"}, {"b"}}, "recoveries", recoveries)

	// The new leader fills once everything that the old slot was to bring is recorded, or nobody knows of that slot.
	each([2][]string{nil, nil}, "backfills", backfills)
	b.exec("UPDATE outbox_relay.progress SET lsn = $1::text::pg_lsn WHERE shard = 0", (at - 1).String())
	each([2][]string{nil, nil}, "backfills", backfills)
	b.exec("UPDATE outbox_relay.progress SET lsn = $1::text::pg_lsn WHERE shard = 0", at.String())
	each([2][]string{nil, {"b"}}, "backfills", backfills)
	b.exec("UPDATE outbox_relay.tenants SET moved_from = 'gone'")
	each([2][]string{nil, {"b"}}, "backfills", backfills)
	b.exec("UPDATE outbox_relay.tenants SET moved_from = $1", b.slot)

	require.NoError(t, second.CheckShards(ctx, 2))
	require.ErrorIs(t, second.CheckShards(ctx, 1), store.ErrShards)
	b.exec("UPDATE outbox_relay.tenants SET shard = 0, moved_from = $1", b.slot+"_1")
	require.ErrorIs(t, second.CheckShards(ctx, 1), store.ErrShards, "the slot still has to bring something")
	b.exec("UPDATE outbox_relay.tenants SET backfill_done_at = now(), shard = CASE schema WHEN 'b' THEN 1 ELSE 0 END")

	// A heal is of one slot; a suspension goes by the checkpoint of the tenant's own, whoever finds it out.
	b.exec("UPDATE outbox_relay.progress SET snapshot = (100 + shard || ':' || 100 + shard || ':')::pg_snapshot, epoch = 1")
	b.exec("UPDATE outbox_relay.tenants SET added_snapshot = '10:10:', backfill = NULL")
	require.NoError(t, b.store.Suspend(ctx, 1, "b", "found out by the other shard"))
	assert.Equal(t, "101:101:", get[string](b, "SELECT backfill_from::text FROM outbox_relay.tenants WHERE schema = 'b'"))
	b.exec("UPDATE outbox_relay.tenants SET state = 'active', backfill = NULL")
	snapshot, lsn, err := b.store.Snapshot(ctx)
	require.NoError(t, err)
	require.NoError(t, second.Heal(context.WithoutCancel(ctx), store.HealOptions{Epoch: 1, Snapshot: snapshot, LSN: lsn}))
	assert.Equal(t, int64(1), get[int64](b, "SELECT count(*) FROM outbox_relay.tenants WHERE backfill IS NOT NULL AND schema = 'b'"))
	assert.Equal(t, int64(0), get[int64](b, "SELECT count(*) FROM outbox_relay.tenants WHERE backfill IS NOT NULL AND schema = 'a'"))
	assert.Equal(t, int64(0), get[int64](b, "SELECT count(*) FROM outbox_relay.tenants WHERE restored_at IS NOT NULL"))
	require.NoError(t, second.Heal(ctx, store.HealOptions{Epoch: 1, Snapshot: snapshot, LSN: lsn, Restored: true}))
	assert.Equal(t, "b", get[string](b, "SELECT string_agg(schema, ' ') FROM outbox_relay.tenants WHERE restored_at > now() - interval '1 minute'"))
	assert.Equal(t, int64(0), get[int64](b, "SELECT count(*) FROM outbox_relay.tenants WHERE schema = 'b' AND moved_lsn IS NOT NULL"), "positions of another cluster")

	names := func(list func(s *store.Store, ctx context.Context) ([]string, error)) func(s *store.Store) []string {
		return func(s *store.Store) []string {
			names, err := list(s, ctx)
			require.NoError(t, err)
			return names
		}
	}
	b.exec("UPDATE outbox_relay.tenants SET state = 'suspended'")
	each([2][]string{{"a"}, {"b"}}, "suspended tenants", names((*store.Store).Suspended))
	b.exec("DROP SCHEMA a CASCADE; DROP SCHEMA b CASCADE")
	each([2][]string{{"a"}, {"b"}}, "tenants without a schema", names((*store.Store).WithoutSchema))
}
