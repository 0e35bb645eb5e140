package relay

import (
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

func TestNothingStartsThatWaitedForRoomAtTheDrain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newBench(1)
		first := b.job("one", 10)
		b.admit(t.Context(), first)
		require.Same(t, first, b.nextJob())
		go b.admit(t.Context(), b.job("two", 10))
		synctest.Wait()
		b.drain()
		b.finish(first, verdict{attempted: true})
		b.release([]*job{first})
		synctest.Wait()
		require.Nil(t, b.nextJob(), "a drain starts nothing more")
		require.Equal(t, []string{store.DeferDrain}, b.deferrals)
	})
}
