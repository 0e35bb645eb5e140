package relay

import (
	"testing"
	"time"

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

// TestPositionOfAQuietLog: where no outcome carries it along, the position is recorded now and then, and only once it has moved far enough, or at once. The record makes
// WAL of its own, which would be all the traffic of a quiet server.
func TestPositionOfAQuietLog(t *testing.T) {
	t.Parallel()
	const start = 1000
	for name, test := range map[string]struct {
		moved  wal.LSN
		atOnce bool
		since  time.Duration // the one before
		want   bool
	}{
		"near":                        {moved: idleBytes, since: time.Hour},
		"far":                         {moved: idleBytes + 1, since: time.Hour, want: true},
		"far, a moment after another": {moved: idleBytes + 1, since: idlePosition / 2},
		"near, at once":               {moved: 1, atOnce: true, want: true},
		"nowhere, at once":            {atOnce: true, since: time.Hour},
	} {
		before := time.Now().Add(-test.since)
		s := &session{engine: &engine{recorder: &recorder{kick: make(chan struct{}, 1)}}, ledger: newLedger(start, start), positioned: before}
		s.confirmed.Store(start)
		s.ledger.idle(start + test.moved)
		s.recordPosition(test.atOnce)
		require.Equal(t, test.want, s.recorder.force, name)
		require.Equal(t, test.want, s.positioned.After(before), name)
	}
}
