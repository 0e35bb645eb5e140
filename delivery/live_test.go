package delivery

import (
	"io"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestReconfiguredAddresses: nothing is sent any more to an address that is denied from now on, over no connection of before; what is under way ends well.
func TestReconfiguredAddresses(t *testing.T) {
	t.Parallel()
	for transport, change := range secureTransports() {
		arrived, answer := make(chan struct{}), make(chan struct{})
		s := serveOver(t, transport, func(_ http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				arrived <- struct{}{}
				<-answer
			}
		})
		b := setup(t, change, unchecked, func(c *Config) { c.reload = 10 * time.Millisecond })
		open := func() int { return b.count(b.m.connOpen) }
		ep, slow := b.endpoint(s.URL, uncheckedEndpoint), b.endpoint(s.URL+"/slow", uncheckedEndpoint)
		require.Equal(t, ClassSuccess, b.attempt(ep).Class)
		require.Equal(t, 1, open())
		denying := b.client.config
		denying.Deny = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
		b.client.Reconfigure(denying)
		require.Eventually(t, func() bool { return open() == 0 }, 5*time.Second, time.Millisecond, "%s: the idle connection is still there", transport)
		assert.Equal(t, ClassDenied, b.attempt(ep).Class, transport)

		b.client.Reconfigure(b.client.config)
		result := make(chan Result, 1)
		go func() { result <- b.attempt(slow) }()
		<-arrived
		b.client.Reconfigure(denying)
		assert.Equal(t, ClassDenied, b.attempt(ep).Class, transport)
		close(answer)
		assert.Equal(t, ClassSuccess, (<-result).Class, transport)
		require.Eventually(t, func() bool { return open() == 0 }, 5*time.Second, time.Millisecond, "%s: the connection is kept", transport)
		assert.Equal(t, ClassDenied, b.attempt(ep).Class, transport)
	}
}

// TestReconfiguredRedirects is TestReconfiguredAddresses for connections to where a redirect has led.
func TestReconfiguredRedirects(t *testing.T) {
	t.Parallel()
	other := serve(t, func(http.ResponseWriter, *http.Request) {})
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
	})
	b := setup(t)
	ep := b.endpoint(s.URL, func(r *EndpointRow) { r.FollowRedirects = true })
	for range 2 {
		res := b.attempt(ep)
		require.True(t, res.OK(), res.Err)
	}
	require.Equal(t, 2, b.count(b.m.connOpen), "both are kept")
	changed := b.client.config
	changed.Deny = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	b.client.Reconfigure(changed)
	assert.Zero(t, b.count(b.m.connOpen))
	res := b.attempt(ep)
	require.True(t, res.OK(), res.Err)
	assert.Equal(t, 4, b.count(b.m.connOpened), "what was opened before is not used")
	b.client.closeIdle()
	assert.Zero(t, b.count(b.m.connOpen))
}

// TestReconfiguredUnderLoad: a change of what does not concern an endpoint costs none of its attempts.
func TestReconfiguredUnderLoad(t *testing.T) {
	t.Parallel()
	for transport, change := range transports() {
		s := serve(t, func(http.ResponseWriter, *http.Request) {})
		b := setup(t, change)
		ep := b.endpoint(s.URL)
		stop := make(chan struct{})
		var busy sync.WaitGroup
		for range 4 {
			busy.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					res := b.attempt(ep)
					assert.True(t, res.OK(), "%s: %s", transport, res.Err)
				}
			})
		}
		for i := range 20 {
			cfg := b.client.config
			cfg.KeepResponseBytes = i
			if i%2 == 0 {
				cfg.Allow = append([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, cfg.Allow...)
			}
			b.client.Reconfigure(cfg)
			res := b.attempt(ep)
			require.True(t, res.OK(), "%s: %s", transport, res.Err)
		}
		close(stop)
		busy.Wait()
	}
}

// TestAnswerMeetsReconfigure closes the idle connections in the moment in which net/http has one of them back whose answer it has not handed over yet.
func TestAnswerMeetsReconfigure(t *testing.T) {
	t.Parallel()
	for closings, want := range map[int]Result{1: {Class: ClassSuccess}, 2: {Class: ClassLocal, Err: "the connection was given up while its answer arrived"}} {
		for {
			b, res, kept := meetClosings(t, closings)
			if kept < closings && res.OK() {
				continue // net/http keeps no connection of which it does not know yet that it has written the request
			}
			assert.Equal(t, want, Result{Class: res.Class, Err: res.Err})
			assert.Equal(t, 1, b.count(b.m.resends))
			break
		}
	}
}

// meetClosings makes an attempt and closes the idle connections each time its own is kept, so many times. The answer stays where it is until the attempt has
// gone on.
func meetClosings(t *testing.T, closings int) (_ *bundle, _ Result, kept int) {
	t.Helper()
	arrived, ended := make(chan struct{}, 3), make(chan struct{})
	s := serve(t, func(http.ResponseWriter, *http.Request) { arrived <- struct{}{} })
	b := setup(t, transports()["net/http"])
	var count atomic.Int32
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{PutIdleConn: func(error) {
		if int(count.Add(1)) > closings {
			return
		}
		<-arrived
		b.client.closeIdle()
		select {
		case <-arrived:
			arrived <- struct{}{}
		case <-ended:
		}
	}})
	ep := b.endpoint(s.URL)
	m := Encode(nil, ep.Format, testEvent(), "test")
	res := b.client.Attempt(ctx, ep, &m, 1)
	close(ended)
	return b, res, int(count.Load())
}

func TestReconfiguredAnswersAndURLs(t *testing.T) {
	t.Parallel()
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("webhook-delivery", "disable")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "why: because")
	})
	b := setup(t, func(c *Config) { c.KeepResponseBytes = 3 })
	ep := b.endpoint(s.URL)
	res := b.attempt(ep)
	assert.Equal(t, "why", string(res.Body))
	assert.Equal(t, DirectiveNone, res.Directive)
	opened := b.count(b.m.connOpened)

	cfg := b.client.config
	cfg.KeepResponseBytes, cfg.ReceiverDisable = 4, true
	b.client.Reconfigure(cfg)
	res = b.attempt(ep)
	assert.Equal(t, "why:", string(res.Body))
	assert.Equal(t, DirectiveDisable, res.Directive)
	assert.Equal(t, opened, b.count(b.m.connOpened), "the addresses are as before, and so are the connections")

	cfg.HTTPSOnly = true
	b.client.Reconfigure(cfg)
	assert.Equal(t, "http:// is denied by network.https_only", b.attempt(ep).Err)
}

func TestLimitsWithOtherDefaults(t *testing.T) {
	t.Parallel()
	d := testDefaults()
	row := EndpointRow{URL: "https://example.com", SecretToken: testSecret, MaxConcurrency: 3}
	ep, err := NewEndpoint(row, d)
	require.NoError(t, err)
	d.Concurrency, d.Rate = 7, 2.5
	concurrency, rate := ep.Limits(d)
	assert.Equal(t, 3, concurrency, "the row has it")
	assert.InDelta(t, 2.5, rate, 0)
}
