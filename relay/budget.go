package relay

import (
	"log/slog"
	"math"
	"time"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// A walBudget watches how much of the log the server keeps for the slot, and how long that can go on: until the slot is lost, where the server has a limit
// (max_slot_wal_keep_size), or until database.wal_budget is used up, which stands for the disk that no SQL can see.
//
// What keeps the log is never a receiver, as what cannot be delivered is a row. It is a relay that is away, a database that takes no outcomes, or a
// transaction that has been open for long: its log is kept however far the slot has been confirmed.
type walBudget struct {
	marks []mark // of the last minute
	state string // that was last told of
	told  time.Time
}

// mark is how much log there was at a time.
type mark struct {
	at      time.Time
	written int64
}

const (
	rateOver = time.Minute      // the time over which the rate is taken
	soon     = 10 * time.Minute // less than that left is worth a warning
)

// outlook is what the budget comes to.
type outlook struct {
	rate float64 // bytes of log a second
	left float64 // bytes until the limit; infinite where none is known
}

// seconds is how long what is left lasts at the present rate.
func (o outlook) seconds() float64 {
	if o.left <= 0 {
		return 0
	}
	return o.left / o.rate // infinite, if nothing is written
}

// look takes the figures of now.
func (b *walBudget) look(now time.Time, s *store.Stats, budget int64) outlook {
	for len(b.marks) > 1 && now.Sub(b.marks[1].at) >= rateOver {
		b.marks = b.marks[1:]
	}
	if len(b.marks) > 0 && s.Written < b.marks[len(b.marks)-1].written { // another server, or one that was set back
		b.marks = nil
	}
	b.marks = append(b.marks, mark{now, s.Written})
	o := outlook{left: math.Inf(1)}
	if s.WALStatus == "" { // there is no slot for which any could be kept
		return o
	}
	if first := b.marks[0]; now.After(first.at) {
		o.rate = float64(s.Written-first.written) / now.Sub(first.at).Seconds()
	}
	if s.SafeBytes >= 0 {
		o.left = float64(s.SafeBytes)
	}
	if budget > 0 {
		o.left = min(o.left, float64(budget-s.RetainedBytes))
	}
	return o
}

// tell warns when the limit is near, and says when that is over.
func (b *walBudget) tell(now time.Time, s *store.Stats, o outlook, log *slog.Logger) {
	state := ""
	switch {
	case s.WALStatus == "":
		b.state = ""
		return
	case s.WALStatus == "unreserved", o.left <= 0:
		state = "over"
	case o.seconds() < soon.Seconds():
		state = "near"
	}
	if state == b.state && (state == "" || now.Sub(b.told) < tellAgain) {
		return
	}
	if state == "" {
		log.Info("the log that is kept for the slot is within its limit again", "retained_bytes", s.RetainedBytes)
	} else {
		hint := "look why outcomes cannot be recorded, or raise the limit"
		if s.LagBytes < s.RetainedBytes/2 {
			hint = "everything is confirmed, but a transaction that has been open for long keeps its log: look for the oldest xact_start in pg_stat_activity, and into pg_prepared_xacts"
		}
		log.Warn("the log that is kept for the slot comes to its limit", "retained_bytes", s.RetainedBytes, "unconfirmed_bytes", s.LagBytes,
			"left_bytes", int64(max(o.left, 0)), "left_for", time.Duration(min(o.seconds(), math.MaxInt32)*float64(time.Second)).Round(time.Second), "wal_status", s.WALStatus, "hint", hint)
	}
	b.state, b.told = state, now
}
