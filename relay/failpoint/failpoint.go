// Package failpoint names the places at which the fault harness kills the relay, and the bugs that it plants to see whether it would notice them.
//
// Nothing of it is in a usual build: Hit and Planted are empty then, and the compiler removes what depends on them. With the build tag failpoints
// two variables of the environment choose what happens, one each:
//
//	OUTBOX_RELAY_FAILPOINT=committing:3    the third passing of that place is the process's last
//	OUTBOX_RELAY_PLANTED=flush-zero        the relay works as if that bug had been made
package failpoint

// Point is a place in the code.
type Point string

// The places, on the way of an event and then beside it.
const (
	Decoded     Point = "decoded"      // an event has been read and matches; nothing else knows of it
	Sending     Point = "sending"      // an attempt is about to begin
	Answered    Point = "answered"     // its answer is known to nobody else
	Recording   Point = "recording"    // a batch of outcomes is about to be written
	Committing  Point = "committing"   // a transaction and its COMMIT have been sent, the answer has not been read
	Persisted   Point = "persisted"    // a batch is durable, its position is not confirmed
	Acked       Point = "acked"        // the server has been sent a position
	Deferred    Point = "deferred"     // a delivery is about to become a row of the retry queue
	Claimed     Point = "claimed"      // rows of the retry queue are leased, none is attempted
	Taken       Point = "taken"        // leadership has been taken, nothing is loaded
	Draining    Point = "draining"     // the relay has been told to stop and starts nothing more
	Audited     Point = "audited"      // a checkpoint is about to be saved
	HealLed     Point = "heal-led"     // healing has taken leadership; the slot is as it was
	HealDropped Point = "heal-dropped" // the slot is gone
	HealRenewed Point = "heal-renewed" // the new slot is there, the progress knows nothing of it
	HealSettled Point = "heal-settled" // what was missed is told from what the new slot brings
	HealMarked  Point = "heal-marked"  // that, and the new position, are durable
	HealQueued  Point = "heal-queued"  // a page of what was missed has been queued
)

// Bug is a mistake that the relay does not make.
type Bug string

// The bugs of the fault plan.
const (
	AckBeforePersist  Bug = "ack-before-persist"  // confirms what a batch covers before it is written
	AckCommitLSN      Bug = "ack-commit-lsn"      // covers a transaction up to its commit record, not to its end, and believes that nothing comes twice
	FlushZero         Bug = "flush-zero"          // leaves the flush position to pglogrepl, which fills in what was received
	NoKeepaliveAck    Bug = "no-keepalive-ack"    // confirms commits only
	HealByID          Bug = "heal-by-id"          // heals with what has greater ids than the last delivery
	NoOnConflict      Bug = "no-on-conflict"      // takes for granted that outcomes are written once
	HealWithoutSwitch Bug = "heal-without-switch" // heals without the new position
	StartInFuture     Bug = "start-in-future"     // starts where the server writes, not where the slot stands
	HealWithoutMarks  Bug = "heal-without-marks"  // heals with the new position alone
)
