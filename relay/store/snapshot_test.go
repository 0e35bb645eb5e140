package store_test

import (
	"testing"

	"github.com/jackc/pglogrepl"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

func TestSnapshotVisible(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		snapshot string
		xid      uint32
		want     bool
	}{
		{"100:100:", 99, true},
		{"100:100:", 100, false},
		{"100:105:100,103", 99, true},
		{"100:105:100,103", 100, false},
		{"100:105:100,103", 101, true},
		{"100:105:100,103", 103, false},
		{"100:105:103,100", 104, true},
		{"100:105:100,103", 105, false},
		{"21474836482:21474836490:21474836485", 4294967295, true}, // 5 epochs and 2: the end of the epoch before
		{"21474836482:21474836490:21474836485", 3, true},
		{"21474836482:21474836490:21474836485", 5, false},
		{"21474836482:21474836490:21474836485", 10, false},
		{"21474836470:21474836490:21474836475", 4294967291, false}, // in progress since before the epoch turned
		{"21474836470:21474836490:21474836475", 4294967290, true},
		{"21474836470:21474836475:", 4294967295, false}, // xmax just before the turn
		{"21474836470:21474836475:", 0, false},
	} {
		s, err := store.ParseSnapshot(test.snapshot)
		require.NoError(t, err)
		assert.Equal(t, test.want, s.Visible(test.xid), "%s %d", test.snapshot, test.xid)
		assert.Equal(t, test.snapshot, s.String())
	}
	assert.False(t, store.Snapshot{}.Visible(7))
}

func FuzzParseSnapshot(f *testing.F) {
	for _, seed := range []string{"", "1:2:", "10:20:11,12", "10:20:11,", "x:y:z", "18446744073709551615:18446744073709551615:1"} {
		f.Add(seed, uint32(3))
	}
	f.Fuzz(func(t *testing.T, s string, xid uint32) {
		snap, err := store.ParseSnapshot(s)
		if err != nil {
			assert.Equal(t, store.Snapshot{}, snap)
			return
		}
		assert.Equal(t, s, snap.String())
		snap.Visible(xid)
	})
}

// A transaction is visible in a snapshot exactly if it had committed when the snapshot was taken, and then the position lies behind it.
func TestSnapshotOfServer(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	before, running := b.transaction(), b.transaction()
	beforeEnd := before.commit()
	snap, lsn, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	assert.True(t, snap.Visible(before.xid))
	assert.False(t, snap.Visible(running.xid))
	assert.GreaterOrEqual(t, lsn, beforeEnd)
	reg, err := b.store.LoadShard(t.Context(), nil, 0, nil)
	require.NoError(t, err)
	assert.True(t, reg.Snapshot.Visible(before.xid))
	assert.False(t, reg.Snapshot.Visible(running.xid))
	assert.GreaterOrEqual(t, reg.LSN, beforeEnd)

	visible, err := b.store.Visible(t.Context(), running.xid)
	require.NoError(t, err)
	assert.False(t, visible)
	later := b.transaction()
	later.commit()
	assert.False(t, snap.Visible(later.xid))
	running.commit()
	visible, err = b.store.Visible(t.Context(), running.xid)
	require.NoError(t, err)
	assert.True(t, visible)
	assert.False(t, snap.Visible(running.xid), "the snapshot is of before")
}

type transaction struct {
	xid    uint32
	commit func() pglogrepl.LSN
}

// transaction begins one that writes.
func (b *bundle) transaction() transaction {
	b.t.Helper()
	tx, err := b.admin.Begin(b.t.Context())
	require.NoError(b.t, err)
	var xid uint32
	require.NoError(b.t, tx.QueryRow(b.t.Context(), "SELECT pg_current_xact_id()::text::bigint & 4294967295").Scan(&xid))
	return transaction{xid: xid, commit: func() pglogrepl.LSN {
		b.t.Helper()
		require.NoError(b.t, tx.Commit(b.t.Context()))
		lsn, err := pglogrepl.ParseLSN(get[string](b, "SELECT pg_current_wal_insert_lsn()::text"))
		require.NoError(b.t, err)
		return lsn
	}}
}
