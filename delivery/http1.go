package delivery

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"
)

// http1MaxBody is the largest request body that http1 sends. It fits into the socket buffers of both sides, so that writing it does not wait
// for a receiver that answers before it has read: a larger one needs net/http, which reads meanwhile.
const http1MaxBody = 32 << 10

// http1 sends requests with small bodies. The caller's goroutine writes a request that is one piece of memory and reads the answer itself, with the standard
// library's parser. net/http makes a request out of a dozen, hands it to two goroutines of the connection and back: half of what an attempt to a fast
// receiver costs, with TLS or without, and HTTP/2 costs no less (BenchmarkAttempt, BenchmarkAttemptTLS). Who does not agree to HTTP/1.1 is left to net/http.
//
// A connection is used by one request at a time: idle ──conn──► in use ──body read to its end──► idle.
type http1 struct {
	dial        func(ctx context.Context, network, addr string) (net.Conn, error)
	tls         *tls.Config // nil: for http://
	shake       func(ctx context.Context, conn net.Conn, addr string, config *tls.Config) (*tls.Conn, error)
	start       func(func()) // in a goroutine that the Client waits for
	crowded     func() bool  // somebody waits for the place of a connection
	perHost     int
	idleTimeout time.Duration

	mu    sync.Mutex
	hosts map[string]*http1Host
	age   int // counts renew; a connection of another age is not kept
}

// http1Host is what there is to one host and port.
type http1Host struct {
	idle  []*http1Conn        // the one used last at the end; under the transport's lock, as all but used is
	wants []chan<- *http1Conn // of requests that open a connection, and take one that is given back before that is there; in the order of their coming
	users int                 // requests that are in it, or wait to be
	other time.Time           // until then it is left to net/http
	used  chan struct{}       // holds one element per request: with no more requests than connections allowed, there are no more connections
}

// newHTTP1 is for https:// where there is a config, which it takes over.
func newHTTP1(cfg *Config, d *dialer, config *tls.Config) *http1 {
	t := &http1{
		dial: d.dial, tls: config, shake: d.shake, start: d.start, crowded: d.crowded, perHost: cfg.MaxConnsPerHost, idleTimeout: cfg.IdleTimeout,
		hosts: make(map[string]*http1Host),
	}
	if config != nil {
		config.NextProtos = []string{"http/1.1"}
		config.ClientSessionCache = tls.NewLRUClientSessionCache(maxSessions)
	}
	return t
}

// errNotHTTP1: the receiver has not agreed to HTTP/1.1 (ALPN, RFC 7301). One that knows nothing but HTTP/2 refuses, or says nothing of it and answers nonsense.
var errNotHTTP1 = errors.New("the server does not agree to HTTP/1.1")

// otherTime is how long a host is left to net/http after that.
const otherTime = time.Hour

// send writes a request to addr and reads the head of its answer; like is its method. It does not send again what met a dead connection. An answer
// that is nothing but a success has only its status; the body of any other has to be closed. errNotHTTP1: it is for net/http to send.
func (t *http1) send(ctx context.Context, addr string, deadline time.Time, request []byte, like *http.Request, x *exchange) (status int, resp *http.Response, err error) {
	h, err := t.enter(ctx, addr, deadline)
	if err != nil {
		return 0, nil, err
	}
	c, reused, err := t.conn(ctx, h, addr, deadline, x)
	if err != nil {
		return 0, nil, err
	}
	x.connected(reused)
	x.asked.Store(!reused && c.secure != nil && isAsked(c.secure))
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

// giveBack keeps a connection whose answer has been read to its end, unless there is more in it, its end among that, or ctx may have cut it short.
func (t *http1) giveBack(ctx context.Context, h *http1Host, c *http1Conn) {
	if c.in.Buffered() > 0 || c.err != nil || ctx.Err() != nil {
		t.drop(h, c)
		return
	}
	t.leave(h, c)
}

func (t *http1) drop(h *http1Host, c *http1Conn) {
	c.abort()
	t.leave(h, nil)
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
	other := h.isOther()
	t.mu.Unlock()
	err := errNotHTTP1
	if !other {
		err = h.wait(ctx, deadline)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil && h.isOther() { // it is by now
		<-h.used
		err = errNotHTTP1
	}
	if err != nil {
		h.users--
		return nil, err
	}
	return h, nil
}

func (h *http1Host) isOther() bool { return !h.other.IsZero() && time.Now().Before(h.other) }

func (h *http1Host) wait(ctx context.Context, deadline time.Time) error {
	select {
	case h.used <- struct{}{}:
		return nil
	default:
	}
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	select {
	case h.used <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// leave gives the place back, and the connection if it can be used again and nobody waits for its place. Who wants one gets both: the place that it has is its
// opening's from then on.
func (t *http1) leave(h *http1Host, c *http1Conn) {
	t.mu.Lock()
	keep := c != nil && c.age == t.age && !t.crowded()
	if keep && len(h.wants) > 0 {
		c.since = time.Now()
		h.wants[0] <- c
		h.wants = slices.Delete(h.wants, 0, 1)
		t.mu.Unlock()
		return
	}
	if keep {
		c.since = time.Now()
		h.idle = append(h.idle, c)
	}
	if c != nil && !keep { // it counts until it is closed
		t.mu.Unlock()
		c.close()
		t.mu.Lock()
	}
	h.users--
	t.mu.Unlock()
	<-h.used
}

// conn returns the idle connection that was used last, or a new one, with the deadline set; or it leaves. Each is looked at first, however short it was idle: a
// byte that nobody asked for would be taken for the answer of the next request, and a receiver that restarts closes all at once, more than an attempt
// sends again for.
func (t *http1) conn(ctx context.Context, h *http1Host, addr string, deadline time.Time, x *exchange) (c *http1Conn, reused bool, err error) {
	if c = t.usable(ctx, h, deadline, nil); c != nil {
		return c, true, nil
	}
	return t.await(ctx, h, addr, deadline, x)
}

// usable returns an idle connection that can be used; nil: there is none, and freed gets the next one that is given back.
func (t *http1) usable(ctx context.Context, h *http1Host, deadline time.Time, freed chan<- *http1Conn) *http1Conn {
	for {
		c := t.take(h, freed)
		if c == nil || t.isUsable(ctx, c, deadline) {
			return c
		}
		c.close()
	}
}

func (t *http1) isUsable(ctx context.Context, c *http1Conn, deadline time.Time) bool {
	foreign := c.watched != ctx.Done()
	return !c.stale && (!foreign || c.unwatch()) && time.Since(c.since) < t.idleTimeout && c.SetDeadline(deadline) == nil && c.alive()
}

// await opens a connection, or leaves. One that is given back before takes its place: a receiver may have no more room than for those that there are. With TLS one
// that is not there in time is still made, for the next attempt to use, and keeps its place meanwhile: a receiver that takes long to shake hands would never be
// delivered to otherwise.
func (t *http1) await(ctx context.Context, h *http1Host, addr string, deadline time.Time, x *exchange) (c *http1Conn, reused bool, err error) {
	freed := make(chan *http1Conn, 1)
	if c = t.usable(ctx, h, deadline, freed); c != nil {
		return c, true, nil
	}
	type opened struct {
		c   *http1Conn
		err error
	}
	wanted, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	opening := x.context(wanted)
	if t.tls != nil {
		opening = context.WithoutCancel(opening)
	}
	made := make(chan opened)
	t.start(func() {
		c, err := t.open(opening, h, addr)
		select {
		case made <- opened{c, err}:
		case <-wanted.Done():
			t.leave(h, c)
		}
	})
	for {
		select {
		case o := <-made:
			t.give(h, freed)
			if o.err != nil {
				t.leave(h, nil)
				return nil, false, o.err
			}
			_ = o.c.SetDeadline(deadline) // fails only for a connection that is closed, as the request will
			return o.c, false, nil
		case c := <-freed:
			if t.isUsable(ctx, c, deadline) {
				return c, true, nil
			}
			c.close()
			if c = t.usable(ctx, h, deadline, freed); c != nil {
				return c, true, nil
			}
			t.leave(h, nil) // the place that came with it
		case <-wanted.Done():
			t.give(h, freed)
			return nil, false, wanted.Err()
		}
	}
}

// give ends the wait for a connection that is given back. One that has come nevertheless goes to the next.
func (t *http1) give(h *http1Host, freed chan *http1Conn) {
	t.mu.Lock()
	i := slices.Index(h.wants, (chan<- *http1Conn)(freed))
	if i >= 0 {
		h.wants = slices.Delete(h.wants, i, i+1)
	}
	t.mu.Unlock()
	if i < 0 {
		t.leave(h, <-freed)
	}
}

// open opens a connection.
func (t *http1) open(ctx context.Context, h *http1Host, addr string) (*http1Conn, error) {
	age := t.now() // before the address is checked
	conn, err := t.dial(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	c := newHTTP1Conn(conn, age)
	if t.tls == nil {
		return c, nil
	}
	if c.secure, err = t.shake(ctx, &c.beneath, addr, t.tls); err != nil {
		if errors.Is(err, errNotHTTP1) {
			t.mu.Lock()
			h.other = time.Now().Add(otherTime)
			t.mu.Unlock()
		}
		return nil, err
	}
	c.way = c.secure
	return c, nil
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

func (t *http1) take(h *http1Host, freed chan<- *http1Conn) *http1Conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(h.idle)
	if n == 0 {
		if freed != nil {
			h.wants = append(h.wants, freed)
		}
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

// sweep closes connections that have been idle for too long.
func (t *http1) sweep(now time.Time) {
	t.closeIdle(func(c *http1Conn) bool { return now.Sub(c.since) > t.idleTimeout })
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
		if len(kept) == 0 && h.users == 0 && !h.isOther() {
			delete(t.hosts, addr)
		}
	}
	t.mu.Unlock()
	for _, c := range closing {
		c.close()
	}
}
