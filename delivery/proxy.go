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
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	proxyKey     = "network.proxy"
	proxyFileKey = "network.proxy_file"
	proxyRemedy  = "must be the URL of an HTTP proxy, http:// or https://, and nothing behind its port: http://user:password@proxy.internal:3128, " +
		"special characters percent-encoded"

	maxProxyHead = 64 << 10 // of the answer to CONNECT
)

// proxy is what all connections to receivers go through. It is asked for addresses and never for names: what a name resolves to is looked up and checked here,
// and nothing that a tenant writes has the proxy look up anything. Its own address needs no permission but that of the configuration.
//
//	name ──► addresses ──► guard ──► CONNECT address:port ──► TLS and HTTP, with the name
type proxy struct {
	url  atomic.Pointer[url.URL]
	file watched
	net  net.Dialer            // without the guard
	tls  func() *x509.CertPool // what is trusted when the proxy itself is spoken to over TLS
	sick atomic.Bool           // the last connection failed, and it was said
}

// proxyError is a fault of the proxy, not of a receiver. It holds nothing of the proxy's URL.
type proxyError struct {
	words string
	err   error
}

func (e *proxyError) Error() string { return e.words }
func (e *proxyError) Unwrap() error { return e.err }

// parseProxy returns nil unless it is the URL of a proxy.
func parseProxy(text string) *url.URL {
	u, err := url.Parse(strings.TrimSpace(text))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/")+u.RawQuery+u.Fragment+u.Opaque != "" {
		return nil
	}
	return u
}

func (c *Config) validateProxy(f *faults) {
	switch {
	case c.Proxy != "" && c.ProxyFile != "":
		f.add(proxyFileKey, c.ProxyFile, "is given besides network.proxy: drop one of the two")
	case c.Proxy != "" && parseProxy(c.Proxy) == nil:
		f.add(proxyKey, "(hidden)", proxyRemedy)
	case c.ProxyFile != "":
		if _, err := readProxy(c.ProxyFile); err != nil {
			f.add(proxyFileKey, c.ProxyFile, err.Error())
		}
	}
}

func readProxy(file string) (*url.URL, error) {
	text, err := os.ReadFile(file) //nolint:gosec // the operator names it
	if err != nil {
		return nil, fmt.Errorf("cannot be read: %w", err)
	}
	u := parseProxy(string(text))
	if u == nil {
		return nil, errors.New("its content " + proxyRemedy)
	}
	return u, nil
}

// newProxy returns nil if there is none.
func newProxy(cfg *Config, roots func() *x509.CertPool) (*proxy, error) {
	p := &proxy{tls: roots}
	switch {
	case cfg.Proxy != "":
		p.url.Store(parseProxy(cfg.Proxy))
	case cfg.ProxyFile != "":
		p.file.names = []string{cfg.ProxyFile}
		p.file.look()
		if err := p.read(); err != nil {
			return nil, err
		}
	default:
		return nil, nil //nolint:nilnil // there is none
	}
	return p, nil
}

// secure tells whether there is one that is spoken to over TLS.
func (p *proxy) secure() bool { return p != nil && p.url.Load().Scheme == "https" }

// read reads the file that has the URL.
func (p *proxy) read() error {
	u, err := readProxy(p.file.names[0])
	if err == nil {
		p.url.Store(u)
	}
	return err
}

const wordsNoProxy = "the proxy cannot be reached: see network.proxy"

// connect opens a connection through the proxy to an address that the guard has let pass. The connection is the proxy's own if that is spoken to
// without TLS.
func (p *proxy) connect(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	u := p.url.Load()
	conn, err := p.net.DialContext(ctx, "tcp", hostPort(u))
	if err != nil {
		return nil, &proxyError{wordsNoProxy, err}
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	through := conn
	if u.Scheme == "https" {
		secure := tls.Client(conn, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Hostname(), RootCAs: p.tls(), NextProtos: []string{"http/1.1"}})
		if err = secure.HandshakeContext(ctx); err != nil {
			err = &proxyError{"no TLS with the proxy: " + describeTLS(err), err}
		}
		through = secure
	}
	if err == nil {
		exchangeOf(ctx).step(waitProxy, waitOpen)
		through, err = ask(through, u, addr.String())
	}
	if !stop() && ctx.Err() != nil && !errors.As(err, new(*proxyError)) {
		err = ctx.Err() // a proxy that takes its time waits for the receiver
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return through, nil
}

// ask has the proxy connect, and returns what leads to the receiver. https://www.rfc-editor.org/rfc/rfc9110#section-9.3.6
func ask(conn net.Conn, u *url.URL, addr string) (net.Conn, error) {
	request := appendHeader([]byte("CONNECT "+addr+" HTTP/1.1\r\n"), "Host", addr)
	if u.User != nil {
		request = appendHeader(request, "Proxy-Authorization", basicAuth(u.User))
	}
	if _, err := conn.Write(append(request, "\r\n"...)); err != nil {
		return nil, fmt.Errorf("ask the proxy: %w", err)
	}
	limited := &io.LimitedReader{R: conn, N: maxProxyHead}
	in := bufio.NewReader(limited)
	// The answer has no body where it is a success, and the connection is closed where it is none.
	resp, err := http.ReadResponse(in, &http.Request{Method: http.MethodConnect}) //nolint:bodyclose // see above
	var network net.Error
	switch {
	case errors.As(err, &network):
		return nil, fmt.Errorf("wait for the proxy: %w", err)
	case limited.N > 0 && (errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)):
		return nil, &refusedError{"the proxy ended the connection instead of an answer"}
	case err != nil:
		return nil, &proxyError{"what is at network.proxy does not answer as an HTTP proxy", err}
	case resp.StatusCode == http.StatusProxyAuthRequired:
		return nil, &proxyError{"the proxy refuses the user and password in network.proxy", nil}
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		return nil, &refusedError{"the proxy has not connected: it answered " + strconv.Itoa(resp.StatusCode)}
	case in.Buffered() > 0 && (resp.ContentLength > 0 || len(resp.TransferEncoding) > 0): // a web server's page
		return nil, &proxyError{"what is at network.proxy does not answer as an HTTP proxy", nil}
	case in.Buffered() > 0:
		first, _ := in.Peek(in.Buffered())
		return &spokenConn{conn, first}, nil
	}
	return conn, nil
}

// spokenConn is a connection to a receiver that spoke before it was asked. What comes of that is the same as without a proxy.
type spokenConn struct {
	net.Conn
	first []byte // not read yet
}

// Read implements net.Conn.
func (c *spokenConn) Read(p []byte) (int, error) {
	if len(c.first) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.first)
	c.first = c.first[n:]
	return n, nil
}

// refusedError says that a proxy has not connected to a receiver, which may be the receiver's fault.
type refusedError struct{ words string }

func (e *refusedError) Error() string { return e.words }
