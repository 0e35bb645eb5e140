package delivery

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery/certtest"
)

// TestNoPlaceIsNoTimeout: an attempt that waits for a limit of the relay's own until its time is over is not the receiver's fault.
func TestNoPlaceIsNoTimeout(t *testing.T) {
	t.Parallel()
	for transport, change := range transports() {
		for _, c := range []struct {
			conns, perHost int
			words          string
		}{
			{2, 1, "all connections to this host are in use: see delivery.max_connections_per_host"},
			{1, 1, "all connections are in use: see delivery.max_connections"},
		} {
			held, release := make(chan struct{}), make(chan struct{})
			slow := serve(t, func(_ http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/slow" {
					close(held)
					<-release
				}
			})
			to := slow
			if c.conns == 1 {
				to = serve(t, func(http.ResponseWriter, *http.Request) {})
			}
			b := setup(t, change, func(cfg *Config) { cfg.MaxConns, cfg.MaxConnsPerHost = c.conns, c.perHost })
			done := make(chan Result, 1)
			go func() { done <- b.attempt(b.endpointWithin(time.Minute, slow.URL+"/slow")) }()
			<-held
			res := b.attempt(b.endpointWithin(200*time.Millisecond, to.URL)) // the connect timeout is longer
			assert.Equal(t, ClassLocal, res.Class, transport)
			assert.Equal(t, c.words, res.Err, transport)
			close(release)
			res = <-done
			assert.True(t, res.OK(), res.Err)

			stuck := rawServer(t, func(_ *rawConn, r *bufio.Reader, _ int) { hold(r) })
			res = b.attempt(b.endpointWithin(200*time.Millisecond, stuck))
			assert.Equal(t, ClassTimeout, res.Class, transport)
		}
	}
}

// TestProxyThatHangsIsNoTimeout has a proxy that does not shake hands within the time of an attempt.
func TestProxyThatHangsIsNoTimeout(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test's own listener
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	b := setup(t, func(c *Config) { c.Proxy = "https://" + l.Addr().String() })
	res := b.attempt(b.endpointWithin(200*time.Millisecond, "http://127.0.0.1:9"))
	assert.Equal(t, ClassLocal, res.Class)
	assert.Equal(t, wordsNoProxy, res.Err)
}

// TestNoDescriptorForALookup: the resolver keeps only the text of an error.
func TestNoDescriptorForALookup(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]bool{
		&net.DNSError{Err: "dial udp 10.0.0.1:53: socket: " + syscall.EMFILE.Error()}: true,
		&net.DNSError{Err: "no such host", IsNotFound: true}:                          false,
		errors.New("socket: " + syscall.EMFILE.Error()):                               false,
	} {
		assert.Equal(t, want, local(fmt.Errorf("look up: %w", err)) != "", err)
	}
}

// TestRedirectedTakeNoPlaces has redirects of other hosts hold as many connections as a host may have, which its own endpoints do not notice.
func TestRedirectedTakeNoPlaces(t *testing.T) {
	t.Parallel()
	const perHost = 2
	for _, encrypted := range []bool{false, true} {
		arrived, answer := make(chan struct{}), make(chan struct{})
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/slow" {
				arrived <- struct{}{}
				<-answer
			}
		}))
		if encrypted {
			s.StartTLS()
		} else {
			s.Start()
		}
		t.Cleanup(s.Close)
		b := setup(t, func(c *Config) {
			c.MaxConnsPerHost, c.AllowInsecureTLS, c.netHTTP = perHost, true, true
		})
		var busy sync.WaitGroup
		for range perHost {
			from := serve(t, func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, s.URL+"/slow", http.StatusTemporaryRedirect)
			})
			busy.Go(func() {
				res := b.attempt(b.endpoint(from.URL, func(r *EndpointRow) { r.FollowRedirects, r.VerifySSL = true, false }))
				assert.True(t, res.OK(), res.Err)
			})
			<-arrived
		}
		res := b.attempt(b.endpointWithin(time.Minute, s.URL, func(r *EndpointRow) { r.VerifySSL = false }))
		assert.True(t, res.OK(), "%s: %s", res.Class, res.Err)
		close(answer)
		busy.Wait()
		b.client.closeIdle()
		assert.Zero(t, b.count(b.m.connOpen))
	}
}

// TestConnectionsAreKept has as many requests at a time as there may be connections, again and again: the first ones are used by all.
func TestConnectionsAreKept(t *testing.T) {
	t.Parallel()
	byBoth(t, testConnectionsAreKept)
}

func testConnectionsAreKept(t *testing.T, change func(*Config)) {
	t.Helper()
	const conns = 300
	var opened atomic.Int64
	came, answer := make(chan struct{}), make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // from then on the end of the connection is seen
		came <- struct{}{}
		select {
		case <-answer:
		case <-r.Context().Done():
		}
	}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	b := setup(t, change, func(c *Config) { c.MaxConns, c.MaxConnsPerHost, c.ConnectTimeout = conns, conns, time.Minute })
	for range 3 {
		results := make(chan Result, conns)
		for range conns {
			go func() { results <- b.attempt(b.endpointWithin(time.Minute, s.URL)) }()
		}
		for range conns {
			select {
			case <-came:
			case res := <-results:
				require.FailNow(t, "an attempt has ended before all had come", "%s: %s", res.Class, res.Err)
			}
		}
		for range conns {
			answer <- struct{}{}
		}
		for range conns {
			res := <-results
			require.True(t, res.OK(), "%s: %s", res.Class, res.Err)
		}
	}
	assert.EqualValues(t, conns, opened.Load())
}

// TestHTTP2GivesWay has one connection for two hosts: net/http does not say that one of HTTP/2 is idle.
func TestHTTP2GivesWay(t *testing.T) {
	t.Parallel()
	byBoth(t, testHTTP2GivesWay)
}

func testHTTP2GivesWay(t *testing.T, change func(*Config)) {
	t.Helper()
	a := certtest.New(t, "all")
	ca := certtest.Write(t, t.TempDir(), "ca.pem", a.PEM())
	var servers []*secureServer
	for range 2 {
		servers = append(servers, secure(t, a.Pair(t, "receiver", "127.0.0.1"), x509.NewCertPool(), tls.NoClientCert, nil))
	}
	b := setup(t, change, func(c *Config) {
		c.MaxConns, c.MaxConnsPerHost, c.ConnectTimeout, c.TLS.CAFile = 1, 1, 4*time.Second, ca
	})
	for i := range 60 {
		res := b.attempt(b.endpoint(servers[i%2].URL))
		require.True(t, res.OK(), "%d: %s: %s", i, res.Class, res.Err)
	}
}

// TestContextOfBefore: the end of a context ends nothing that came after it over the same connection.
func TestContextOfBefore(t *testing.T) {
	t.Parallel()
	s := serve(t, func(http.ResponseWriter, *http.Request) {})
	b := setup(t)
	ep := b.endpoint(s.URL)
	m := Encode(nil, ep.Format, testEvent(), "test")
	var ending sync.WaitGroup
	for range 3000 {
		ctx, cancel := context.WithCancel(t.Context())
		require.Equal(t, ClassSuccess, b.client.Attempt(ctx, ep, &m, 1).Class)
		ending.Go(cancel)
		res := b.client.Attempt(t.Context(), ep, &m, 1)
		require.True(t, res.OK(), "%s: %s", res.Class, res.Err)
	}
	ending.Wait()
}

// TestOwns: who moves within its own host stays whom the secret is for.
func TestOwns(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"http://hooks.test/a", "http://hooks.test/b", true},
		{"http://hooks.test/a", "http://Hooks.Test./b", true},
		{"https://hooks.test:443/a", "https://hooks.test/b", true},
		{"http://hooks.test/a", "https://hooks.test/a", true},
		{"http://hooks.test:80/a", "https://hooks.test:443/a", true},
		{"https://[::1]:8443/a", "https://[::1]:8443/b", true},
		{"https://hooks.test/a", "http://hooks.test/a", false},
		{"http://hooks.test:8080/a", "https://hooks.test/a", false},
		{"http://hooks.test/a", "https://hooks.test:8443/a", false},
		{"https://hooks.test/a", "https://hooks.test:8443/a", false},
		{"https://hooks.test/a", "https://a.hooks.test/a", false},
		{"https://hooks.test/a", "https://test/a", false},
	} {
		ep, err := NewEndpoint(EndpointRow{URL: c.from, SecretToken: testSecret, VerifySSL: true}, testDefaults())
		require.NoError(t, err)
		u, err := url.Parse(c.to)
		require.NoError(t, err)
		assert.Equal(t, c.want, ep.owns(u), "%s to %s", c.from, c.to)
	}
}

// TestSignatureAsAuthorization: there is one header of the name.
func TestSignatureAsAuthorization(t *testing.T) {
	t.Parallel()
	for transport, change := range transports() {
		var got []string
		s := serve(t, func(_ http.ResponseWriter, r *http.Request) { got = r.Header.Values("Authorization") })
		u, err := url.Parse(s.URL)
		require.NoError(t, err)
		u.User = url.UserPassword("user", "secret")
		b := setup(t, change)
		res := b.attempt(b.endpoint(u.String(), func(r *EndpointRow) { r.SignatureHeader = "authorization" }))
		require.True(t, res.OK(), res.Err)
		assert.Equal(t, []string{res.Signature}, got, transport)
	}
}
