package delivery

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery/certtest"
)

// connectProxy is a real proxy that notes what it was asked for.
type connectProxy struct {
	t    testing.TB
	addr string
	user string // who may; empty: everyone
	// behave, unless nil, is done instead of connecting; if it returns an address, that is connected to.
	behave func(client net.Conn) (elsewhere string)

	mu    sync.Mutex
	asked []string
	wg    sync.WaitGroup
}

// startProxy listens on an address that no target has. With certificate it is spoken to over TLS.
func startProxy(t testing.TB, certificate *tls.Certificate) *connectProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.3:0") //nolint:noctx // a test's own listener
	require.NoError(t, err)
	life, end := context.WithCancel(context.Background())
	p := &connectProxy{t: t, addr: l.Addr().String()}
	if certificate != nil {
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{*certificate}})
	}
	p.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			p.wg.Go(func() {
				// A connection of HTTP/2 whose last stream is just ending is not idle yet when the client closes those that are.
				stop := context.AfterFunc(life, func() { _ = client.Close() })
				defer func() { stop(); _ = client.Close() }()
				p.serve(client)
			})
		}
	})
	t.Cleanup(func() { end(); _ = l.Close(); p.wg.Wait() })
	return p
}

func (p *connectProxy) serve(client net.Conn) {
	in := bufio.NewReader(client)
	req, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.asked = append(p.asked, req.Method+" "+req.RequestURI)
	p.mu.Unlock()
	assert.Equal(p.t, req.RequestURI, req.Host)
	if want := "Basic " + base64.StdEncoding.EncodeToString([]byte(p.user)); p.user != "" && req.Header.Get("Proxy-Authorization") != want {
		_, _ = io.WriteString(client, "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\r\n")
		return
	}
	target := req.RequestURI
	if p.behave != nil {
		if target = p.behave(client); target == "" {
			return
		}
	}
	server, err := net.Dial("tcp", target) //nolint:noctx // it ends with its client
	if err != nil {
		_, _ = io.WriteString(client, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
		return
	}
	defer func() { _ = server.Close() }()
	_, _ = io.WriteString(client, "HTTP/1.1 200 Connection established\r\n\r\n")
	p.wg.Go(func() {
		_, _ = io.Copy(server, in)
		_ = server.Close()
	})
	_, _ = io.Copy(client, server)
}

// requests returns what was asked for since the last time.
func (p *connectProxy) requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	asked := p.asked
	p.asked = nil
	return asked
}

// pointing resolves every name to these addresses.
func pointing(addrs ...string) func(context.Context, string) ([]string, error) {
	return func(context.Context, string) ([]string, error) { return addrs, nil }
}

func TestProxy(t *testing.T) {
	t.Parallel()
	a := certtest.New(t, "all")
	ca := certtest.Write(t, t.TempDir(), "ca.pem", a.PEM())
	var hosts []string
	s := serve(t, func(_ http.ResponseWriter, r *http.Request) { hosts = append(hosts, r.Host) })
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	secured := secure(t, a.Pair(t, "receiver", "hooks.proxy.test"), x509.NewCertPool(), tls.NoClientCert, nil)
	_, securedPort, _ := strings.Cut(strings.TrimPrefix(secured.URL, "https://"), ":")
	certificate := a.Pair(t, "proxy", "127.0.0.3")

	for transport, change := range transports() {
		for scheme, certificate := range map[string]*tls.Certificate{"http": nil, "https": &certificate} {
			name := fmt.Sprintf("%s by %s proxy", transport, scheme)
			p := startProxy(t, certificate)
			p.user = "relay:p@ss"
			b := setupLookup(t, pointing("127.0.0.1"), change, func(c *Config) {
				c.Proxy, c.TLS.CAFile = scheme+"://relay:p%40ss@"+p.addr, ca
				c.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")} // the proxy's is another one
			})
			for range 3 {
				res := b.attempt(b.endpoint("http://hooks.proxy.test:" + port))
				require.True(t, res.OK(), "%s: %s", name, res.Err)
			}
			assert.Equal(t, []string{"CONNECT 127.0.0.1:" + port}, p.requests(), "%s: the address, once: the connection is kept", name)
			assert.Equal(t, "hooks.proxy.test:"+port, hosts[len(hosts)-1])
			for range 3 {
				res := b.attempt(b.endpoint("https://hooks.proxy.test:" + securedPort))
				require.True(t, res.OK(), "%s: %s", name, res.Err)
			}
			assert.Equal(t, []string{"CONNECT 127.0.0.1:" + securedPort}, p.requests(), name)
			assert.Equal(t, "nobody hooks.proxy.test", secured.last())
			assert.Equal(t, 2, b.count(b.m.connOpened), name)

			res := b.attempt(b.endpoint("http://" + p.addr))
			assert.Equal(t, ClassDenied, res.Class, "the proxy's own address is no target: %s", res.Err)
			assert.Empty(t, p.requests())
		}
	}
}

// TestProxyIsAskedForNothingDenied: the guard and the policy see the target, not the proxy.
func TestProxyIsAskedForNothingDenied(t *testing.T) {
	t.Parallel()
	p := startProxy(t, nil)
	port, accepted := listener(t, "tcp", "127.0.0.1:0")
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://target.proxy.test:"+port)
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	_, allowedPort, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	for transport, change := range transports() {
		proxied := func(c *Config) {
			c.Proxy, c.Allow = "http://"+p.addr, nil
			c.DenyHosts = []string{"evil.proxy.test"}
		}
		for _, addr := range []string{"127.0.0.1", "::ffff:127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "64:ff9b::7f00:1", "0.0.0.0", "fe80::1%lo"} {
			b := setupLookup(t, pointing(addr), change, proxied)
			for _, scheme := range []string{"http", "https"} {
				res := b.attempt(b.endpoint(scheme + "://target.proxy.test:" + port))
				assert.Equal(t, ClassDenied, res.Class, "%s, %s: %s", transport, addr, res.Err)
			}
		}
		b := setupLookup(t, pointing("8.8.8.8"), change, proxied)
		for _, host := range []string{"127.0.0.1", "[::1]", "[::ffff:7f00:1]", "evil.proxy.test"} {
			res := b.attempt(b.endpoint("http://" + host + ":" + port))
			assert.Equal(t, ClassDenied, res.Class, "%s, %s: %s", transport, host, res.Err)
		}
		assert.Empty(t, p.requests())

		moved := setupLookup(t, func(_ context.Context, host string) ([]string, error) {
			if host == "target.proxy.test" {
				return []string{"127.0.0.2"}, nil
			}
			return []string{"127.0.0.1"}, nil
		}, change, proxied, func(c *Config) { c.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")} })
		res := moved.attempt(moved.endpoint("http://first.proxy.test:"+allowedPort, func(r *EndpointRow) { r.FollowRedirects = true }))
		assert.Equal(t, Class3xx, res.Class, res.Err)
		assert.Equal(t, []string{"CONNECT 127.0.0.1:" + allowedPort}, p.requests())
	}
	assert.Zero(t, accepted.Load(), "something was connected to")
}

func TestProxyFaults(t *testing.T) {
	t.Parallel()
	a := certtest.New(t, "all")
	ca := certtest.Write(t, t.TempDir(), "ca.pem", a.PEM())
	wanted := secure(t, a.Pair(t, "wanted", "wanted.proxy.test"), x509.NewCertPool(), tls.NoClientCert, nil)
	other := secure(t, a.Pair(t, "other", "other.proxy.test"), x509.NewCertPool(), tls.NoClientCert, nil)
	_, port, _ := strings.Cut(strings.TrimPrefix(wanted.URL, "https://"), ":")
	says := func(text string) func(net.Conn) string {
		return func(c net.Conn) string {
			_, _ = io.WriteString(c, text)
			return ""
		}
	}
	for name, c := range map[string]struct {
		user   string
		behave func(net.Conn) string
		class  Class
		err    string
	}{
		"lies":               {"", func(net.Conn) string { return strings.TrimPrefix(other.URL, "https://") }, ClassTLS, "the certificate is not valid for this host name"},
		"credentials":        {"another:user", nil, ClassLocal, "the proxy refuses the user and password in network.proxy"},
		"502":                {"", says("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 5\r\n\r\nsorry"), ClassConnect, "the proxy has not connected: it answered 502"},
		"403":                {"", says("HTTP/1.1 403 Forbidden\r\n\r\n"), ClassConnect, "the proxy has not connected: it answered 403"},
		"redirects":          {"", says("HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n"), ClassConnect, "the proxy has not connected: it answered 302"},
		"hangs":              {"", func(c net.Conn) string { _, _ = io.Copy(io.Discard, c); return "" }, ClassTimeout, "no connection within the connect timeout"},
		"hangs up":           {"", says(""), ClassConnect, "the proxy ended the connection instead of an answer"},
		"hangs up after 200": {"", says("HTTP/1.1 200 OK\r\n\r\n"), ClassTLS, "the TLS handshake failed"},
		"no proxy":           {"", says("SSH-2.0-x\r\n"), ClassLocal, "what is at network.proxy does not answer as an HTTP proxy"},
		"a web server":       {"", says("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"), ClassLocal, "what is at network.proxy does not answer as an HTTP proxy"},
		"has no end":         {"", says("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 2*maxProxyHead)), ClassLocal, "what is at network.proxy does not answer as an HTTP proxy"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := startProxy(t, nil)
			p.user, p.behave = c.user, c.behave
			var log bytes.Buffer
			cfg := testConfig()
			cfg.Proxy, cfg.TLS.CAFile = "http://relay:s3cret@"+p.addr, ca
			if c.class == ClassTimeout {
				cfg.ConnectTimeout = limit
			}
			cfg.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
			client, err := newClient(cfg, nil, slog.New(slog.NewTextHandler(&log, nil)), pointing("127.0.0.1"))
			require.NoError(t, err)
			b := &bundle{t: t, client: client, m: client.m}
			for range 2 {
				res := b.attempt(b.endpoint("https://wanted.proxy.test:" + port))
				assert.Equal(t, c.class, res.Class, res.Err)
				assert.Equal(t, c.err, res.Err)
			}
			client.Close()
			if c.class == ClassLocal {
				assert.Equal(t, 1, strings.Count(log.String(), "the proxy does not work"), log.String())
				assert.Equal(t, 2, b.count(b.m.connErrors[stageProxy]))
			} else {
				assert.Empty(t, log.String())
			}
			assert.NotContains(t, log.String(), "s3cret")
			assert.Zero(t, b.count(b.m.connOpen))
		})
	}
}

// TestReceiverThatSpeaksFirst: what is behind the end of the proxy's answer is the receiver's, and it is told the same as without a proxy.
func TestReceiverThatSpeaksFirst(t *testing.T) {
	t.Parallel()
	const banner = "SSH-2.0-x\r\n"
	direct := rawServer(t, func(c *rawConn, r *bufio.Reader, _ int) {
		_, _ = io.WriteString(c, banner)
		hold(r)
	})
	p := startProxy(t, nil)
	p.behave = func(c net.Conn) string {
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"+banner) // in one piece
		_, _ = io.Copy(io.Discard, c)
		return ""
	}
	var log bytes.Buffer
	cfg := testConfig()
	cfg.Proxy, cfg.Allow = "http://"+p.addr, []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	client, err := newClient(cfg, nil, slog.New(slog.NewTextHandler(&log, nil)), pointing("127.0.0.1"))
	require.NoError(t, err)
	proxied := &bundle{t: t, client: client, m: client.m}
	for scheme, class := range map[string]Class{"http": ClassProtocol, "https": ClassTLS} {
		url := strings.Replace(direct, "http", scheme, 1)
		without, with := setup(t).attempt(proxied.endpoint(url)), proxied.attempt(proxied.endpoint(url))
		assert.Equal(t, class, with.Class, with.Err)
		assert.Equal(t, without.Class, with.Class)
		assert.Equal(t, without.Err, with.Err)
	}
	client.Close()
	assert.Empty(t, log.String())
	assert.Zero(t, proxied.count(client.m.connErrors[stageProxy]))
	assert.Zero(t, proxied.count(client.m.connOpen))
}

func TestProxyThatIsAway(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test's own listener
	require.NoError(t, err)
	require.NoError(t, l.Close())
	for transport, change := range transports() {
		b := setupLookup(t, pointing("127.0.0.1", "127.0.0.2"), change, func(c *Config) { c.Proxy = "http://" + l.Addr().String() })
		res := b.attempt(b.endpoint("http://hooks.proxy.test"))
		assert.Equal(t, ClassLocal, res.Class, transport)
		assert.Equal(t, "the proxy cannot be reached: see network.proxy", res.Err)
		assert.Zero(t, b.count(b.m.connOpen))
	}
}

// TestProxyTriesAllAddresses has a proxy that does not reach the first address of a name.
func TestProxyTriesAllAddresses(t *testing.T) {
	t.Parallel()
	s := serve(t, func(http.ResponseWriter, *http.Request) {})
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	p := startProxy(t, nil)
	b := setupLookup(t, pointing("127.0.0.9", "::ffff:127.0.0.1"), func(c *Config) { c.Proxy = "http://" + p.addr })
	res := b.attempt(b.endpoint("http://hooks.proxy.test:" + port))
	require.True(t, res.OK(), res.Err)
	assert.Equal(t, []string{"CONNECT 127.0.0.9:" + port, "CONNECT 127.0.0.1:" + port}, p.requests())
}

func TestProxyFile(t *testing.T) {
	t.Parallel()
	s := serve(t, func(http.ResponseWriter, *http.Request) {})
	one, two := startProxy(t, nil), startProxy(t, nil)
	dir := t.TempDir()
	file := certtest.Write(t, dir, "proxy", []byte("http://"+one.addr+"\n"))
	b := setup(t, func(c *Config) { c.ProxyFile, c.reload = file, time.Hour })
	try := func() {
		t.Helper()
		b.client.closeIdle()
		res := b.attempt(b.endpoint(s.URL))
		require.True(t, res.OK(), res.Err)
	}
	try()
	certtest.Write(t, dir, "proxy", []byte("no URL, but longer than it was"))
	b.client.reload(time.Now())
	try()
	assert.Len(t, one.requests(), 2)
	certtest.Write(t, dir, "proxy", []byte("http://user:new@"+two.addr))
	b.client.reload(time.Now())
	try()
	assert.Len(t, slices.Concat(one.requests(), two.requests()), 1)
	assert.Equal(t, two.addr, b.client.dialer.proxy.url.Load().Host)
}
