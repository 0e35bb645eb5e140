package relay

import (
	"context"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// A stallWatch tells a stream that has stalled from one that is idle. A server that does not answer is found out by the stream itself (wal.ErrSilent). Here
// it answers, yet the log does not come: a middlebox that swallows, a server process that sleeps on.
//
// No heartbeat has to be written for that, which would keep a quiet server awake: keepalives carry the position that the server process has read up to,
// and the catalogue says what there is to read, and whether that process waits or works. Time alone would not do: decoding a huge transaction that is
// none of ours looks the same from here, and starting again would begin it anew, for ever.
type stallWatch struct {
	owed   wal.LSN   // position of the log that has not come, though the process that should send it waits; zero: all is well
	since  time.Time // when that was first seen
	teller teller    // of a stream that waits for a standby
}

func (w *stallWatch) look(ctx context.Context, s *session) error {
	sender, err := s.store.Sender(ctx)
	if err != nil {
		return err
	}
	at, still := s.stream.Standing()
	patience := s.stream.SenderTimeout()
	now := time.Now()
	if sender.Standby && still >= patience && w.teller.due(now, 10*time.Minute) {
		s.log.Warn("the stream waits for a standby server", "for", still, "hint", "the server is told to wait by synchronized_standby_slots: look after the standby, or take its slot off the list")
	}
	if w.stalled(now, at, still, patience, sender) {
		s.end(&wal.StreamError{
			Op: fmt.Sprintf("stream from slot %q", s.cfg().Database.Slot), Kind: wal.ErrStalled,
			Err: fmt.Errorf("at %s for %s, while the log is there up to %s", at, still, w.owed),
		})
	}
	return nil
}

// stalled tells whether the stream stands still, though the sender waits and the log goes on: for as long as patience by what the stream says, and as long
// again since that was first seen. What the sender is to have read by then is what was flushed at that time.
func (w *stallWatch) stalled(now time.Time, at wal.LSN, still, patience time.Duration, sender store.Sender) bool {
	flushed := wal.LSN(sender.Flushed) //nolint:gosec // positions are below 2^63
	switch {
	case !sender.Waiting || still < patience || at >= flushed:
		w.owed = 0
	case w.owed == 0:
		w.owed, w.since = flushed, now
	default:
		return at < w.owed && now.Sub(w.since) >= patience
	}
	return false
}
