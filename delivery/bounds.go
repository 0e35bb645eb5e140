package delivery

import (
	"fmt"
	"math"
	"time"
)

// Bounds are what the row of an endpoint may ask for. A row beyond them is invalid.
type Bounds struct {
	MaxURLLength int // bytes
	// MaxHeaders is how many custom headers there are at most, MaxHeadersSize how many bytes their names and values have together.
	MaxHeaders, MaxHeadersSize int
	// MinTimeout and MaxTimeout are for timeout_seconds, MinBackoff and MaxBackoff for retry_backoff_seconds; NULL is the default, whatever that is.
	MinTimeout, MaxTimeout time.Duration
	MaxRetries             int // after the first attempt
	MinBackoff, MaxBackoff time.Duration
}

// DefaultBounds returns those of the reference tables' own checks where these have them. Common servers refuse a request head of more than 8 to 16 KiB.
func DefaultBounds() Bounds {
	return Bounds{
		MaxURLLength: 4096, MaxHeaders: 50, MaxHeadersSize: 8 << 10,
		MinTimeout: time.Second, MaxTimeout: MaxTimeout, MaxRetries: 10, MinBackoff: time.Second, MaxBackoff: time.Hour,
	}
}

const (
	// MaxTimeout is the longest timeout that any bounds allow (webhook_endpoints.timeout_seconds is 5 to 300), and so the longest time that an attempt can take.
	MaxTimeout    = 300 * time.Second
	maxMultiplier = 5
)

// seconds reads a column in whole seconds.
func seconds(n int32) time.Duration { return time.Duration(n) * time.Second }

// checkSeconds checks a column of which zero is NULL. of is what the keys of its bounds end in.
func (f *faults) checkSeconds(column string, n int32, least, most time.Duration, of string) {
	least = max(least, time.Second)
	f.check(n == 0 || seconds(n) >= least && seconds(n) <= most, column, n,
		fmt.Sprintf("use %.0f to %.0f, see validation.min_%s and max_%s", math.Ceil(least.Seconds()), math.Floor(most.Seconds()), of, of))
}
