package delivery

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery/certtest"
	"github.com/neo-commons/outbox-relay/outbox"
)

// secureServer notes who calls and by which name, in this order. It wants clients to have a certificate of the authority, or takes one if there is one.
type secureServer struct {
	*httptest.Server
	mu    sync.Mutex
	seen  []string
	trust *x509.CertPool
}

func secure(t testing.TB, certificate tls.Certificate, clients *x509.CertPool, auth tls.ClientAuthType, h http.HandlerFunc) *secureServer {
	t.Helper()
	s := &secureServer{trust: clients}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			who = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		s.mu.Lock()
		s.seen = append(s.seen, who+" "+r.TLS.ServerName)
		s.mu.Unlock()
		if h != nil {
			h(w, r)
		}
	}))
	s.Config.ErrorLog = discardLog()
	s.TLS = &tls.Config{
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return &tls.Config{Certificates: []tls.Certificate{certificate}, ClientCAs: s.trust, ClientAuth: auth, NextProtos: s.TLS.NextProtos}, nil
		},
		Certificates: []tls.Certificate{certificate},
		NextProtos:   []string{"h2", "http/1.1"},
	}
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// last is what the last request was noted as.
func (s *secureServer) last() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.seen) == 0 {
		return ""
	}
	return s.seen[len(s.seen)-1]
}

// of makes an endpoint of a tenant.
func (b *bundle) of(tenant, url string, change ...func(*EndpointRow)) *Endpoint {
	b.t.Helper()
	row := EndpointRow{ID: outbox.NewUUID(), URL: url, SecretToken: testSecret, VerifySSL: true, Active: true}
	for _, f := range change {
		f(&row)
	}
	d := testDefaults()
	d.Timeout, d.Tenant = 5*time.Second, tenant
	ep, err := NewEndpoint(row, d)
	require.NoError(b.t, err)
	return ep
}

// clientFiles writes a certificate of the authority, and its key.
func clientFiles(t testing.TB, a *certtest.Authority, dir, name string) TLSSettings {
	t.Helper()
	cert, key := a.Issue(t, name)
	return TLSSettings{CertFile: certtest.Write(t, dir, name+".pem", cert), KeyFile: certtest.Write(t, dir, name+"-key.pem", key)}
}

func TestClientCertificates(t *testing.T) {
	t.Parallel()
	byBoth(t, testClientCertificates)
}

func testClientCertificates(t *testing.T, change func(*Config)) {
	t.Helper()
	servers, clients, dir := certtest.New(t, "servers"), certtest.New(t, "clients"), t.TempDir()
	ca := certtest.Write(t, dir, "ca.pem", servers.PEM())
	s := secure(t, servers.Pair(t, "receiver", "127.0.0.1", "hooks.acme.internal"), clients.Pool(), tls.RequireAndVerifyClientCert, nil)
	special := outbox.NewUUID()
	b := setup(t, change, func(c *Config) {
		c.AllowInsecureTLS = true
		c.TLS.TLSSettings = clientFiles(t, clients, dir, "relay")
		c.TLS.CAFile = ca
		c.TLS.Profiles = []TLSProfile{
			{Tenant: "acme", TLSSettings: clientFiles(t, clients, dir, "acme")},
			{Tenant: "acme", Endpoint: special.String(), ServerName: "hooks.acme.internal"},
			{Tenant: "strange", TLSSettings: clientFiles(t, servers, dir, "strange")},
			{Tenant: "distrusts", TLSSettings: TLSSettings{CAFile: certtest.Write(t, dir, "clients.pem", clients.PEM()), CAOnly: true}},
		}
	})
	asSpecial := func(r *EndpointRow) { r.ID = special }
	unchecked := func(r *EndpointRow) { r.VerifySSL = false }
	for name, c := range map[string]struct {
		ep   *Endpoint
		want string
	}{
		"none of its own":            {b.of("", s.URL), "relay "},
		"of a tenant without":        {b.of("other", s.URL), "relay "},
		"the tenant's":               {b.of("acme", s.URL), "acme "},
		"unchecked, the tenant's":    {b.of("acme", s.URL, unchecked), "acme "},
		"the endpoint's":             {b.of("acme", s.URL, asSpecial), "relay hooks.acme.internal"},
		"that id of another tenant":  {b.of("other", s.URL, asSpecial), "relay "},
		"unchecked of no tenant":     {b.of("", s.URL, unchecked), "relay "},
		"of an authority not wanted": {b.of("strange", s.URL), ""},
		"with another authority":     {b.of("distrusts", s.URL), ""},
	} {
		res := b.attempt(c.ep)
		if c.want == "" {
			assert.Equal(t, ClassTLS, res.Class, "%s: %s", name, res.Err)
			assert.NotEqual(t, "the TLS handshake failed", res.Err, name)
			continue
		}
		require.True(t, res.OK(), "%s: %s", name, res.Err)
		assert.Equal(t, c.want, s.last(), name)
	}

	none := setup(t, change, func(c *Config) { c.TLS.CAFile = ca })
	for range 3 { // of the race between the alert and the request
		res := none.attempt(none.of("acme", s.URL))
		assert.Equal(t, ClassTLS, res.Class, res.Err)
		assert.Contains(t, []string{
			"the server refused the TLS handshake: tls: certificate required", "the server asked for a client certificate and ended the connection",
		}, res.Err)
	}
}

// TestClientCertificateAskedFor has a receiver that asks for a certificate, takes none for an answer, and ends the connection without the alert that says so.
func TestClientCertificateAskedFor(t *testing.T) {
	t.Parallel()
	byBoth(t, testClientCertificateAskedFor)
}

func testClientCertificateAskedFor(t *testing.T, change func(*Config)) {
	t.Helper()
	url := rawServer(t, func(c *rawConn, _ *bufio.Reader, _ int) {
		over := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{testCertificate()}, ClientAuth: tls.RequestClientCert})
		_, _ = over.Read(make([]byte, 1))
	})
	b := setup(t, change, unchecked)
	res := b.attempt(b.endpoint(strings.Replace(url, "http", "https", 1), uncheckedEndpoint))
	assert.Equal(t, ClassTLS, res.Class)
	assert.Equal(t, "the server asked for a client certificate and ended the connection", res.Err)
}

// TestRedirectTakesNoCertificateAlong: what is between the relay and a tenant's receiver is not for the host that it points to.
func TestRedirectTakesNoCertificateAlong(t *testing.T) {
	t.Parallel()
	byBoth(t, testRedirectTakesNoCertificateAlong)
}

func testRedirectTakesNoCertificateAlong(t *testing.T, change func(*Config)) {
	t.Helper()
	a, dir := certtest.New(t, "all"), t.TempDir()
	elsewhere := secure(t, a.Pair(t, "elsewhere", "127.0.0.1"), a.Pool(), tls.VerifyClientCertIfGiven, nil)
	var next string
	s := secure(t, a.Pair(t, "receiver", "127.0.0.1", "hooks.acme.internal"), a.Pool(), tls.RequireAndVerifyClientCert, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			w.Header().Set("Location", next)
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	})
	b := setup(t, change, func(c *Config) {
		c.TLS.CAFile = certtest.Write(t, dir, "ca.pem", a.PEM())
		c.TLS.Profiles = []TLSProfile{{Tenant: "acme", ServerName: "hooks.acme.internal", TLSSettings: clientFiles(t, a, dir, "acme")}}
	})
	follow := func(r *EndpointRow) { r.FollowRedirects = true }
	next = elsewhere.URL
	res := b.attempt(b.of("acme", s.URL, follow))
	require.True(t, res.OK(), res.Err)
	assert.Equal(t, "acme hooks.acme.internal", s.last())
	assert.Equal(t, "nobody ", elsewhere.last())
	next = "/further"
	res = b.attempt(b.of("acme", s.URL, follow))
	require.True(t, res.OK(), res.Err)
}

func TestMinimumVersion(t *testing.T) {
	t.Parallel()
	byBoth(t, testMinimumVersion)
}

func testMinimumVersion(t *testing.T, change func(*Config)) {
	t.Helper()
	a, dir := certtest.New(t, "all"), t.TempDir()
	old := httptest.NewUnstartedServer(http.NotFoundHandler())
	old.Config.ErrorLog = discardLog()
	old.TLS = &tls.Config{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{a.Pair(t, "old", "127.0.0.1")}}
	old.StartTLS()
	t.Cleanup(old.Close)
	b := setup(t, change, func(c *Config) {
		c.TLS.MinVersion, c.TLS.CAFile = "1.3", certtest.Write(t, dir, "ca.pem", a.PEM())
		c.TLS.Profiles = []TLSProfile{{Tenant: "patient", TLSSettings: TLSSettings{MinVersion: "1.2"}}}
	})
	res := b.attempt(b.of("", old.URL))
	assert.Equal(t, ClassTLS, res.Class)
	assert.Equal(t, "the server refused the TLS handshake: tls: protocol version not supported", res.Err)
	assert.Equal(t, Class4xx, b.attempt(b.of("patient", old.URL)).Class)
}

func TestAuthorities(t *testing.T) {
	t.Parallel()
	a, other, dir := certtest.New(t, "one"), certtest.New(t, "another"), t.TempDir()
	s := TLSSettings{CAFile: certtest.Write(t, dir, "ca.pem", append(a.PEM(), other.PEM()...))}
	got, err := s.roots()
	require.NoError(t, err)
	want, err := x509.SystemCertPool()
	require.NoError(t, err)
	require.False(t, got.Equal(want))
	require.True(t, want.AppendCertsFromPEM(a.PEM()) && want.AppendCertsFromPEM(other.PEM()))
	assert.True(t, got.Equal(want), "the system's and both")

	s.CAOnly = true
	got, err = s.roots()
	require.NoError(t, err)
	want = x509.NewCertPool()
	require.True(t, want.AppendCertsFromPEM(a.PEM()) && want.AppendCertsFromPEM(other.PEM()))
	assert.True(t, got.Equal(want), "both alone")
}

func TestFilesThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	a, dir := certtest.New(t, "one"), t.TempDir()
	write := func(name string, text []byte) string { return certtest.Write(t, dir, name, text) }
	cert, key := a.Issue(t, "relay")
	_, otherKey := a.Issue(t, "other")
	good, goodKey := write("cert.pem", cert), write("key.pem", key)
	const secret = "MHcCAQEEIPlantedPlantedPlanted"
	for want, s := range map[string]TLSSettings{
		`ca_file "` + dir + `/half.pem": holds no certificate in PEM form, or one that breaks off`: {CAFile: write("half.pem", append(a.PEM(), a.PEM()[:100]...))},
		`ca_file "` + dir + `/junk.pem": its certificate 1 cannot be read: x509`: {
			CAFile: write("junk.pem", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")),
		},
		`key_file "` + dir + `/other.pem": is not the key of the certificate in cert_file`: {CertFile: good, KeyFile: write("other.pem", otherKey)},
		`key_file "` + dir + `/locked.pem": is encrypted`: {
			CertFile: good, KeyFile: write("locked.pem", []byte("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")),
		},
		`key_file "` + dir + `/broken.pem": holds no private key in PEM form`: {CertFile: good, KeyFile: write("broken.pem", []byte(secret))},
		`key_file "` + good + `": holds no private key in PEM form`:           {CertFile: good, KeyFile: good},
		`cert_file "` + goodKey + `": holds no certificate in PEM form`:       {CertFile: goodKey, KeyFile: goodKey},
	} {
		cfg := testConfig()
		cfg.TLS.TLSSettings = s
		err := cfg.Validate()
		require.ErrorContains(t, err, "delivery.tls."+want)
		assert.NotContains(t, err.Error(), "Planted")
		_, err = NewClient(cfg, nil, slog.New(slog.DiscardHandler))
		require.ErrorContains(t, err, want)
	}
	both := write("both.pem", append(key, cert...))
	cfg := testConfig()
	cfg.TLS.CertFile, cfg.TLS.KeyFile = both, both
	require.NoError(t, cfg.Validate(), "one file, the key first")
}

// rotation is a folder as Kubernetes mounts a secret: names that lead through a link, which is swapped.
type rotation struct {
	t   testing.TB
	dir string
	n   int
}

func (r *rotation) swap(files map[string][]byte) {
	r.t.Helper()
	r.n++
	folder := filepath.Join(r.dir, "..data"+strings.Repeat("x", r.n))
	require.NoError(r.t, os.Mkdir(folder, 0o700))
	for name, text := range files {
		certtest.Write(r.t, folder, name, text)
	}
	require.NoError(r.t, os.Symlink(folder, filepath.Join(r.dir, "next")))
	require.NoError(r.t, os.Rename(filepath.Join(r.dir, "next"), filepath.Join(r.dir, "..data")))
}

// TestCertificatesChange has the receiver's and the client's authority replaced while attempts go on: none fails, and once the receiver trusts the new
// one alone, nothing is left of the old one.
func TestCertificatesChange(t *testing.T) {
	t.Parallel()
	byBoth(t, testCertificatesChange)
}

func testCertificatesChange(t *testing.T, change func(*Config)) {
	t.Helper()
	before, after := certtest.New(t, "authority"), certtest.New(t, "authority")
	files := &rotation{t: t, dir: t.TempDir()}
	issue := func(a *certtest.Authority, name string, trusted ...*certtest.Authority) map[string][]byte {
		cert, key := a.Issue(t, name)
		var ca []byte
		for _, t := range trusted {
			ca = append(ca, t.PEM()...)
		}
		return map[string][]byte{"ca.pem": ca, "tls.crt": cert, "tls.key": key}
	}
	files.swap(issue(before, "first", before, after))
	both := before.Pool()
	require.True(t, both.AppendCertsFromPEM(after.PEM()))
	one := secure(t, before.Pair(t, "one", "127.0.0.1"), both, tls.RequireAndVerifyClientCert, nil)
	two := secure(t, after.Pair(t, "two", "127.0.0.1"), both, tls.RequireAndVerifyClientCert, nil)

	var log bytes.Buffer
	cfg := testConfig()
	change(&cfg)
	cfg.Allow, cfg.reload = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, time.Hour // here, it is called
	path := func(name string) string { return filepath.Join(files.dir, "..data", name) }
	cfg.TLS.Profiles = []TLSProfile{{Tenant: "acme", TLSSettings: TLSSettings{CAFile: path("ca.pem"), CAOnly: true, CertFile: path("tls.crt"), KeyFile: path("tls.key")}}}
	c, err := newClient(cfg, nil, slog.New(slog.NewTextHandler(&log, nil)), net.DefaultResolver.LookupHost)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	b := &bundle{t: t, client: c, m: c.m}
	toOne, toTwo := b.of("acme", one.URL), b.of("acme", two.URL)
	try := func(ep *Endpoint, want Class) {
		t.Helper()
		res := b.attempt(ep)
		require.Equal(t, want, res.Class, res.Err)
	}
	try(toOne, ClassSuccess)
	try(toTwo, ClassSuccess)

	stop := make(chan struct{})
	var busy sync.WaitGroup
	for _, ep := range []*Endpoint{toOne, toTwo} {
		for range 4 {
			busy.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					res := b.attempt(ep)
					assert.True(t, res.OK(), res.Err)
				}
			})
		}
	}
	for range 5 {
		files.swap(issue(after, "second", before, after))
		c.reload(time.Now())
	}
	close(stop)
	busy.Wait()
	try(toOne, ClassSuccess)
	assert.Equal(t, "second ", one.last())
	for _, s := range []*secureServer{one, two} {
		s.mu.Lock()
		s.trust = after.Pool()
		s.mu.Unlock()
	}
	c.closeIdle()
	try(toOne, ClassSuccess)
	try(toTwo, ClassSuccess)
	assert.Equal(t, 5, strings.Count(log.String(), "files have changed and are in use"), log.String())

	files.swap(issue(after, "third", after))
	c.reload(time.Now())
	try(toOne, ClassTLS)
	try(toTwo, ClassSuccess)
	assert.Equal(t, "third ", two.last())

	// What cannot be used changes nothing, and is said once.
	log.Reset()
	broken := issue(after, "fourth", after)
	broken["tls.key"] = broken["tls.crt"]
	files.swap(broken)
	c.reload(time.Now())
	assert.Empty(t, log.String(), "the key may be about to come")
	for range 3 {
		c.reload(time.Now())
		try(toTwo, ClassSuccess)
	}
	assert.Equal(t, 1, strings.Count(log.String(), "\n"), log.String())
	assert.Contains(t, log.String(), "what was read before stays in use")
	assert.Contains(t, log.String(), "key_file "+path("tls.key"))
	require.NoError(t, os.Remove(filepath.Join(files.dir, "..data")))
	c.reload(time.Now())
	try(toTwo, ClassSuccess)
	assert.Equal(t, "third ", two.last())
	files.swap(issue(after, "fifth", after))
	c.reload(time.Now())
	try(toTwo, ClassSuccess)
	assert.Equal(t, "fifth ", two.last())
	assert.Contains(t, log.String(), "files have changed and are in use")

	c.reload(time.Now().Add(time.Hour))
	assert.Empty(t, c.retired)
}

// TestFilesAreWatched waits for what a running relay does by itself.
func TestFilesAreWatched(t *testing.T) {
	t.Parallel()
	a, dir := certtest.New(t, "one"), t.TempDir()
	b := setup(t, func(c *Config) { c.TLS.TLSSettings, c.reload = clientFiles(t, a, dir, "relay"), 10*time.Millisecond })
	first := b.client.common.now.Load()
	clientFiles(t, a, dir, "relay")
	require.Eventually(t, func() bool { return b.client.common.now.Load() != first }, 10*time.Second, time.Millisecond)
}

// TestConnectionsOfReplacedFiles: a connection that was made with files of before is closed once nothing uses it, and not before.
func TestConnectionsOfReplacedFiles(t *testing.T) {
	t.Parallel()
	byBoth(t, testConnectionsOfReplacedFiles)
}

func testConnectionsOfReplacedFiles(t *testing.T, change func(*Config)) {
	t.Helper()
	a, dir := certtest.New(t, "one"), t.TempDir()
	arrived, answer := make(chan struct{}), make(chan struct{})
	s := secure(t, a.Pair(t, "receiver", "127.0.0.1"), a.Pool(), tls.RequireAndVerifyClientCert, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(arrived)
			<-answer
		}
	})
	b := setup(t, change, func(c *Config) {
		c.TLS.TLSSettings, c.reload = clientFiles(t, a, dir, "relay"), time.Hour // here, it is called
		c.TLS.CAFile = certtest.Write(t, dir, "ca.pem", a.PEM())
	})
	open := func() int { return b.count(b.m.connOpen) }
	result := make(chan Result, 1)
	go func() { result <- b.attempt(b.endpoint(s.URL + "/slow")) }()
	<-arrived
	clientFiles(t, a, dir, "relay")
	b.client.reload(time.Now())
	require.Equal(t, ClassSuccess, b.attempt(b.endpoint(s.URL)).Class)
	require.Equal(t, 2, open())
	close(answer)
	require.Equal(t, ClassSuccess, (<-result).Class)
	require.Eventually(t, func() bool {
		b.client.reload(time.Now())
		return open() == 1
	}, 5*time.Second, time.Millisecond, "the connection is kept")
}
