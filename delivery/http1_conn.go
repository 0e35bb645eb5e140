package delivery

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

// beneath is a connection under TLS, or under nothing.
type beneath struct {
	wire

	used bool // a request was sent
	shut bool // nothing waits: of one that was used, nothing is read
}

// Read implements io.Reader.
func (b *beneath) Read(p []byte) (int, error) {
	switch {
	case !b.shut:
		return b.wire.Read(p)
	case b.used:
		return 0, os.ErrDeadlineExceeded // which leaves TLS as it is
	default:
		return b.readNow(p)
	}
}

// SetWriteDeadline implements net.Conn. TLS would give its farewell five seconds, in which a receiver that does not read holds up whoever closes what is idle.
func (b *beneath) SetWriteDeadline(at time.Time) error {
	if b.shut {
		at = time.Now().Add(time.Millisecond)
	}
	return b.wire.SetWriteDeadline(at)
}

// http1Conn is one connection.
type http1Conn struct {
	beneath

	secure *tls.Conn     // nil: there is no TLS
	way    io.ReadWriter // TLS, or what is beneath it
	in     *bufio.Reader // reads through head, below
	head   int64         // bytes that the head of an answer may still have; negative: any number
	err    error         // of the last read: the parser calls a head that breaks off malformed
	since  time.Time
	age    int
	stale  bool // it was of another age when it was taken
	one    [1]byte

	watched <-chan struct{} // ends the context that is watched
	unwatch func() bool     // false: the end of ctx may still end what comes next
}

func newHTTP1Conn(conn net.Conn, age int) *http1Conn {
	c := &http1Conn{head: -1, age: age, unwatch: func() bool { return true }}
	c.prepare(conn)
	c.way = &c.beneath
	c.in = bufio.NewReader(c)
	return c
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
	n, c.err = c.way.Read(p)
	if c.head > 0 {
		c.head -= int64(n)
	}
	return n, c.err
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

// close ends a connection that nobody uses, with the farewell of TLS.
func (c *http1Conn) close() {
	c.unwatch()
	if c.secure != nil {
		c.shut = true
		_ = c.secure.Close()
		return
	}
	_ = c.Close()
}

// abort ends a connection in the middle of something. There is no farewell, which would have to wait.
func (c *http1Conn) abort() {
	c.unwatch()
	_ = c.Close()
}

// alive tells whether an idle connection can be used again: neither has the receiver closed it, nor is there anything that nobody asked for, on the wire or
// in what TLS has read ahead; but for a part of a record, of which TLS does not tell. What comes by itself in TLS 1.3 is read with the answer before it, and later
// costs the connection. Of one that no request was sent over yet it is read here: tickets.
func (c *http1Conn) alive() bool {
	if (c.used || c.secure == nil) && !c.wire.alive() {
		return false
	}
	if c.secure == nil {
		return true
	}
	c.shut = true // so it says what it has read already
	n, err := c.secure.Read(c.one[:])
	c.shut = false
	return n == 0 && errors.Is(err, os.ErrDeadlineExceeded)
}

// exchange writes the request and reads the head of its answer. The 1xx answers before it are passed over; together with it they may be as large as
// a head, however many they are. So does net/http since Go 1.26.
func (c *http1Conn) exchange(request []byte, like *http.Request, x *exchange) (status int, resp *http.Response, err error) {
	c.used = true
	if _, err := c.way.Write(request); err != nil {
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
