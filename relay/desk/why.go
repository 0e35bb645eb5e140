package desk

import (
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/relay/store"
)

var errGone = errors.New("the recovery is gone")

// deferral says in words what a relay notes of a delivery that it has put off.
func deferral(word string) string {
	switch word {
	case store.DeferWindow, store.DeferShare:
		return "there was no room for it in memory"
	case store.DeferBreaker:
		return "the breaker of its endpoint was open"
	case store.DeferThrottled:
		return "its endpoint had asked for a pause"
	case store.DeferRate:
		return "the rate limit of its endpoint was exhausted"
	case store.DeferOrder:
		return "it waited behind an earlier delivery of the same key"
	case store.DeferPaused:
		return "its endpoint or tenant was paused"
	case store.DeferInactive:
		return "its endpoint was not active"
	case store.DeferInvalid:
		return "the row of its endpoint could not be used"
	case store.DeferUnverified:
		return "its endpoint was not verified, which the event's type requires"
	case store.DeferHold:
		return "its attempt took long, and the log could not wait for it"
	case store.DeferDrain:
		return "the relay that had it stopped"
	case store.DeferLocal:
		return "the relay's machine had no file descriptor or memory for it"
	case store.DeferBackfill:
		return "its event is older than the tenant's place in the log"
	case store.DeferRecovery:
		return "it is being recovered"
	case store.DeferAudit:
		return "an audit found that it was missing"
	case "replay":
		return "it is being replayed"
	case "":
		return "nobody said why"
	}
	return word
}

// why says why a delivery waits; empty for one that has ended.
func (d *Desk) why(x *Delivery, endpoint *State, place *Place) string {
	if x.Status != "pending" && x.Status != "retrying" {
		return ""
	}
	noted := deferral(x.Error)
	if x.ErrorCode != "deferred" {
		noted = "the last attempt failed (" + x.ErrorCode + ")"
	}
	taken := endpoint.State == "active"
	switch {
	case !x.Queued:
		return "it has no place in the retry queue: deliveries resend gives it one"
	case !x.LeasedBy.IsZero() && x.DueAt.After(d.now):
		return "a relay has it: its attempt is under way, or next"
	case d.state != "active":
		return "the tenant is " + d.state
	case x.DueAt.IsZero() && !taken:
		return "its endpoint is " + endpoint.State
	case x.DueAt.IsZero() && place != nil && place.Before > 0:
		return fmt.Sprintf("it waits behind %s of the same key", count(place.Before))
	case x.DueAt.IsZero():
		return "it is parked: " + noted
	case x.DueAt.After(d.now):
		return noted
	case endpoint.OpenUntil.After(d.now):
		return "it is due, and the breaker of its endpoint is open until " + endpoint.OpenUntil.UTC().Format(time.RFC3339)
	case !endpoint.OpenUntil.IsZero() && !endpoint.FailingSince.IsZero():
		return "it is due, and its endpoint is probed with one delivery at a time (breaker.half_open): every attempt has failed since " +
			endpoint.FailingSince.UTC().Format(time.RFC3339)
	case !x.LeasedBy.IsZero():
		return "it is due again: the relay that had it did not say what became of it"
	default:
		return "it is due: the next relay that looks takes it"
	}
}

// count is a number of what is counted up to CountLimit.
func count(n int) string {
	switch n {
	case 1:
		return "1 other"
	case CountLimit:
		return fmt.Sprintf("%d or more others", n)
	}
	return fmt.Sprintf("%d others", n)
}
