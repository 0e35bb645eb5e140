package store

// Why a delivery was deferred; kept with the pending row, as a label of the metric, and told in words by the desk.
const (
	DeferWindow     = "window"     // no room in memory
	DeferShare      = "share"      // its lane or tenant has its share of the window, others would have to wait
	DeferBreaker    = "breaker"    // the endpoint's breaker is open
	DeferThrottled  = "throttled"  // the receiver asked for a pause
	DeferRate       = "rate"       // the endpoint's rate limit
	DeferOrder      = "order"      // it waits behind another delivery of its key
	DeferPaused     = "paused"     // the tenant or the endpoint is paused
	DeferInactive   = "inactive"   // the endpoint is not active
	DeferInvalid    = "invalid"    // the endpoint's row cannot be used
	DeferUnverified = "unverified" // the endpoint is not verified, which the event's type requires
	DeferHold       = "hold"       // it held back the confirmed LSN for too long
	DeferDrain      = "drain"      // the relay stops
	DeferLocal      = "local"      // this machine had no descriptor or memory for it
	DeferBackfill   = "backfill"   // an event from before the stream
	DeferRecovery   = "recovery"   // an event that the endpoint missed
	DeferAudit      = "audit"      // an event that had no delivery though it should have
)

// Deferrals are all of them.
func Deferrals() []string {
	return []string{
		DeferWindow, DeferShare, DeferBreaker, DeferThrottled, DeferRate, DeferOrder, DeferPaused, DeferInactive, DeferInvalid, DeferUnverified, DeferHold, DeferDrain, DeferLocal,
		DeferBackfill, DeferRecovery, DeferAudit,
	}
}
