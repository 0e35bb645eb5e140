package wal

import (
	"context"
	"time"
)

// lockstep keeps the stream from going on one message at a time when the server is behind. Where processors are few, each message that the server sends wakes
// the reader, which wakes a worker, which wakes a receiver, and all of them run before the server comes to its next message: two cores were busy at 4,000
// transactions a second, each later than the one before, which take 40,000 when they come many at a time. So a reader that had to wait for what it read, while the
// server has more, rests for a moment before the next read: the server goes on undisturbed, and what it sends meanwhile is read at once.
//
// Whether it has more is told by its own clock alone: a transaction that had been committed for a while when the message before it was sent has waited for its
// turn, and so has what is sent for a while after the first message of a large transaction.
type lockstep struct {
	late     int       // transactions in a row that had waited
	behind   bool      // the server has more
	waited   bool      // the last read had to wait, as nothing had been sent
	asked    time.Time // when that read began
	sentAt   int64     // when the last message was sent, in microseconds of PostgreSQL's epoch by the server's clock, as the next one
	openedAt int64     // when the first one of this transaction was; zero: that is to come
}

const (
	// lateAfter is what is longer than a flush of the log takes: transactions that are flushed together have waited for no more than that.
	lateAfter = 2 * time.Millisecond
	// lateInRow is how many transactions in a row have to be late: a flush that took long once is not a server that is behind.
	lateInRow = 4
	// rest is no longer than what is late already.
	rest = 2 * time.Millisecond
	// waits is more than a read takes that need not wait.
	waits = 20 * time.Microsecond
)

// begins is told of the start of a transaction, before sent.
func (l *lockstep) begins(commit time.Time) {
	if l.late++; l.sentAt-(commit.UnixMicro()-epochMicros) <= lateAfter.Microseconds() {
		l.late = 0
	}
	l.behind, l.openedAt = l.late >= lateInRow, 0
}

// sent is told when the server sent a piece of the log.
func (l *lockstep) sent(at int64) {
	if l.sentAt = at; l.openedAt == 0 {
		l.openedAt = at
	}
	l.behind = l.behind || at-l.openedAt > lateAfter.Microseconds()
}

// idle is told that it is time to look up from reading: whoever is behind will be seen to be so again.
func (l *lockstep) idle() { l.behind = false }

// read comes before each read from the socket, and rests where that is due.
func (l *lockstep) read(ctx context.Context) {
	if !l.behind {
		return
	}
	if l.waited {
		t := time.NewTimer(rest)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
	}
	l.asked = time.Now()
}

// has comes after it.
func (l *lockstep) has(now time.Time) { l.waited = l.behind && now.Sub(l.asked) > waits }
