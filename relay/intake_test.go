package relay

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/wal"
)

// TestBeginAtTheCoveredEnd: what is covered ends where the next record begins, which may be that of a commit. From there on the inserted events count, whosever
// they are.
func TestBeginAtTheCoveredEnd(t *testing.T) {
	t.Parallel()
	s := &session{start: 100, startHigh: 200, relations: make(map[uint32]*relation)}
	others := &wal.Relation{ID: 1, Schema: "nobodys", Table: "webhook_events"}
	for commit, want := range map[wal.LSN]transaction{
		99:  {skip: true, repeat: true},
		100: {repeat: true},
		200: {repeat: true},
		201: {},
	} {
		require.NoError(t, s.Begin(t.Context(), wal.Begin{CommitLSN: commit}))
		want.begin, want.entry = wal.Begin{CommitLSN: commit}, noCommit
		require.Equal(t, want, s.tx)
		require.NoError(t, s.Change(t.Context(), &wal.Change{Op: wal.Insert, Relation: others}))
		require.NoError(t, s.Change(t.Context(), &wal.Change{Op: wal.Update, Relation: others}))
		if !want.skip {
			want.n = 1
		}
		require.Equal(t, want, s.tx)
	}
}
