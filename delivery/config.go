package delivery

import (
	"errors"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Config configures a Client. The zero value is not valid.
type Config struct {
	// ConnectTimeout bounds name resolution and TCP connection together, TLSHandshakeTimeout the handshake. An attempt ends at the
	// endpoint's timeout even if these are longer; a connection with TLS is then still made, for the next attempt to use.
	ConnectTimeout, TLSHandshakeTimeout time.Duration
	// MaxConns bounds the open connections, idle ones included. When all are taken, a new one waits until another closes.
	MaxConns int
	// MaxConnsPerHost bounds the open connections to one host and port, idle ones included. An attempt waits within its timeout for a connection. It
	// counts for each transport on its own: http1 for http://, and http1 and net/http with and without a check of certificates, net/http also for
	// direct and for redirected requests.
	MaxConnsPerHost int
	// IdleTimeout closes a connection that has not been used for so long. It should be below what receivers use (often 60 s or
	// more): who closes first avoids a request on a dead connection.
	IdleTimeout time.Duration
	// DNSCacheTime is how long the addresses of a name are used before it is looked up again. Zero looks a name up for every connection.
	DNSCacheTime time.Duration
	// KeepResponseBytes is how much of a failing answer's body Result keeps, at most 16 KiB. Zero keeps nothing.
	KeepResponseBytes int
	// Version is sent as User-Agent outbox-relay/<version>.
	Version string
	// Source is the CloudEvents source attribute, a URI reference. It is for the caller of Encode; the Client only checks it.
	Source string
	// Allow lists the addresses that may be reached besides public ones, Deny those that may not be, and wins over Allow.
	Allow, Deny []netip.Prefix
	// AllowInsecureTLS lets an endpoint with verify_ssl=false connect without a check of the certificate. If false its attempts end as
	// ClassDenied.
	AllowInsecureTLS bool
	// TLS is what receivers are spoken to with over TLS.
	TLS TLS
	// AllowHosts, unless empty, lists the hosts that a URL may name, DenyHosts those it must not, and wins: names, or *.name for all below one. What they resolve
	// to has to pass Allow and Deny all the same.
	AllowHosts, DenyHosts []string
	// Ports lists the ports that a URL may have. Empty: any.
	Ports []int
	// HTTPSOnly denies http://.
	HTTPSOnly bool
	// Proxy is the URL of the HTTP proxy that all connections to receivers go through, ProxyFile a file that holds it. Empty: none. Environment variables do
	// not count.
	Proxy, ProxyFile string
	// ReceiverDisable and ReceiverAbort let receivers give the directives of those names; else the header is ignored.
	ReceiverDisable, ReceiverAbort bool

	netHTTP bool          // tests and benchmarks: no http1
	reload  time.Duration // tests: the time between two looks at files; zero: reloadEvery
}

// maxResponseBytes is how much of an answer's body is read at most.
const maxResponseBytes = 16 << 10

// Validate reports every fault at once, as joined *FieldErrors that name the keys of the configuration file.
func (c *Config) Validate() error {
	var f faults
	f.check(c.ConnectTimeout > 0, "delivery.connect_timeout", c.ConnectTimeout, "use a time above 0, such as 5s")
	f.check(c.TLSHandshakeTimeout > 0, "delivery.tls_handshake_timeout", c.TLSHandshakeTimeout, "use a time above 0, such as 10s")
	f.check(c.MaxConns > 0, "delivery.max_connections", c.MaxConns, "use 1 or more")
	under := func(n, limit int) bool { return n > 0 && (n <= limit || limit <= 0) } // nothing more to say while the limit is itself at fault
	f.check(under(c.MaxConnsPerHost, c.MaxConns),
		"delivery.max_connections_per_host", c.MaxConnsPerHost, "use 1 up to max_connections")
	f.check(c.IdleTimeout > 0, "delivery.keep_alive", c.IdleTimeout, "use a time above 0, such as 55s")
	f.check(c.DNSCacheTime >= 0, "delivery.dns_cache", c.DNSCacheTime, "use a time such as 30s, or 0 for no cache")
	f.check(c.KeepResponseBytes >= 0 && c.KeepResponseBytes <= maxResponseBytes,
		"delivery.keep_response", c.KeepResponseBytes, "use 0B up to 16KiB")
	f.check(c.Version != "" && validHeaderName(c.Version), "version", c.Version, "use letters, digits, dots and hyphens")
	_, err := url.Parse(c.Source)
	f.check(err == nil && c.Source != "" && !strings.ContainsFunc(c.Source, notInURI),
		"delivery.source", strconv.Quote(c.Source), "use a URI or a path, such as outbox-relay, spaces and letters beyond ASCII percent-encoded")
	for _, p := range c.Allow {
		f.check(p.IsValid(), "network.allow", p, "use CIDR prefixes such as 10.0.0.0/8")
	}
	for _, p := range c.Deny {
		f.check(p.IsValid(), "network.deny", p, "use CIDR prefixes such as 10.0.0.0/8")
	}
	c.TLS.validate(&f)
	c.validateHosts(&f)
	c.validateProxy(&f)
	return errors.Join(f...)
}

// notInURI tells characters that a URI must not hold as they are (RFC 3986, appendix A). The CloudEvents SDKs refuse an event for such a source.
func notInURI(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune("\"<>\\^`{|}", r) }
