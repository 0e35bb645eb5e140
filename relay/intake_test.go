package relay

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/wal"
)

// TestBeginAtTheCoveredEnd: what is covered ends where the next record begins, which may be that of a commit.
func TestBeginAtTheCoveredEnd(t *testing.T) {
	t.Parallel()
	s := &session{start: 100, startHigh: 200}
	for commit, want := range map[wal.LSN]transaction{
		99:  {skip: true, repeat: true},
		100: {repeat: true},
		200: {repeat: true},
		201: {},
	} {
		require.NoError(t, s.Begin(t.Context(), wal.Begin{CommitLSN: commit}))
		want.begin, want.entry = wal.Begin{CommitLSN: commit}, noCommit
		require.Equal(t, want, s.tx)
	}
}
