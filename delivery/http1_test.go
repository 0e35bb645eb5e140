package delivery

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/netutil"
)

// TestUnaskedAnswer has a receiver answer twice. The second answer is nobody's: not that of the next request to the same host and port, which may be
// another tenant's.
func TestUnaskedAnswer(t *testing.T) {
	t.Parallel()
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	const head, size = "HTTP/1.1 200 OK\r\nContent-Length: %04d\r\n\r\n", 4096 // of the buffer that it is read into: TLS has the rest
	for name, c := range map[string]struct {
		first string
		late  time.Duration
	}{
		"with the first":                  {ok + ok, 0},
		"with the first, in another read": {fmt.Sprintf(head, size-len(head)) + strings.Repeat("x", size-len(head)) + ok, 0},
		"a moment later":                  {ok, 10 * time.Millisecond},
	} {
		for _, scheme := range []string{"http", "https"} {
			t.Run(scheme+"/"+name, func(t *testing.T) {
				t.Parallel()
				twice := make(chan struct{})
				url := rawServerOf(t, scheme, func(conn *rawConn, r *bufio.Reader, n int) {
					_ = readRequest(r)
					if n > 1 {
						_, _ = io.WriteString(conn, "HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n")
						return
					}
					_, _ = io.WriteString(conn, c.first)
					if c.late > 0 {
						<-time.After(c.late)
						_, _ = io.WriteString(conn, ok)
					}
					close(twice)
					hold(r)
				})
				b := setup(t, unchecked)
				first := b.attempt(b.endpoint(url+"/one", uncheckedEndpoint))
				require.True(t, first.OK(), first.Err)
				<-twice
				second := b.attempt(b.endpoint(url+"/other", uncheckedEndpoint))
				assert.Equal(t, Class5xx, second.Class, "the answer of the request before was taken for its own")
			})
		}
	}
}

// TestSameRequest holds the requests of http1 against those of net/http.
func TestSameRequest(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]EndpointRow{
		"plain":         {},
		"a path":        {URL: "/a b/%C3%BC?q=1&q=%20#fragment"},
		"userinfo":      {URL: "user:pass%20word@"},
		"authorization": {URL: "user:pass@", CustomHeaders: []byte(`{"authorization": "Bearer x"}`)},
		"empty":         {URL: "user:pass@", CustomHeaders: []byte(`{"Authorization": ""}`)},
		"blank":         {URL: "user:pass@", CustomHeaders: []byte(`{"Authorization": " "}`)},
		"odd spaces":    {CustomHeaders: []byte(`{"X-A": "\u00a0a\u0085", "X-B": "\u2028b\u3000\t"}`)},
		"headers":       {CustomHeaders: []byte(`{"x-team": "  billing ", "X-Empty": "", "x-tab": "a\tb"}`), SignatureHeader: "X-Own_Signature"},
		"put":           {Method: http.MethodPut, SecretToken: "whsec_c2VjcmV0"},
		"binary":        {PayloadFormat: "cloudevents-binary"},
		"no older one":  {SecretToken: privatePrefix + rfcSeed},
	} {
		for _, scheme := range []string{"http", "https"} {
			t.Run(scheme+"/"+name, func(t *testing.T) {
				t.Parallel()
				type seen struct {
					Method, URI, Host, Body string
					Length                  int64
					Encoding                []string
					Header                  http.Header
				}
				var got []seen
				s := serveOver(t, scheme, func(_ http.ResponseWriter, r *http.Request) {
					body, err := io.ReadAll(r.Body)
					assert.NoError(t, err)
					for _, changes := range []string{"Webhook-Timestamp", "Webhook-Signature"} {
						assert.NotEmpty(t, r.Header.Get(changes))
						r.Header.Del(changes)
					}
					got = append(got, seen{r.Method, r.RequestURI, r.Host, string(body), r.ContentLength, r.TransferEncoding, r.Header})
				})
				url := s.URL
				if userinfo, ok := strings.CutSuffix(row.URL, "@"); ok {
					url = strings.Replace(url, "//", "//"+userinfo+"@", 1)
				} else {
					url += row.URL
				}
				for _, netHTTP := range []bool{false, true} {
					b := setup(t, unchecked, func(c *Config) { c.netHTTP = netHTTP })
					res := b.attempt(b.endpoint(url, uncheckedEndpoint, func(r *EndpointRow) {
						r.CustomHeaders, r.SignatureHeader, r.Method, r.PayloadFormat = row.CustomHeaders, row.SignatureHeader, row.Method, row.PayloadFormat
						if row.SecretToken != "" {
							r.SecretToken = row.SecretToken
						}
					}))
					require.True(t, res.OK(), res.Err)
				}
				require.Len(t, got, 2)
				assert.Equal(t, got[1], got[0])
			})
		}
	}
}

// TestReceiverReloads closes many kept connections at once: an attempt sends again only once, and would find the next dead one.
func TestReceiverReloads(t *testing.T) {
	t.Parallel()
	for _, scheme := range []string{"http", "https"} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			testReceiverReloads(t, scheme)
		})
	}
}

func testReceiverReloads(t *testing.T, scheme string) {
	t.Helper()
	const conns = 20
	var together, closed sync.WaitGroup
	together.Add(conns)
	closed.Add(conns)
	reload := make(chan struct{})
	url := rawServerOf(t, scheme, func(c *rawConn, r *bufio.Reader, n int) {
		for readRequest(r) == nil {
			if n <= conns { // one request on each connection before any is answered
				together.Done()
				together.Wait()
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			if n <= conns {
				<-reload
				_ = c.Close()
				closed.Done()
				return
			}
		}
	})
	b := setup(t, unchecked)
	var warm sync.WaitGroup
	for range conns {
		warm.Go(func() {
			res := b.attempt(b.endpoint(url, uncheckedEndpoint))
			assert.True(t, res.OK(), res.Err)
		})
	}
	warm.Wait()
	close(reload)
	closed.Wait()
	for range 3 {
		res := b.attempt(b.endpoint(url, uncheckedEndpoint))
		assert.True(t, res.OK(), "%s: %s", res.Class, res.Err)
	}
	assert.Zero(t, b.count(b.m.resends), "they were seen to be dead")
	assert.Equal(t, conns+1, b.count(b.m.connOpened))
}

// TestOnlyHTTP2 has receivers that know nothing else: one refuses who does not offer it, the other says nothing of protocols and answers nonsense. Each is asked
// once whether it speaks HTTP/1.1, not for each request.
func TestOnlyHTTP2(t *testing.T) {
	t.Parallel()
	for name, protocols := range map[string][]string{"refuses": {"none of yours"}, "says nothing": nil} {
		var asked atomic.Int32
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor != 2 {
				w.WriteHeader(http.StatusForbidden)
			}
		}))
		s.Config.ErrorLog = discardLog()
		s.TLS = &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			own := &tls.Config{Certificates: []tls.Certificate{testCertificate()}, NextProtos: []string{"h2"}}
			if !slices.Contains(hello.SupportedProtos, "h2") {
				asked.Add(1)
				own.NextProtos = protocols
			}
			return own, nil
		}}
		s.EnableHTTP2 = true
		s.StartTLS()
		t.Cleanup(s.Close)
		b := setup(t, unchecked)
		ep := b.endpoint(s.URL, uncheckedEndpoint)
		for range 3 {
			res := b.attempt(ep)
			require.True(t, res.OK(), "%s: %s: %s", name, res.Class, res.Err)
			b.client.closeIdle()
		}
		assert.LessOrEqual(t, asked.Load(), int32(1), name)
		assert.Zero(t, b.count(b.m.resends), name)
		assert.Zero(t, b.count(b.m.connErrors[stageTLS]), name)
	}
}

// TestSlowToOpen has a receiver that needs longer to shake hands than an attempt has time. The connection is made all the same, for the next attempt to use; what
// has come over it meanwhile, as the tickets of TLS 1.3, is no answer.
func TestSlowToOpen(t *testing.T) {
	t.Parallel()
	slow := make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { // so tickets come last
		<-slow
		return nil, nil //nolint:nilnil // as it is
	}}
	s.StartTLS()
	t.Cleanup(s.Close)
	b := setup(t, unchecked)
	res := b.attempt(b.endpointWithin(limit, s.URL, uncheckedEndpoint))
	assert.Equal(t, ClassTimeout, res.Class, res.Err)
	close(slow)
	ep := b.endpoint(s.URL, uncheckedEndpoint)
	require.Eventually(t, func() bool {
		transport := b.client.small(ep, &Message{})
		transport.mu.Lock()
		defer transport.mu.Unlock()
		return len(transport.hosts[ep.Host].idle) == 1
	}, 5*time.Second, time.Millisecond)
	for range 3 {
		res = b.attempt(ep)
		require.True(t, res.OK(), res.Err)
	}
	assert.Equal(t, 1, b.count(b.m.connOpened))
	assert.Equal(t, 3, b.count(b.m.connReused))
	assert.Zero(t, b.count(b.m.resends))
}

// TestReceiverWithFewPlaces: whoever waits for a connection that is being opened takes one that is given back, since a receiver may take no more of them at once.
func TestReceiverWithFewPlaces(t *testing.T) {
	t.Parallel()
	const places = 4
	var at atomic.Int32
	full := make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		if at.Add(1) == places {
			close(full)
		}
		<-full // all of them are in use before any is given back
	}))
	s.Listener = netutil.LimitListener(s.Listener, places)
	s.StartTLS()
	t.Cleanup(s.Close)
	b := setup(t, unchecked)
	ep := b.endpoint(s.URL, uncheckedEndpoint)
	var busy sync.WaitGroup
	for range 4 * places {
		busy.Go(func() {
			for range 5 {
				res := b.attempt(ep)
				assert.True(t, res.OK(), "%s: %s", res.Class, res.Err)
			}
		})
	}
	busy.Wait()
	b.client.Close()
	assert.Zero(t, b.count(b.m.connOpen))
}

// TestEndedOnItsWay: whoever waits for a connection is given one that has ended by then. Nothing is sent over it, and its place is free again.
func TestEndedOnItsWay(t *testing.T) {
	t.Parallel()
	asked, waits, ended, opened := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
	url := rawServer(t, func(c *rawConn, r *bufio.Reader, n int) {
		for readRequest(r) == nil {
			if n == 1 {
				close(asked)
				<-waits
			}
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			if n == 1 {
				_ = c.Close()
				close(ended)
			}
		}
	})
	b := setup(t)
	road, dials := b.client.plain, atomic.Int32{}
	dial := road.dial
	road.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if dials.Add(1) == 2 {
			close(waits)
			<-opened
		}
		return dial(ctx, network, addr)
	}
	road.crowded = func() bool { <-ended; return false } // asked when a connection is given back
	ep := b.endpoint(url)
	var busy sync.WaitGroup
	attempt := func() {
		res := b.attempt(ep)
		assert.True(t, res.OK(), "%s: %s", res.Class, res.Err)
	}
	busy.Go(attempt)
	<-asked
	busy.Go(attempt)
	<-ended
	assert.Eventually(t, func() bool { return b.count(b.m.connOpen) == 0 }, time.Minute, time.Millisecond)
	close(opened)
	busy.Wait()
	assert.Zero(t, b.count(b.m.resends))
	assert.Empty(t, road.hosts[ep.Host].used)
}

// trailed adds the beginning of an alert to what is written.
type trailed struct {
	net.Conn

	on bool
}

func (c *trailed) Write(p []byte) (int, error) {
	if !c.on {
		return c.Conn.Write(p)
	}
	_, err := c.Conn.Write(append(slices.Clone(p), 0x15, 0x03))
	return len(p), err
}

// TestEndOfOneAnswer: the error that TLS met behind an answer is not that of the next request.
func TestEndOfOneAnswer(t *testing.T) {
	t.Parallel()
	url := rawServer(t, func(c *rawConn, _ *bufio.Reader, n int) {
		beneath := &trailed{Conn: c}
		over := tls.Server(beneath, &tls.Config{Certificates: []tls.Certificate{testCertificate()}, NextProtos: []string{"http/1.1"}, MaxVersion: tls.VersionTLS12})
		r := bufio.NewReader(over)
		for readRequest(r) == nil {
			beneath.on = n == 1
			_, _ = io.WriteString(over, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	b := setup(t, unchecked)
	for range 2 {
		res := b.attempt(b.endpoint(strings.Replace(url, "http", "https", 1), uncheckedEndpoint))
		assert.True(t, res.OK(), "%s: %s", res.Class, res.Err)
	}
	assert.Zero(t, b.count(b.m.connReused))
}

// TestIdleConnectionsEnd: what nobody has used for a while is closed, and nothing before that.
func TestIdleConnectionsEnd(t *testing.T) {
	t.Parallel()
	for how, change := range secureTransports() {
		if strings.Contains(how, "net/http") {
			continue // has timers of its own
		}
		s := serveOver(t, how, func(http.ResponseWriter, *http.Request) {})
		b := setup(t, change, unchecked)
		require.Equal(t, ClassSuccess, b.attempt(b.endpoint(s.URL, uncheckedEndpoint)).Class)
		b.client.sweep(time.Now().Add(b.client.config.IdleTimeout - time.Second))
		assert.Equal(t, 1, b.count(b.m.connOpen), how)
		b.client.sweep(time.Now().Add(b.client.config.IdleTimeout + time.Second))
		assert.Zero(t, b.count(b.m.connOpen), how)
	}
}

// endedConn tells when the end of a context has reached it.
type endedConn struct {
	*net.TCPConn

	ended chan struct{}
}

func (c *endedConn) SetDeadline(at time.Time) error {
	err := c.TCPConn.SetDeadline(at)
	if at.Unix() == 1 {
		close(c.ended)
	}
	return err
}

// TestContextEndedBefore: the end of a context has met a connection while it was idle, and the next attempt with that context gives the connection another
// deadline. Nothing is sent.
func TestContextEndedBefore(t *testing.T) {
	t.Parallel()
	var requests atomic.Int32
	s := serve(t, func(http.ResponseWriter, *http.Request) { requests.Add(1) })
	b := setup(t)
	ended, dial := make(chan struct{}), b.client.plain.dial
	b.client.plain.dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if counted, ok := conn.(*countedConn); ok {
			counted.Conn = &endedConn{counted.Conn.(*net.TCPConn), ended}
		}
		return conn, err
	}
	ep := b.endpoint(s.URL)
	m := Encode(nil, ep.Format, testEvent(), "test")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	require.Equal(t, ClassSuccess, b.client.Attempt(ctx, ep, &m, 1).Class)
	cancel()
	<-ended
	assert.Equal(t, ClassCanceled, b.client.Attempt(ctx, ep, &m, 1).Class)
	assert.EqualValues(t, 1, requests.Load())
	assert.Equal(t, 1, b.count(b.m.connReused), "it was idle")
}

// answers are ways to say 200, and what the short way makes of them; zero leaves them to the parser.
func answers() map[string]int {
	return map[string]int{
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n":                               200,
		"HTTP/1.1 204 No Content\r\nDate: now\r\n\r\n":                               204,
		"HTTP/1.1 202\r\ncontent-length:  2\r\nConnection: Keep-Alive\r\n\r\nok":     202,
		"HTTP/1.1 226 IM Used\r\nX-Ratelimit-Ms: 2\r\nContent-Length: 0\r\n\r\n":     226,
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok":                             0, // not all there
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n":          0,
		"HTTP/1.1 200 OK\r\nContent-Length: +1\r\n\r\nx":                             0,
		"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok":                          0,
		"HTTP/1.1 200 OK\r\n\r\n":                                                    0, // up to the end of the connection
		"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n":          0,
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n":             0,
		"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nContent-Length: 0\r\n\r\n": 0,
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nwebhook-delivery: disable\r\n\r\n":  0,
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nUpgrade: x\r\n\r\n":                 0,
		"HTTP/1.1 200 OK\r\nX: a\r\n Content-Length: 5\r\nContent-Length: 0\r\n\r\n": 0, // a folded line
		"HTTP/1.1 200 OK\r\nContent-Length : 5\r\nContent-Length: 0\r\n\r\n":         0,
		"HTTP/1.1 200 OK\nContent-Length: 0\n\n":                                     0,
		"HTTP/1.1 200 OK\r\nX: a\nContent-Length: 9\r\nContent-Length: 0\r\n\r\n":    0,
		"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\nHTTP/":                  0,
		"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n":                               0,
		"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n":                              0,
		"HTTP/1.1 20x OK\r\nContent-Length: 0\r\n\r\n":                               0,
		"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n":                             0,
		"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n":  0,
		"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 500 Oops\r\n":          200, // what follows is seen to be too much
		"\r\n\r\n": 0, "HTTP/1.1 200\r\n\r\n": 0, "HTTP/1.1 204\r\n\r\n": 204,
	}
}

// shortly has success read an answer, and returns what it leaves.
func shortly(answer string) (status int, left string) {
	c := &http1Conn{in: bufio.NewReader(strings.NewReader(answer)), head: -1}
	_, _ = c.in.Peek(1)
	status = c.success()
	rest, _ := io.ReadAll(c.in)
	return status, string(rest)
}

func TestSuccess(t *testing.T) {
	t.Parallel()
	for answer, want := range answers() {
		status, left := shortly(answer)
		assert.Equal(t, want, status, "%q", answer)
		if want == 0 {
			assert.Equal(t, answer, left, "nothing is read")
		}
	}
}

// FuzzSuccess: what the short way takes for a success, the standard library's parser takes for the same, to the byte.
func FuzzSuccess(f *testing.F) {
	for answer := range answers() {
		f.Add(answer)
	}
	f.Fuzz(func(t *testing.T, answer string) {
		status, left := shortly(answer)
		if status == 0 {
			require.Equal(t, answer, left)
			return
		}
		in := bufio.NewReader(strings.NewReader(answer))
		resp, err := http.ReadResponse(in, &http.Request{Method: http.MethodPost})
		require.NoError(t, err, "%q", answer)
		_, err = io.Copy(io.Discard, resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		rest, err := io.ReadAll(in)
		require.NoError(t, err)
		require.Equal(t, left, string(rest), "%q", answer)
		require.Equal(t, resp.StatusCode, status)
		require.False(t, resp.Close)
		require.Empty(t, resp.Header.Get(headerDelivery))
		require.Empty(t, resp.Trailer)
	})
}
