package delivery

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestAttempt(t *testing.T) {
	t.Parallel()
	type received struct {
		*http.Request
		body []byte
	}
	got := make(chan received, 1)
	s := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got <- received{r, body}
	})
	b := setup(t, func(c *Config) { c.Version = "1.2.3" })
	for f := range Format(Formats) {
		ep := b.endpoint(s.URL+"/hook?x=1", func(r *EndpointRow) {
			r.PayloadFormat, r.Method, r.SignatureHeader = f.String(), "PATCH", "X-Sig"
			r.CustomHeaders = []byte(`{"X-Team": "a, b"}`)
		})
		m := Encode(nil, f, fullEvent(), "/src")
		before := time.Now()
		res := b.client.Attempt(t.Context(), ep, &m, 12)
		require.True(t, res.OK(), res.Err)
		assert.Equal(t, 200, res.Status)
		assert.Empty(t, res.Err)
		assert.Empty(t, res.Body)
		assert.WithinRange(t, res.Started, before, time.Now())
		assert.Positive(t, res.Duration)

		r := <-got
		assert.Equal(t, "PATCH", r.Method)
		assert.Equal(t, "/hook?x=1", r.RequestURI)
		assert.Equal(t, string(m.Body), string(r.body), "byte for byte")
		assert.EqualValues(t, len(m.Body), r.ContentLength)
		assert.Equal(t, strings.TrimPrefix(s.URL, "http://"), r.Host)
		assert.Equal(t, m.ContentType, r.Header.Get("Content-Type"))
		assert.Equal(t, "outbox-relay/1.2.3", r.UserAgent())
		assert.Equal(t, "12", r.Header.Get("webhook-attempt"))
		assert.Equal(t, "a, b", r.Header.Get("X-Team"))
		assert.Empty(t, r.Header.Get("Accept-Encoding"))
		require.NoError(t, verifier(t, testSecret, true).Verify(r.body, r.Header))
		assert.True(t, legacyValid(testSecret, r.body, r.Header.Get("X-Sig")))
		assert.Equal(t, r.Header.Get("X-Sig"), res.Signature)
		for _, h := range m.Header {
			assert.Equal(t, h.Value, r.Header.Get(h.Name), h.Name)
		}
	}
	assert.Equal(t, Formats, b.count(b.m.attempts[ClassSuccess]))
	assert.Equal(t, 1, b.count(b.m.connOpened))
	assert.Equal(t, Formats-1, b.count(b.m.connReused))
	assert.Zero(t, b.count(b.m.inFlight))
}

func TestAttemptSignsAfresh(t *testing.T) {
	t.Parallel()
	var ids, times []string
	s := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		ids, times = append(ids, r.Header.Get("webhook-id")), append(times, r.Header.Get("webhook-timestamp"))
	})
	b := setup(t)
	m := Encode(nil, FormatStandard, testEvent(), "src")
	ep := b.endpoint(s.URL)
	first := b.client.Attempt(t.Context(), ep, &m, 1)
	for time.Now().Unix() == first.Started.Unix() { // until the next second has come
		<-time.After(10 * time.Millisecond)
	}
	second := b.client.Attempt(t.Context(), ep, &m, 2)
	require.True(t, first.OK() && second.OK())
	assert.Equal(t, []string{eventID, eventID}, ids)
	assert.NotEqual(t, times[0], times[1])
}

func TestTimesOfAnAttempt(t *testing.T) {
	t.Parallel()
	const thinks = 50 * time.Millisecond
	s := serve(t, func(http.ResponseWriter, *http.Request) { <-time.After(thinks) })
	for name, netHTTP := range map[string]bool{"http1": false, "net/http": true} {
		b := setup(t, func(c *Config) { c.netHTTP = netHTTP })
		ep := b.endpoint(s.URL)
		for i := range 2 {
			res := b.attempt(ep)
			require.True(t, res.OK(), name)
			assert.Equal(t, i > 0, res.Reused, name)
			assert.Positive(t, res.Connected, name)
			assert.GreaterOrEqual(t, res.Answered-res.Connected, thinks-time.Millisecond, name)
			assert.GreaterOrEqual(t, res.Duration, res.Answered, name)
		}
		res := b.attempt(b.endpoint("http://127.0.0.1:1/"))
		require.Equal(t, ClassConnect, res.Class)
		assert.Zero(t, res.Connected, name)
		assert.Zero(t, res.Answered, name)
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	var status int
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "17")
		w.WriteHeader(status)
		_, _ = io.WriteString(w, "why: "+strings.Repeat("x", 10_000))
	})
	b := setup(t, func(c *Config) { c.KeepResponseBytes = 8 })
	for code, want := range map[int]Class{
		200: ClassSuccess, 201: ClassSuccess, 302: Class3xx, 400: Class4xx, 404: Class4xx, 408: Class4xx, 410: ClassGone, 429: Class429, 500: Class5xx, 503: Class5xx,
		700: ClassProtocol,
	} {
		status = code
		res := b.attempt(b.endpoint(s.URL))
		assert.Equal(t, want, res.Class, "%d", code)
		assert.Equal(t, code, res.Status)
		if want == ClassSuccess {
			assert.Empty(t, res.Err)
			assert.Zero(t, res.RetryAfter)
			assert.Empty(t, res.Body)
			continue
		}
		assert.Contains(t, res.Err, "answered")
		assert.Equal(t, 17*time.Second, res.RetryAfter)
		assert.Equal(t, "why: xxx", string(res.Body))
	}
	assert.Equal(t, 1, b.count(b.m.connOpened), "short bodies are read to their end, and the connection is used again")
}

func TestRedirects(t *testing.T) {
	t.Parallel()
	type hop struct {
		method, path, body, signature, auth string
	}
	var hops []hop
	record := func(r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		hops = append(hops, hop{r.Method, r.URL.Path, string(body), r.Header.Get("webhook-signature") + r.Header.Get("X-Webhook-Signature"), r.Header.Get("X-Auth") + r.Header.Get("Authorization")})
	}
	var s *httptest.Server
	other := serve(t, func(w http.ResponseWriter, r *http.Request) {
		record(r)
		if r.URL.Path == "/back" {
			w.Header().Set("Location", s.URL+"/done")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	})
	s = serve(t, func(w http.ResponseWriter, r *http.Request) {
		record(r)
		to := map[string]string{
			"/302": "/done", "/307": s.URL + "/done", "/308": "done", "/away": strings.Replace(other.URL, "://", "://u:p@", 1) + "/x", "/and-back": other.URL + "/back", "/loop": "/loop", "/303": "/done",
			"/nowhere": "", "/bad": "http://%zz/", "/empty": "http://\u00ad/", "/file": "file:///etc/passwd",
		}[r.URL.Path]
		code := map[string]int{"/302": 302, "/308": 308, "/303": 303, "/done": 200}[r.URL.Path]
		if to != "" {
			w.Header().Set("Location", to)
		}
		if code == 0 {
			code = 307
		}
		w.WriteHeader(code)
	})
	b := setup(t)
	follow := func(r *EndpointRow) { r.FollowRedirects, r.CustomHeaders = true, []byte(`{"X-Auth": "t"}`) }
	body := string(Encode(nil, FormatStandard, testEvent(), "").Body)

	for _, path := range []string{"/302", "/307", "/308"} {
		hops = nil
		res := b.attempt(b.endpoint(s.URL+path, follow))
		require.True(t, res.OK(), "%s: %s", path, res.Err)
		require.Len(t, hops, 2, path)
		hops[0].path = "/done"
		assert.Equal(t, hops[0], hops[1], "same method, body, headers")
		assert.Equal(t, body, hops[1].body)
		assert.Equal(t, "POST", hops[1].method)
		assert.NotEmpty(t, hops[1].signature)
	}

	hops = nil
	res := b.attempt(b.endpoint(s.URL+"/away", follow))
	require.True(t, res.OK(), res.Err)
	require.Len(t, hops, 2)
	assert.Equal(t, hop{method: "POST", path: "/x", body: body}, hops[1], "nothing secret to another host")

	hops = nil
	res = b.attempt(b.endpoint(s.URL+"/and-back", follow))
	require.True(t, res.OK(), res.Err)
	require.Len(t, hops, 3)
	assert.Empty(t, hops[1].signature+hops[1].auth)
	assert.Equal(t, hops[0].signature, hops[2].signature)
	assert.Equal(t, hops[0].auth, hops[2].auth)

	hops = nil
	res = b.attempt(b.endpoint(s.URL+"/loop", follow))
	assert.Equal(t, Class3xx, res.Class)
	assert.Len(t, hops, 1+maxRedirects)

	for path, want := range map[string]Class{"/303": Class3xx, "/nowhere": Class3xx, "/file": Class3xx, "/bad": Class3xx, "/empty": Class3xx} {
		hops = nil
		assert.Equal(t, want, b.attempt(b.endpoint(s.URL+path, follow)).Class, path)
		assert.Len(t, hops, 1, path)
	}

	hops = nil
	res = b.attempt(b.endpoint(s.URL + "/302"))
	assert.Equal(t, Class3xx, res.Class)
	assert.Equal(t, 302, res.Status)
	assert.Equal(t, "answered 302, not followed", res.Err)
	assert.Len(t, hops, 1)
}

func TestRedirectThatIsNoURL(t *testing.T) {
	t.Parallel()
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://%zz/")
		w.WriteHeader(http.StatusFound)
	})
	for transport, change := range transports() {
		for _, follow := range []bool{false, true} {
			b := setup(t, change)
			res := b.attempt(b.endpoint(s.URL, func(r *EndpointRow) { r.FollowRedirects = follow }))
			assert.Equal(t, Class3xx, res.Class, "%s, follow %t: %s", transport, follow, res.Err)
			assert.Equal(t, 302, res.Status)
		}
	}
}

// TestRequestLine has URLs with what must not stand in a request line as it is.
func TestRequestLine(t *testing.T) {
	t.Parallel()
	lines := make(chan string, 1)
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		lines <- r.RequestURI
		if r.URL.Path == "/away" {
			w.Header().Set("Location", "/there?a b")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	})
	for transport, change := range transports() {
		b := setup(t, change)
		res := b.attempt(b.endpoint(s.URL + "/\u00fc b\"?c=%20d"))
		require.True(t, res.OK(), "%s: %s", transport, res.Err)
		assert.Equal(t, "/%C3%BC%20b%22?c=%20d", <-lines)

		res = b.attempt(b.endpoint(s.URL+"/away", func(r *EndpointRow) { r.FollowRedirects = true }))
		assert.Equal(t, Class3xx, res.Class, res.Err)
		assert.Equal(t, "/away", <-lines)
	}
}

func TestRedirectNeverLeavesTLS(t *testing.T) {
	t.Parallel()
	plain := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("the body went out in the clear") })
	s := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusTemporaryRedirect))
	t.Cleanup(s.Close)
	b := setup(t, func(c *Config) { c.AllowInsecureTLS = true })
	res := b.attempt(b.endpoint(s.URL, func(r *EndpointRow) { r.VerifySSL, r.FollowRedirects = false, true }))
	assert.Equal(t, Class3xx, res.Class)
}

func TestHTTP2(t *testing.T) {
	t.Parallel()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if r.ProtoMajor != 2 || verifier(t, testSecret, true).Verify(body, r.Header) != nil {
			w.WriteHeader(http.StatusBadRequest)
		}
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	b := setup(t, func(c *Config) { c.AllowInsecureTLS, c.netHTTP = true, true })
	for range 3 {
		res := b.attempt(b.endpoint(s.URL, func(r *EndpointRow) { r.VerifySSL = false }))
		require.True(t, res.OK(), "%+v", res)
	}
	assert.Equal(t, 1, b.count(b.m.connOpened))
}

func TestCallerEndsAttempt(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	s := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadAll(r.Body)
		cancel()
		<-r.Context().Done()
	})
	b := setup(t)
	m := Encode(nil, FormatStandard, testEvent(), "")
	res := b.client.Attempt(ctx, b.endpoint(s.URL), &m, 1)
	assert.Equal(t, ClassCanceled, res.Class)
	res = b.client.Attempt(ctx, b.endpoint(s.URL), &m, 1)
	assert.Equal(t, ClassCanceled, res.Class, "before it began")
}

func TestMessageWithImpossibleHeader(t *testing.T) {
	t.Parallel()
	s := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("sent") })
	b := setup(t)
	for _, h := range []HeaderField{{"ce-type", "a\r\nHost: evil"}, {"a b", "x"}} {
		m := Message{Header: []HeaderField{h}}
		assert.Equal(t, ClassInvalid, b.client.Attempt(t.Context(), b.endpoint(s.URL), &m, 1).Class)
	}
}

func TestConnectionLimit(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) {
		c.MaxConns, c.MaxConnsPerHost = 2, 2
	})
	release := make(chan struct{})
	held := make(chan struct{})
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test's own listener
	require.NoError(t, err)
	require.NoError(t, l.Close())
	for range 4 { // a connection that fails takes no place
		require.Equal(t, "connection refused", b.attempt(b.endpoint("http://"+l.Addr().String())).Err)
	}
	slow := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadAll(r.Body)
		held <- struct{}{}
		<-release
	})
	fast := serve(t, func(http.ResponseWriter, *http.Request) {})
	for range 4 { // the idle connection to one host gives way to the other's
		require.True(t, func() bool { r := b.attempt(b.endpoint(fast.URL)); return r.OK() }())
		quick := serve(t, func(http.ResponseWriter, *http.Request) {})
		res := b.attempt(b.endpoint(quick.URL))
		require.True(t, res.OK(), res.Err)
		assert.LessOrEqual(t, b.count(b.m.connOpen), 2)
	}

	results := make(chan Result, 2)
	for range 2 {
		go func() { results <- b.attempt(b.endpoint(slow.URL)) }()
		<-held
	}
	hasty := b.client.config
	hasty.ConnectTimeout = 200 * time.Millisecond
	b.client.Reconfigure(hasty)
	res := b.attempt(b.endpoint(fast.URL))
	assert.Equal(t, ClassLocal, res.Class)
	assert.Contains(t, res.Err, "delivery.max_connections")
	b.client.Reconfigure(b.client.config)
	close(release)
	for range 2 {
		res := <-results
		assert.True(t, res.OK(), res.Err)
	}
	res = b.attempt(b.endpoint(fast.URL))
	assert.True(t, res.OK(), "%+v", res)
}

// TestFinishedConnectionGivesWay has one connection for all hosts: while a request to another one waits, it is not kept, whoever uses it meanwhile.
func TestFinishedConnectionGivesWay(t *testing.T) {
	t.Parallel()
	for transport, change := range transports() {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			held, release := make(chan struct{}), make(chan struct{})
			busy := serve(t, func(_ http.ResponseWriter, r *http.Request) {
				_, _ = io.ReadAll(r.Body)
				if r.URL.Path == "/slow" {
					close(held)
					<-release
				}
			})
			other := serve(t, func(http.ResponseWriter, *http.Request) {})
			b := setup(t, change, func(c *Config) {
				c.MaxConns, c.MaxConnsPerHost, c.ConnectTimeout = 1, 1, time.Minute
			})
			results := make(chan Result, 3)
			try := func(url string) { results <- b.attempt(b.endpointWithin(time.Minute, url)) }
			go try(busy.URL + "/slow")
			<-held
			go try(other.URL)
			require.Eventually(t, b.client.dialer.crowded, 30*time.Second, time.Millisecond)
			go try(busy.URL + "/next")
			require.Eventually(t, func() bool { return b.count(b.m.inFlight) == 3 }, 30*time.Second, time.Millisecond)
			<-time.After(10 * time.Millisecond) // until it waits for the connection, too
			close(release)
			for range 3 {
				res := <-results
				assert.True(t, res.OK(), "%s: %s", res.Class, res.Err)
				assert.Less(t, res.Duration, 30*time.Second, "one that is kept is closed after 55 s")
			}
		})
	}
}

func TestMetricsStartAtZero(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	NewMetrics(reg)
	n, err := testutil.GatherAndCount(reg)
	require.NoError(t, err)
	assert.Equal(t, len(Classes())+5+10-2+1, n)
	problems, err := testutil.GatherAndLint(reg)
	require.NoError(t, err)
	assert.Empty(t, problems)
}
