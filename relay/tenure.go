package relay

import (
	"sync/atomic"
	"time"
)

// A tenure is the time for which a leader may be sure to be the only one, and so may begin attempts of what it has read from the log. The server gives the
// slot to another relay once it has not heard of this one for its wal_sender_timeout, which this one would not notice: a process that was frozen finds
// events in its socket, and writes into a connection that is dead succeed for minutes.
//
// Two things renew it. Listening does, as long as it has not run out: whoever listens all the time hears a server that lives at least every third of the
// timeout (wal.Stream asks for it). A record of outcomes does in any case: it is fenced by the epoch, so nobody has led since it was begun. Once the time
// has run out only that counts, since what is heard then may have waited in the socket.
//
// It is safe for concurrent use; a nil tenure never ends.
type tenure struct {
	began   time.Time
	timeout time.Duration // of the server
	until   atomic.Int64  // nanoseconds after began, by the monotonic clock, which goes on while the process is frozen
}

func newTenure(now time.Time, timeout time.Duration) *tenure {
	t := &tenure{began: now, timeout: timeout}
	t.extend(now)
	return t
}

// extend leaves a third of the timeout for what is under way: a status update that is due, the way to the server.
func (t *tenure) extend(from time.Time) {
	until := int64(from.Sub(t.began) + t.timeout*2/3)
	for old := t.until.Load(); until > old && !t.until.CompareAndSwap(old, until); old = t.until.Load() {
	}
}

// holds tells whether attempts may begin.
func (t *tenure) holds(now time.Time) bool {
	return t == nil || int64(now.Sub(t.began)) < t.until.Load()
}

// heard is told that something of the server has just been read.
func (t *tenure) heard(now time.Time) {
	if t.holds(now) {
		t.extend(now)
	}
}

// proved is told of a record that was begun at a time and has succeeded. It returns true if the tenure had run out.
func (t *tenure) proved(at, now time.Time) (again bool) {
	again = !t.holds(now)
	t.extend(at)
	return again && t.holds(now)
}
