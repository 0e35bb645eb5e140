package relay

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// TestChoresTakeTurns: at the same moment each would need a connection of its own, and each at its own would wake an idle process. One that takes long is not
// waited for.
func TestChoresTakeTurns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const slow, seconds = 2, 5
		ctx, cancel := context.WithTimeout(t.Context(), (seconds+1)*time.Second-time.Millisecond)
		defer cancel()
		start := time.Now()
		var began []time.Duration // written to by one at a time, or the race detector tells
		list := make([]chore, 5)
		for i := range list {
			list[i].do = func() error {
				if i == slow {
					<-ctx.Done()
					return nil
				}
				began = append(began, time.Since(start))
				<-time.After(time.Millisecond)
				return nil
			}
		}
		new(session).takeTurns(ctx, list)
		var want []time.Duration
		for at := time.Second; at <= seconds*time.Second; at += time.Second {
			later := at + 2*time.Millisecond + choreGap
			want = append(want, at, at+time.Millisecond, later, later+time.Millisecond)
		}
		require.Equal(t, want, began)
	})
}

// TestChoresAreDoneWhenAsked: and those after it have their turn as ever.
func TestChoresAreDoneWhenAsked(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
		defer cancel()
		start := time.Now()
		asked := make(chan struct{}, 1)
		var first, second []time.Duration
		time.AfterFunc(300*time.Millisecond, func() { asked <- struct{}{} })
		new(session).takeTurns(ctx, []chore{
			{asked: asked, do: func() error { first = append(first, time.Since(start)); return nil }},
			{do: func() error { second = append(second, time.Since(start)); return nil }},
		})
		require.Equal(t, []time.Duration{300 * time.Millisecond, time.Second, 2 * time.Second}, first)
		require.Equal(t, []time.Duration{time.Second, 2 * time.Second}, second)
	})
}
