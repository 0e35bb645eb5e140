package relay

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestWakerRounds: a round goes through a large queue part by part, at leisure; one for a reason does not rest, and sees all that was there when the reason came.
func TestWakerRounds(t *testing.T) {
	t.Parallel()
	var w waker
	at := time.Now()
	more := store.FirstID(at.Add(-time.Hour))
	look := func(next outbox.UUID) { w.reached(next, at) }
	pass := func(d time.Duration) { at = at.Add(d) }

	require.True(t, w.due(at, false), "the first of a leader")
	look(more)
	require.False(t, w.due(at, false))
	pass(time.Second)
	require.True(t, w.due(at, false), "its next part")
	require.False(t, w.hurried)
	look(outbox.UUID{})
	pass(wakeEvery / 2)
	require.False(t, w.due(at, false))
	pass(wakeEvery / 2)
	require.True(t, w.due(at, false), "the next round")
	look(more)

	pass(time.Millisecond)
	require.True(t, w.due(at, true), "a reason in the middle of it")
	require.True(t, w.hurried)
	look(more)
	pass(2 * wakeAgain)
	require.True(t, w.due(at, false))
	require.True(t, w.hurried, "the server is slow")
	look(outbox.UUID{})
	require.True(t, w.due(at, false), "what was before the place when the reason came")
	require.True(t, w.hurried)
	look(outbox.UUID{})
	require.False(t, w.due(at, false), "it has been seen to")

	pass(time.Second)
	require.True(t, w.due(at, true), "another reason")
	look(outbox.UUID{})
	pass(wakeAgain)
	require.True(t, w.due(at, false), "what was locked, or is written only now")
	require.True(t, w.hurried)
	look(outbox.UUID{})
	pass(time.Second)
	require.False(t, w.due(at, false))

	pass(wakeEvery)
	require.True(t, w.due(at, false))
	look(store.FirstID(at.Add(time.Millisecond)))
	pass(time.Second)
	require.False(t, w.due(at, false), "what came meanwhile is the next round's")
	pass(wakeEvery)
	require.True(t, w.due(at, false))
}
