package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// Delivery is one (event, endpoint) of a tenant.
type Delivery struct {
	ID                  outbox.UUID // of its row in webhook_deliveries, version 7, chosen before the row exists; its time may be that of the COMMIT
	Tenant              string      // schema
	EventID, EndpointID outbox.UUID
	URL, Method         string            // as they are to be kept in the row
	Message             *delivery.Message // required, whatever the outcome
	Attempts            int               // made so far, including the one of the outcome's Result
	Queued              bool              // a row exists already, with a place in the retry queue
	Replay              int32             // which replay this is; zero: none
	Order               Place             // among the deliveries of its key

	EventType    string      // and what it was matched by: for statistics and news, not kept in the row; may be zero
	Subscription outbox.UUID //
}

// FirstID is the least version 7 id that can be made at a time: greater than all of an earlier millisecond (RFC 9562, section 5.7). Times that none can be made
// at, before 1970 say, have that of the nearest.
func FirstID(t time.Time) (id outbox.UUID) {
	at := min(max(t.UnixMilli(), 0), 1<<48-1)
	binary.BigEndian.PutUint64(id[:8], uint64(at)<<16|7<<12)
	id[8] = 0b10 << 6
	return id
}

// Place is where a delivery stands among those of its endpoint that have the same key: they are attempted in the order of their commits, and
// within a commit in that of their events. The zero Key is none: no order is kept.
type Place struct {
	Key outbox.UUID
	LSN pglogrepl.LSN // of the commit; zero if the event did not come from the log
	N   int32         // number of the event within it
}

// OrderedKey names what an order is kept for.
type OrderedKey struct {
	Tenant        string
	Endpoint, Key outbox.UUID
}

// Status is where an outcome leaves its delivery.
type Status uint8

// The statuses. Zero is none of them.
const (
	Success   Status = iota + 1
	Retrying         // an attempt failed, the next is due
	Pending          // deferred without spending an attempt
	Leased           // in flight, and handed to the retry queue under a lease of the owner's; there is no row yet
	Failed           // given up: a dead letter
	Cancelled        // not to be delivered any more
)

// String returns the status in lower case.
func (s Status) String() string {
	switch s {
	case Success:
		return "success"
	case Retrying:
		return "retrying"
	case Pending:
		return "pending"
	case Leased:
		return "leased"
	case Failed:
		return "failed"
	case Cancelled:
		return "cancelled"
	default:
		return fmt.Sprintf("status %d", uint8(s))
	}
}

// Outcome is what became of a delivery.
type Outcome struct {
	Delivery  *Delivery
	Status    Status
	Attempted bool            // an attempt was made, Result is its result
	Result    delivery.Result // zero unless Attempted
	Due       time.Duration   // from now: when a Retrying or Pending delivery is due, how long a Leased one is ours
	Park      bool            // a Pending one is not due before somebody wakes it
	Reason    string          // why, for Pending, Leased, Cancelled and Disable, and for what Failed without an attempt
	Code      string          // what error_code says of what Failed without an attempt
	Disable   bool            // the endpoint is to be disabled
}

// Progress is a leader's position in the log.
type Progress struct {
	Epoch int64         // of the leadership
	LSN   pglogrepl.LSN // the outcomes of every commit up to here are recorded
	High  pglogrepl.LSN // greatest LSN of a commit with a recorded outcome: between LSN and High some outcomes are recorded
}

// part is what a transaction writes that has a part of the outcomes: a restart has to look before it sends from there on. A nil Progress has none.
func (p *Progress) part() *Progress {
	if p == nil {
		return nil
	}
	return &Progress{Epoch: p.Epoch, High: p.High}
}

// Pair names a delivery by what it is, not by its row.
type Pair struct{ Event, Endpoint outbox.UUID }

var (
	// ErrFenced says that another leader has taken over the slot since this one's epoch began: nothing was written, and this process
	// must stop leading.
	ErrFenced = errors.New("another relay has taken over the slot")
	// ErrGone says that the tenant's schema no longer exists.
	ErrGone = errors.New("the schema no longer exists")
)

// TenantError says what could not be recorded for one tenant while everything else was.
type TenantError struct {
	Tenant string
	Err    error
	// Suspended says that the tenant is suspended, in the same transaction: its outcomes in the batch were not written, and resuming it
	// queues all it has missed.
	Suspended bool
	// Lost counts those outcomes: what they are of is attempted again.
	Lost int
	// Discarded counts outcomes that nothing can keep any more: what they belong to is gone.
	Discarded int
}

// Error names the tenant.
func (e *TenantError) Error() string { return fmt.Sprintf("tenant %q: %v", e.Tenant, e.Err) }

// Unwrap returns Err.
func (e *TenantError) Unwrap() error { return e.Err }
