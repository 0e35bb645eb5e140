package relay

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// TestStalledTellsWorkFromWaiting: decoding a huge transaction of others looks like a stall but for the sender, which works. To begin it anew would be for ever.
func TestStalledTellsWorkFromWaiting(t *testing.T) {
	t.Parallel()
	const patience = time.Minute
	// look is one look, so long after the last one.
	type look struct {
		after   time.Duration
		at      wal.LSN
		still   time.Duration
		flushed int64
		works   bool
		stalled bool
	}
	for _, c := range []struct {
		name  string
		looks []look
	}{
		{"stalled", []look{{still: patience, at: 10, flushed: 20}, {after: patience - 1, still: 2*patience - 1, at: 10, flushed: 90}, {after: 1, still: 2 * patience, at: 10, flushed: 90, stalled: true}}},
		{"not for long", []look{{still: patience - 1, at: 10, flushed: 20}, {after: 1, still: patience, at: 10, flushed: 20}, {after: patience - 1, still: 2*patience - 1, at: 10, flushed: 20}}},
		{"works", []look{{still: patience, at: 10, flushed: 20, works: true}, {after: patience, still: 2 * patience, at: 10, flushed: 20, works: true}}},
		{"works at last", []look{{still: patience, at: 10, flushed: 20}, {after: 1, still: patience, at: 10, flushed: 20, works: true}, {after: patience, still: 2 * patience, at: 10, flushed: 20}}},
		{"idle", []look{{still: patience, at: 20, flushed: 20}, {after: patience, still: 2 * patience, at: 20, flushed: 20}, {after: patience, still: 3 * patience, at: 20, flushed: 20}}},
		{"idle, then stalled", []look{{still: patience, at: 20, flushed: 20}, {after: 1, still: patience, at: 20, flushed: 90}, {after: patience, still: 2 * patience, at: 20, flushed: 90, stalled: true}}},
		{"goes on", []look{{still: patience, at: 10, flushed: 20}, {after: patience, still: patience, at: 20, flushed: 90}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var w stallWatch
			var now time.Time
			for i, l := range c.looks {
				now = now.Add(l.after)
				require.Equal(t, l.stalled, w.stalled(now, l.at, l.still, patience, store.Sender{Flushed: l.flushed, Waiting: !l.works}), "look %d", i)
			}
		})
	}
}
