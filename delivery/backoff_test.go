package delivery

import (
	"math"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBackoffDelay(t *testing.T) {
	t.Parallel()
	b := Backoff{First: 30 * time.Second, Max: time.Hour, Multiplier: 2}
	almostOne := func() float64 { return math.Nextafter(1, 0) }
	for failures, want := range map[int]time.Duration{
		0: 30 * time.Second, 1: 30 * time.Second, 2: time.Minute, 3: 2 * time.Minute, 7: 32 * time.Minute, 8: time.Hour, 10_000: time.Hour,
	} {
		assert.InDelta(t, want, b.Delay(failures, almostOne), float64(time.Microsecond), "%d failures", failures)
	}
	assert.Zero(t, b.Delay(3, func() float64 { return 0 }))
	assert.Equal(t, time.Minute, b.Delay(3, func() float64 { return 0.5 }))
	assert.Zero(t, Backoff{}.Delay(5, almostOne))
}

func TestParseRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"": 0, "0": 0, "120": 2 * time.Minute, " 5 ": 5 * time.Second, "-5": 0, "1.5": 0, "soon": 0, "+5": 0,
		"99999999999999999999999": maxRetryAfter,
		"4000000000":              maxRetryAfter,
		now.Add(90 * time.Second).Format(http.TimeFormat): 90 * time.Second,
		"Monday, 06-May-24 07:09:09 GMT":                  time.Minute, // RFC 850
		"Mon May  6 07:08:19 2024":                        10 * time.Second,
		"Mon, 06 May 2024 07:00:00 GMT":                   0, // past
		"Fri, 31 Dec 9999 23:59:59 GMT":                   maxRetryAfter,
	} {
		assert.Equal(t, want, parseRetryAfter(in, now), "%q", in)
	}
}

func FuzzRetryAfter(f *testing.F) {
	f.Add("120")
	f.Add("Mon, 06 May 2024 07:00:00 GMT")
	f.Fuzz(func(t *testing.T, v string) {
		d := parseRetryAfter(v, time.Unix(1_700_000_000, 0))
		require.GreaterOrEqual(t, d, time.Duration(0))
		require.LessOrEqual(t, d, maxRetryAfter)
	})
}

func TestClasses(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]Class{
		200: ClassSuccess, 204: ClassSuccess, 299: ClassSuccess, 300: Class3xx, 304: Class3xx, 302: Class3xx, 399: Class3xx, 400: Class4xx, 404: Class4xx, 499: Class4xx, 408: Class4xx,
		410: ClassGone, 425: Class4xx, 429: Class429, 500: Class5xx, 599: Class5xx, 101: ClassProtocol, 600: ClassProtocol, 999: ClassProtocol,
	} {
		assert.Equal(t, want, classOfStatus(status), "%d", status)
	}
	final := map[Class]bool{ClassSuccess: true, ClassGone: true, ClassDenied: true, ClassInvalid: true}
	for _, c := range Classes() {
		assert.Equal(t, !final[c], c.Retryable(), c)
	}
}

func TestScheduledDelay(t *testing.T) {
	t.Parallel()
	ep := &Endpoint{Retry: Backoff{First: time.Second, Max: time.Minute, Multiplier: 2}}
	half := func() float64 { return 0.5 }
	assert.Equal(t, time.Second, ep.Delay(2, half), "no schedule")
	ep.schedule = []time.Duration{5 * time.Second, 5 * time.Minute, 2 * time.Hour}
	for failures, want := range map[int]time.Duration{0: 5 * time.Second, 1: 5 * time.Second, 2: 5 * time.Minute, 3: 2 * time.Hour, 9: 2 * time.Hour} {
		assert.Equal(t, want, ep.Delay(failures, half), "%d failures", failures)
	}
	assert.InDelta(t, 4500*time.Millisecond, ep.Delay(1, func() float64 { return 0 }), float64(time.Millisecond))
	assert.InDelta(t, 5500*time.Millisecond, ep.Delay(1, func() float64 { return 1 }), float64(time.Millisecond))
}

func TestDirectives(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		value          string
		status         int
		disable, abort bool
		want           Directive
	}{
		{"disable", 200, true, true, DirectiveDisable},
		{" Disable ", 500, true, true, DirectiveDisable},
		{"disable", 500, false, true, DirectiveNone},
		{"abort-message", 500, true, true, DirectiveAbort},
		{"ABORT-MESSAGE", 400, false, true, DirectiveAbort},
		{"abort-message", 500, true, false, DirectiveNone},
		{"", 500, true, true, DirectiveNone},
		{"enable", 500, true, true, DirectiveNone},
	} {
		s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			if c.value != "" {
				w.Header().Set("webhook-delivery", c.value)
			}
			w.WriteHeader(c.status)
		})
		b := setup(t, func(cfg *Config) { cfg.ReceiverDisable, cfg.ReceiverAbort = c.disable, c.abort })
		res := b.attempt(b.endpoint(s.URL))
		assert.Equal(t, c.want, res.Directive, "%+v", c)
	}
}
