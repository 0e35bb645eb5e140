package delivery

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestGuardByDefault(t *testing.T) {
	t.Parallel()
	g := newGuard(nil, nil)
	for _, a := range []string{
		"127.0.0.1", "127.255.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1",
		"224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254",
		"ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254%eth0", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1",
		"2001::1", "::127.0.0.1", "100::1", "168.63.129.16", "::ffff:168.63.129.16", "100.100.100.200", "192.0.0.192",
	} {
		require.Error(t, g.check(netip.MustParseAddr(a)), a)
	}
	for _, a := range []string{"93.184.215.14", "8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "168.63.129.17"} {
		require.NoError(t, g.check(netip.MustParseAddr(a)), a)
	}
}

func TestGuardLists(t *testing.T) {
	t.Parallel()
	p := netip.MustParsePrefix
	g := newGuard(
		[]netip.Prefix{p("10.0.0.0/8"), p("fd00::/8"), p("::ffff:192.168.0.0/112"), p("8.8.8.0/24"), p("168.63.129.16/32")},
		[]netip.Prefix{p("10.9.0.0/16"), p("8.8.8.8/32"), p("2606:4700::/32"), p("fd00:1::/32"), p("::ffff:192.168.7.0/120")},
	)
	for _, a := range []string{"10.1.1.1", "::ffff:10.1.1.1", "fd00::1", "fd00::1%eth0", "192.168.1.1", "8.8.8.9", "9.9.9.9", "168.63.129.16"} {
		require.NoError(t, g.check(netip.MustParseAddr(a)), a)
	}
	for _, a := range []string{
		"10.9.1.1", "::ffff:10.9.1.1", "8.8.8.8", "2606:4700::1", "2606:4700::1%eth0", "fd00:1::1", "192.168.7.1", "172.16.0.1", "127.0.0.1",
	} {
		require.Error(t, g.check(netip.MustParseAddr(a)), a)
	}
	require.EqualError(t, g.check(netip.MustParseAddr("10.9.1.1")), "address 10.9.1.1 is denied by network.deny")
	require.EqualError(t, g.check(netip.MustParseAddr("127.0.0.1")), "address 127.0.0.1 is not public and not listed in network.allow")
	require.Error(t, g.control(t.Context(), "tcp", "/run/socket", nil))
}

// TestGuardOfNAT64 has an operator whose machines have no IPv4: what is behind the gateway is as forbidden as without it.
func TestGuardOfNAT64(t *testing.T) {
	t.Parallel()
	p := netip.MustParsePrefix
	g := newGuard([]netip.Prefix{p("64:ff9b::/96"), p("10.1.0.0/16")}, []netip.Prefix{p("9.9.9.9/32")})
	for _, a := range []string{"64:ff9b::8.8.8.8", "64:ff9b::10.1.2.3", "8.8.8.8"} {
		require.NoError(t, g.check(netip.MustParseAddr(a)), a)
	}
	for _, a := range []string{"64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::10.2.0.1", "64:ff9b::9.9.9.9", "64:ff9b::168.63.129.16", "64:ff9b::"} {
		require.Error(t, g.check(netip.MustParseAddr(a)), a)
	}
}

// listener counts the connections it is given and answers none.
func listener(t *testing.T, network, addr string) (port string, accepted *atomic.Int32) {
	t.Helper()
	l, err := net.Listen(network, addr) //nolint:noctx // a test's own listener
	require.NoError(t, err)
	accepted = new(atomic.Int32)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			accepted.Add(1)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	_, port, err = net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return port, accepted
}

func TestDenyWins(t *testing.T) {
	t.Parallel()
	port, accepted := listener(t, "tcp", "127.0.0.1:0")
	denied := setup(t, func(c *Config) { c.Deny = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")} })
	for i, scheme := range []string{"http", "https"} {
		res := denied.attempt(denied.endpoint(scheme + "://127.0.0.1:" + port))
		assert.Equal(t, ClassDenied, res.Class)
		assert.False(t, res.Class.Retryable())
		assert.Equal(t, i+1, denied.count(denied.m.connErrors[stageDenied]))
	}
	assert.Zero(t, accepted.Load(), "something was connected to")

	allowed := setup(t)
	assert.Equal(t, ClassReset, allowed.attempt(allowed.endpoint("http://127.0.0.1:"+port)).Class)
	assert.Positive(t, accepted.Load())
}

// TestDeniedAmongOthers has names with several addresses, of which nobody listens on 127.0.0.9.
func TestDeniedAmongOthers(t *testing.T) {
	t.Parallel()
	s := serve(t, func(http.ResponseWriter, *http.Request) {})
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	for addrs, want := range map[string]Class{
		"127.0.0.9,10.0.0.1":           ClassConnect,
		"10.0.0.1,127.0.0.9":           ClassConnect,
		"10.0.0.1,127.0.0.9,10.0.0.2":  ClassConnect,
		"10.0.0.1,10.0.0.2":            ClassDenied,
		"10.0.0.1,127.0.0.9,127.0.0.1": ClassSuccess,
	} {
		b := setupLookup(t, func(context.Context, string) ([]string, error) { return strings.Split(addrs, ","), nil })
		res := b.attempt(b.endpoint("http://mixed.guard.test:" + port))
		assert.Equal(t, want, res.Class, "%s: %s", addrs, res.Err)
	}
}

func TestRedirectToDeniedAddress(t *testing.T) {
	t.Parallel()
	port, accepted := listener(t, "tcp", "127.0.0.2:0")
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "http://127.0.0.2:"+port+"/")
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	for transport, change := range transports() {
		b := setup(t, change, func(c *Config) { c.Deny = []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")} })
		res := b.attempt(b.endpoint(s.URL, func(r *EndpointRow) { r.FollowRedirects = true }))
		assert.Equal(t, Class3xx, res.Class, transport)
		assert.Equal(t, http.StatusTemporaryRedirect, res.Status, transport)
		assert.Equal(t, "answered 307, not followed: address 127.0.0.2 is denied by network.deny", res.Err)
		assert.Equal(t, 1, b.count(b.m.attempts[Class3xx]))
		assert.True(t, res.Class.Retryable(), "it is no fault of the endpoint's row")
	}
	assert.Zero(t, accepted.Load())
}

func TestInsecureTLSNeedsPermission(t *testing.T) {
	t.Parallel()
	s := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(s.Close)
	unchecked := func(r *EndpointRow) { r.VerifySSL = false }

	b := setup(t)
	res := b.attempt(b.endpoint(s.URL, unchecked))
	assert.Equal(t, ClassDenied, res.Class)
	assert.Contains(t, res.Err, "verify_ssl")

	b = setup(t, func(c *Config) { c.AllowInsecureTLS = true })
	res = b.attempt(b.endpoint(s.URL, unchecked))
	assert.Equal(t, ClassSuccess, res.Class, res.Err)
	res = b.attempt(b.endpoint(s.URL))
	assert.Equal(t, ClassTLS, res.Class, "the other profile checks all the same")
	assert.Equal(t, "the certificate is signed by an unknown authority", res.Err)
}
