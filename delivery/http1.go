package delivery

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// http1MaxBody is the largest request body that http1 sends. It fits into the socket buffers of both sides, so that writing it does not wait
// for a receiver that answers before it has read: a larger one needs net/http, which reads meanwhile.
const http1MaxBody = 32 << 10

// http1 sends requests with small bodies to http:// URLs. The caller's goroutine writes a request that is one piece of memory and reads the answer
// itself, with the standard library's parser. net/http makes a request out of a dozen, hands it to two goroutines of the connection and back: half
// of what an attempt to a fast receiver costs (BenchmarkAttempt). https:// stays with net/http, for HTTP/2.
//
// A connection is used by one request at a time: idle ──conn──► in use ──body read to its end──► idle.
type http1 struct {
	dial        func(ctx context.Context, network, addr string) (net.Conn, error)
	crowded     func() bool // somebody waits for the place of a connection
	perHost     int
	idlePerHost int
	idleTimeout time.Duration

	mu    sync.Mutex
	hosts map[string]*http1Host
	age   int // counts renew; a connection of another age is not kept
}

// http1Host is what there is to one host and port.
type http1Host struct {
	idle  []*http1Conn  // the one used last at the end; under the transport's lock, as users is
	users int           // requests that are in it, or wait to be
	used  chan struct{} // holds one element per request: with no more requests than connections allowed, there are no more connections
}

// http1Conn is one connection.
type http1Conn struct {
	wire

	in    *bufio.Reader // reads through head, below
	head  int64         // bytes that the head of an answer may still have; negative: any number
	err   error         // of the last read: the parser calls a head that breaks off malformed
	since time.Time
	age   int
	stale bool // it was of another age when it was taken

	watched <-chan struct{} // ends the context that is watched
	unwatch func() bool     // false: the end of ctx may still end what comes next
}

var errHeadTooLarge = errors.New("the head of the answer is too large")

// Read bounds the head of an answer, which the parser does not.
func (c *http1Conn) Read(p []byte) (int, error) {
	if c.head == 0 {
		return 0, errHeadTooLarge
	}
	if c.head > 0 && int64(len(p)) > c.head {
		p = p[:c.head]
	}
	var n int
	n, c.err = c.wire.Read(p)
	if c.head > 0 {
		c.head -= int64(n)
	}
	return n, c.err
}

func newHTTP1(cfg *Config, d *dialer) *http1 {
	return &http1{
		dial: d.dial, crowded: d.crowded, perHost: cfg.MaxConnsPerHost, idlePerHost: cfg.MaxIdlePerHost, idleTimeout: cfg.IdleTimeout,
		hosts: make(map[string]*http1Host),
	}
}

// send writes a request to addr and reads the head of its answer; like is its method. It does not send again what met a dead connection. An answer
// that is nothing but a success has only its status; the body of any other has to be closed.
func (t *http1) send(ctx context.Context, addr string, deadline time.Time, request []byte, like *http.Request, x *exchange) (status int, resp *http.Response, err error) {
	h, err := t.enter(ctx, addr, deadline)
	if err != nil {
		return 0, nil, err
	}
	c, reused, err := t.conn(ctx, h, addr, deadline, x)
	if err != nil {
		t.leave(h, nil)
		return 0, nil, err
	}
	x.connected(reused)
	c.watch(ctx)
	if err := ctx.Err(); err != nil { // before the deadline was set, perhaps
		t.drop(h, c)
		return 0, nil, err
	}
	status, resp, err = c.exchange(request, like, x)
	switch {
	case err != nil:
		t.drop(h, c)
	case resp == nil:
		t.giveBack(ctx, h, c)
	default:
		resp.Body = &http1Body{ReadCloser: resp.Body, done: func(reusable bool) {
			if reusable && !resp.Close && resp.StatusCode >= 200 {
				t.giveBack(ctx, h, c)
				return
			}
			t.drop(h, c)
		}, atEnd: resp.Body == http.NoBody}
	}
	return status, resp, err
}

// giveBack keeps a connection whose answer has been read to its end, unless there is more in it, or ctx may have cut it short.
func (t *http1) giveBack(ctx context.Context, h *http1Host, c *http1Conn) {
	if c.in.Buffered() > 0 || ctx.Err() != nil {
		t.drop(h, c)
		return
	}
	t.leave(h, c)
}

func (t *http1) drop(h *http1Host, c *http1Conn) {
	c.close()
	t.leave(h, nil)
}

// watch has the end of ctx end what the connection is used for. Most attempts have the same one: it is watched as long as the connection is there.
func (c *http1Conn) watch(ctx context.Context) {
	if c.watched == ctx.Done() {
		return
	}
	c.unwatch()
	c.watched = ctx.Done()
	c.unwatch = context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
}

func (c *http1Conn) close() {
	c.unwatch()
	_ = c.Close()
}

// exchange writes the request and reads the head of its answer. The 1xx answers before it are passed over; together with it they may be as large as
// a head, however many they are. So does net/http since Go 1.26.
func (c *http1Conn) exchange(request []byte, like *http.Request, x *exchange) (status int, resp *http.Response, err error) {
	if _, err := c.Write(request); err != nil {
		return 0, nil, err
	}
	c.head = maxResponseHeaderBytes
	defer func() { c.head = -1 }()
	if _, err := c.in.Peek(1); err != nil {
		return 0, nil, err
	}
	x.gotFirstByte()
	if status := c.success(); status > 0 {
		return status, nil, nil
	}
	for {
		resp, err := http.ReadResponse(c.in, like)
		if err != nil && c.err != nil && !errors.Is(c.err, io.EOF) {
			return 0, nil, c.err
		}
		if err != nil {
			return 0, nil, err
		}
		if resp.StatusCode < 100 || resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			return 0, resp, nil
		}
	}
}

// success reads an answer that has arrived whole and is a plain success, and returns its status. It makes nothing of it, which is what most answers
// need. Zero: it has read nothing, the answer is one for the standard library's parser; so is everything that two parsers could take for two things.
func (c *http1Conn) success() (status int) {
	all, _ := c.in.Peek(c.in.Buffered())
	end := bytes.Index(all, []byte("\r\n\r\n"))
	if end < len("HTTP/1.1 200") {
		return 0
	}
	line, rest, _ := bytes.Cut(all[:end+2], []byte("\r\n"))
	if len(line) < len("HTTP/1.1 200") || string(line[:10]) != "HTTP/1.1 2" || !isDigit(line[10]) || !isDigit(line[11]) || len(line) > 12 && line[12] != ' ' ||
		!validHeaderValue(string(line)) {
		return 0
	}
	status = 200 + int(line[10]-'0')*10 + int(line[11]-'0')
	length := -1
	for len(rest) > 0 {
		line, rest, _ = bytes.Cut(rest, []byte("\r\n"))
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok || !validHeaderName(string(name)) || !validHeaderValue(string(value)) {
			return 0
		}
		value = bytes.Trim(value, " \t")
		switch len(name) {
		case len("Content-Length"):
			if !bytes.EqualFold(name, []byte("Content-Length")) {
				continue
			}
			n, ok := decimal(value)
			if !ok || length >= 0 {
				return 0
			}
			length = n
		case len("Connection"):
			if bytes.EqualFold(name, []byte("Connection")) && !bytes.EqualFold(value, []byte("keep-alive")) {
				return 0
			}
		case len("Transfer-Encoding"), len(headerDelivery), len("Upgrade"): // and Trailer
			if isSpecial(name) {
				return 0
			}
		}
	}
	bodiless := status == http.StatusNoContent
	if bodiless != (length < 0) || end+4+max(length, 0) > len(all) {
		return 0
	}
	_, _ = c.in.Discard(end + 4 + max(length, 0)) // it is there
	return status
}

// isSpecial tells whether a header changes what an answer means.
func isSpecial(name []byte) bool {
	for _, special := range [...]string{"Transfer-Encoding", headerDelivery, "Upgrade", "Trailer"} {
		if strings.EqualFold(string(name), special) {
			return true
		}
	}
	return false
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// decimal reads a number of up to nine digits.
func decimal(text []byte) (n int, ok bool) {
	if len(text) == 0 || len(text) > 9 {
		return 0, false
	}
	for _, c := range text {
		if !isDigit(c) {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}

// http1Body gives the connection back once.
type http1Body struct {
	io.ReadCloser

	atEnd bool
	done  func(reusable bool)
}

// Read implements io.Reader.
func (b *http1Body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.atEnd = b.atEnd || errors.Is(err, io.EOF)
	return n, err
}

// Close ends the use of the connection. It does not read what is left of the body: that may never end.
func (b *http1Body) Close() error {
	if b.done != nil {
		b.done(b.atEnd)
		b.done = nil
	}
	return nil
}

// enter waits for a place among the requests to addr.
func (t *http1) enter(ctx context.Context, addr string, deadline time.Time) (*http1Host, error) {
	t.mu.Lock()
	h := t.hosts[addr]
	if h == nil {
		h = &http1Host{used: make(chan struct{}, t.perHost)}
		t.hosts[addr] = h
	}
	h.users++
	t.mu.Unlock()
	select {
	case h.used <- struct{}{}:
		return h, nil
	default:
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	select {
	case h.used <- struct{}{}:
		return h, nil
	case <-ctx.Done():
		t.mu.Lock()
		h.users--
		t.mu.Unlock()
		return nil, ctx.Err()
	}
}

// leave gives the place back, and the connection if it can be used again and nobody waits for its place.
func (t *http1) leave(h *http1Host, c *http1Conn) {
	t.mu.Lock()
	keep := c != nil && c.age == t.age && len(h.idle) < t.idlePerHost && !t.crowded()
	if keep {
		c.since = time.Now()
		h.idle = append(h.idle, c)
	}
	h.users--
	t.mu.Unlock()
	<-h.used
	if c != nil && !keep {
		c.close()
	}
}

// conn returns the idle connection that was used last, or a new one, with the deadline set. Each is looked at first, however short it was idle: a byte
// that nobody asked for would be taken for the answer of the next request, and a receiver that restarts closes all at once, more than an attempt
// sends again for.
func (t *http1) conn(ctx context.Context, h *http1Host, addr string, deadline time.Time, x *exchange) (c *http1Conn, reused bool, err error) {
	for c := t.take(h); c != nil; c = t.take(h) {
		foreign := c.watched != ctx.Done()
		if !c.stale && (!foreign || c.unwatch()) && time.Since(c.since) < t.idleTimeout && c.SetDeadline(deadline) == nil && c.alive() {
			return c, true, nil
		}
		c.close()
	}
	ctx, cancel := context.WithDeadline(x.context(ctx), deadline)
	defer cancel()
	age := t.now() // before the address is checked
	conn, err := t.dial(ctx, "tcp", addr)
	if err != nil {
		return nil, false, err
	}
	c = &http1Conn{head: -1, age: age, unwatch: func() bool { return true }}
	c.prepare(conn)
	c.in = bufio.NewReader(c)
	_ = c.SetDeadline(deadline) // fails only for a connection that is closed, as the request will
	return c, false, nil
}

func (t *http1) now() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.age
}

// renew has the connections that there are serve no more requests: those in use are closed once their answers are there, the others by CloseIdleConnections.
func (t *http1) renew() {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.age++
}

func (t *http1) take(h *http1Host) *http1Conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(h.idle)
	if n == 0 {
		return nil
	}
	c := h.idle[n-1]
	h.idle[n-1] = nil
	h.idle = h.idle[:n-1]
	c.stale = c.age != t.age
	return c
}

// hostPort is where to connect for a URL.
func hostPort(u *url.URL) string { return net.JoinHostPort(u.Hostname(), portOf(u)) }

func portOf(u *url.URL) string {
	if port := u.Port(); port != "" {
		return port
	}
	if u.Scheme == "https" {
		return "443"
	}
	return "80"
}

// CloseIdleConnections closes what is not in use.
func (t *http1) CloseIdleConnections() { t.closeIdle(func(*http1Conn) bool { return true }) }

// sweep closes connections that have been idle for too long, until ctx is done.
func (t *http1) sweep(ctx context.Context) {
	tick := time.NewTicker(max(t.idleTimeout/4, time.Second))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			t.closeIdle(func(c *http1Conn) bool { return now.Sub(c.since) > t.idleTimeout })
		}
	}
}

func (t *http1) closeIdle(which func(*http1Conn) bool) {
	if t == nil {
		return
	}
	var closing []*http1Conn
	t.mu.Lock()
	for addr, h := range t.hosts {
		kept := h.idle[:0]
		for _, c := range h.idle {
			if which(c) {
				closing = append(closing, c)
			} else {
				kept = append(kept, c)
			}
		}
		clear(h.idle[len(kept):])
		h.idle = kept
		if len(kept) == 0 && h.users == 0 {
			delete(t.hosts, addr)
		}
	}
	t.mu.Unlock()
	for _, c := range closing {
		c.close()
	}
}
