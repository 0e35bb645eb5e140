package delivery

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-retryablehttp"

	"github.com/neo-commons/outbox-relay/outbox"
)

// profileKey is whom a profile is for; a zero endpoint: all of the tenant that have none of their own.
type profileKey struct {
	tenant   string
	endpoint outbox.UUID
}

// profile is how those endpoints are spoken to that share settings of TLS.
type profile struct {
	key        string // in the configuration
	settings   TLSSettings
	serverName string // empty: the host of the URL
	now        atomic.Pointer[generation]
	files      watched
}

// generation is what one reading of a profile's files came to. Its transports and their sessions are its own: nothing that was agreed on with a certificate
// that has been replaced is used after it.
type generation struct {
	base       *tls.Config    // what its transports are made of
	roots      *x509.CertPool // nil: the system's
	direct     roads
	redirected roads // to another host and port than the endpoint's, where nobody counts them: they take none of the connections of direct requests
	mu         sync.Mutex
	transports []*http.Transport // those that an endpoint has asked for
	small      []*http1
}

// roads lead to receivers, with and without a check of their certificate.
type roads struct {
	verified, insecure road
}

// road is made when it is asked for.
type road struct {
	http  func() *retryablehttp.Client
	small func() *http1 // for requests with small bodies
}

// profileOf returns that of the endpoint, or the one for all others.
func (c *Client) profileOf(ep *Endpoint) *profile {
	if len(c.profiles) > 0 {
		if p := c.profiles[profileKey{ep.tenant, ep.ID}]; p != nil {
			return p
		}
		if p := c.profiles[profileKey{tenant: ep.tenant}]; p != nil {
			return p
		}
	}
	return c.common
}

func (p *profile) road(verify, redirected bool) *road {
	g := p.now.Load()
	r := &g.direct
	if redirected {
		r = &g.redirected
	}
	if verify {
		return &r.verified
	}
	return &r.insecure
}

// readProfiles makes the profiles of the configuration.
func (c *Client) readProfiles() error {
	var err error
	if c.common, err = c.newProfile(tlsKey, "", c.config.TLS.TLSSettings); err != nil {
		return err
	}
	c.profiles = make(map[profileKey]*profile, len(c.config.TLS.Profiles))
	for i, p := range c.config.TLS.Profiles {
		id, err := p.endpoint()
		if err != nil {
			return err
		}
		made, err := c.newProfile(profileKeyword(i), p.ServerName, p.over(c.config.TLS.TLSSettings))
		if err != nil {
			return err
		}
		c.profiles[profileKey{p.Tenant, id}] = made
	}
	return nil
}

func (c *Client) newProfile(key, serverName string, s TLSSettings) (*profile, error) {
	p := &profile{key: key, serverName: serverName, settings: s, files: watched{names: s.files()}}
	p.files.look()
	g, err := c.newGeneration(p)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	p.now.Store(g)
	return p, nil
}

func (c *Client) newGeneration(p *profile) (*generation, error) {
	version, _ := p.settings.MinVersion.number()
	roots, err := p.settings.roots()
	if err != nil {
		return nil, err
	}
	pair, err := p.settings.pair()
	if err != nil {
		return nil, err
	}
	base := &tls.Config{MinVersion: version, RootCAs: roots, ServerName: p.serverName}
	if pair != nil {
		// Whatever authorities the receiver names: it may name none that it would accept, or leave out those in between.
		base.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair, nil }
	}
	return c.generation(base, roots), nil
}

// again returns a generation with the same settings, and connections of its own.
func (c *Client) again(g *generation) *generation { return c.generation(g.base, g.roots) }

func (c *Client) generation(base *tls.Config, roots *x509.CertPool) *generation {
	g := &generation{base: base, roots: roots}
	made := func(insecure bool) road {
		config := func() *tls.Config {
			config := base.Clone()
			config.InsecureSkipVerify = insecure
			return config
		}
		return road{
			http: sync.OnceValue(func() *retryablehttp.Client {
				client, t := c.newHTTP(config())
				g.mu.Lock()
				defer g.mu.Unlock()
				g.transports = append(g.transports, t)
				return client
			}),
			small: sync.OnceValue(func() *http1 {
				t := newHTTP1(&c.config, c.dialer, config())
				g.mu.Lock()
				defer g.mu.Unlock()
				g.small = append(g.small, t)
				return t
			}),
		}
	}
	g.direct, g.redirected = roads{made(false), made(true)}, roads{made(false), made(true)}
	return g
}

func (g *generation) closeIdle() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, t := range g.transports {
		t.CloseIdleConnections()
	}
	for _, t := range g.small {
		t.CloseIdleConnections()
	}
}

func (g *generation) sweep(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, t := range g.small {
		t.sweep(now)
	}
}

// reloadEvery is the time between two looks at the files.
const reloadEvery = 5 * time.Second

// reload takes on what has changed, and ends what is left of generations before.
func (c *Client) reload(now time.Time) {
	c.renewing.Lock()
	defer c.renewing.Unlock()
	for _, p := range c.allProfiles() {
		p.files.renew(c.log, p.key, func() error {
			g, err := c.newGeneration(p)
			if err == nil {
				c.retire(p.now.Swap(g), now)
			}
			return err
		})
	}
	if p := c.dialer.proxy; p != nil {
		p.file.renew(c.log, proxyFileKey, p.read)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := c.retired[:0]
	for _, r := range c.retired {
		r.closeIdle()
		if now.Before(r.until) {
			kept = append(kept, r)
		}
	}
	clear(c.retired[len(kept):])
	c.retired = kept
}

// retired is a generation that attempts may still be using.
type retired struct {
	*generation
	until time.Time
}

func (c *Client) retire(g *generation, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.live.Load() // a connection may still be opened when the last attempt has ended
	c.retired = append(c.retired, retired{g, now.Add(MaxTimeout + l.connectTimeout + l.tlsHandshakeTimeout + 2*reloadEvery)})
}

func (c *Client) allProfiles() []*profile {
	list := []*profile{c.common}
	for _, p := range c.profiles {
		list = append(list, p)
	}
	return list
}

// watched is a set of files that are read together. One goroutine may use it.
type watched struct {
	names  []string
	seen   []fs.FileInfo // when they were read; nil: it was not there
	failed int           // looks in a row that found files which could not be used
}

// look notes what the files are now, and tells whether that is something else than before. Links are followed: where Kubernetes mounts secrets, it is a
// link that changes.
func (w *watched) look() (changed bool) {
	seen := make([]fs.FileInfo, len(w.names))
	for i, name := range w.names {
		seen[i], _ = os.Stat(name)
		changed = changed || i >= len(w.seen) || !sameFile(w.seen[i], seen[i])
	}
	w.seen = seen
	return changed
}

func sameFile(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// renew reads the files once more if they have changed, or could not be used. That is said at the second look, and once: a key is often written a moment after
// its certificate.
func (w *watched) renew(log *slog.Logger, key string, read func() error) {
	if !w.look() && w.failed == 0 {
		return
	}
	if err := read(); err != nil {
		if w.failed++; w.failed == 2 {
			log.Warn("files cannot be used: what was read before stays in use", "key", key, "error", err)
		}
		return
	}
	w.failed = 0
	log.Info("files have changed and are in use", "key", key)
}
