package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/wal"
)

// TestBarrier: only the same transaction that cannot be sent, again and again, is a reason to renew the slot.
func TestBarrier(t *testing.T) {
	t.Parallel()
	log := slog.New(slog.DiscardHandler)
	at := func(lsn wal.LSN) error {
		return errors.Join(&wal.StreamError{Op: "stream", Kind: wal.ErrRowTooLarge, At: lsn}, errors.New("close"))
	}
	others := []error{
		nil, context.Canceled, errors.New("out of memory"), fmt.Errorf("load: %w", wal.ErrSlotActive), &wal.StreamError{Op: "stream", Kind: wal.ErrShutdown, At: 7},
	}
	var b barrier
	for range barrierTries {
		for _, err := range others {
			require.False(t, b.blocks(err, log), "%v", err)
		}
	}
	for lsn := range wal.LSN(10) { // the stream gets on
		require.False(t, b.blocks(at(1+lsn), log))
	}
	for try := range barrierTries + 2 {
		require.Equal(t, try+1 >= barrierTries, b.blocks(at(20), log), "try %d", try)
		require.False(t, b.blocks(wal.ErrSlotActive, log)) // another relay's try
	}
	require.False(t, b.blocks(at(21), log))
	require.False(t, heals(at(20)), "not at once")
}
