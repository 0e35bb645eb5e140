package relay

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// TestStatusIsOfOneMoment: who asks while it changes gets the reason that belongs to the answer.
func TestStatusIsOfOneMoment(t *testing.T) {
	t.Parallel()
	var s Status
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 100_000 {
			s.set(i%2 == 0, "%t", i%2 == 0)
		}
	}()
	for {
		ready, why := s.Ready()
		require.Contains(t, []string{"starting", map[bool]string{true: "true", false: "false"}[ready]}, why)
		select {
		case <-done:
			return
		default:
		}
	}
}
