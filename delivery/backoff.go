package delivery

import (
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Backoff says how long to wait before the next attempt. The zero value does not wait.
type Backoff struct {
	// First is the greatest delay after the first failure, Max the greatest delay at all.
	First, Max time.Duration
	// Multiplier is the growth per failure, at least 1.
	Multiplier float64
}

// Delay returns a random time in [0, min(Max, First*Multiplier^(failures-1))): exponential backoff with full jitter
// (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/), so that what failed together does not come back
// together. failures counts the failed attempts so far, from 1; rnd returns a number in [0, 1).
func (b Backoff) Delay(failures int, rnd func() float64) time.Duration {
	ceiling := float64(b.First) * math.Pow(b.Multiplier, float64(max(failures, 1)-1))
	return time.Duration(rnd() * min(ceiling, float64(b.Max)))
}

// Delay returns how long to wait before the next attempt: by the schedule, if the endpoint has one, else by Retry. failures and rnd are as in
// [Backoff.Delay]. A schedule means what it says: its waits are varied by a tenth at most, and no cap shortens them; the last one repeats.
func (ep *Endpoint) Delay(failures int, rnd func() float64) time.Duration {
	if len(ep.schedule) == 0 {
		return ep.Retry.Delay(failures, rnd)
	}
	wait := ep.schedule[min(max(failures, 1), len(ep.schedule))-1]
	return time.Duration(float64(wait) * (0.9 + 0.2*rnd()))
}

// maxRetryAfter keeps a Retry-After of any length within time.Duration. The retry cap is far below it.
const maxRetryAfter = 365 * 24 * time.Hour

// parseRetryAfter reads seconds or an HTTP date (RFC 9110, section 10.2.3). Anything else, and a date in the past, is zero.
func parseRetryAfter(v string, now time.Time) time.Duration {
	v = strings.TrimSpace(v)
	if v == "" {
		return 0
	}
	if strings.Trim(v, "0123456789") == "" {
		seconds, err := strconv.ParseInt(v, 10, 64)
		if err != nil || seconds > int64(maxRetryAfter/time.Second) {
			return maxRetryAfter
		}
		return time.Duration(seconds) * time.Second
	}
	at, err := http.ParseTime(v)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}
