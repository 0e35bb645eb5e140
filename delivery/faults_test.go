package delivery

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// rawConn is the server's side of a connection. What is written goes through TLS where there is one; its end comes without a farewell.
type rawConn struct {
	net.Conn

	tcp *net.TCPConn
}

// rawServer gives every connection to handle, with its number from 1, and closes it afterwards.
func rawServer(t *testing.T, handle func(c *rawConn, r *bufio.Reader, n int)) (url string) {
	t.Helper()
	return rawServerOf(t, "http", handle)
}

// rawServerOf is rawServer for http or https, whose certificate is to be left unchecked.
func rawServerOf(t *testing.T, scheme string, handle func(c *rawConn, r *bufio.Reader, n int)) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test's own listener
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 1; ; n++ {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = conn.Close() }()
				tcp, _ := conn.(*net.TCPConn)
				c := &rawConn{conn, tcp}
				if scheme == "https" { // in whole records, whatever their size
					over := tls.Server(conn, &tls.Config{
						Certificates: []tls.Certificate{testCertificate()}, NextProtos: []string{"http/1.1"}, DynamicRecordSizingDisabled: true,
					})
					if over.HandshakeContext(t.Context()) != nil {
						return
					}
					c.Conn = over
				}
				handle(c, bufio.NewReader(c), n)
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return scheme + "://" + l.Addr().String()
}

var testCertificate = sync.OnceValue(func() tls.Certificate { //nolint:gochecknoglobals // made once
	s := httptest.NewTLSServer(nil)
	defer s.Close()
	return s.TLS.Certificates[0]
})

// unchecked has endpoints of rawServerOf delivered to.
func unchecked(c *Config)                { c.AllowInsecureTLS = true }
func uncheckedEndpoint(row *EndpointRow) { row.VerifySSL = false }

// readRequest reads one request with its body.
func readRequest(r *bufio.Reader) error {
	req, err := http.ReadRequest(r)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, req.Body)
	return err
}

// hold keeps a connection open until the other side closes it.
func hold(r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) }

func reset(c *rawConn) { _ = c.tcp.SetLinger(0) }

// flood writes the same over and over until the other side has enough.
func flood(c *rawConn, text string) {
	chunk := []byte(strings.Repeat(text, 1+4096/len(text)))
	for err := error(nil); err == nil; {
		_, err = c.Write(chunk)
	}
}

// bomb is a small gzip file that is large when it is unpacked, and may be repeated.
var bomb = sync.OnceValue(func() string { //nolint:gochecknoglobals // made once, and out of what is counted
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write(make([]byte, 1<<20))
	_ = z.Close()
	return b.String()
})

const limit = 300 * time.Millisecond

// fault is something a receiver does wrong, and what it has to be taken for.
type fault struct {
	handle func(c *rawConn, r *bufio.Reader, n int)
	class  Class
	status int
	within time.Duration // the time of the attempt that meets it. Zero: the fault ends the attempt, so it is a minute, which no slow machine makes a timeout of
}

func faultList() map[string]fault { //nolint:funlen // a table
	return map[string]fault{
		"closed at once": {func(*rawConn, *bufio.Reader, int) {}, ClassReset, 0, 0},
		"reset at once":  {func(c *rawConn, _ *bufio.Reader, _ int) { reset(c) }, ClassReset, 0, 0},
		"reset after the request": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			reset(c)
		}, ClassReset, 0, 0},
		"no answer": {func(_ *rawConn, r *bufio.Reader, _ int) { hold(r) }, ClassTimeout, 0, limit},
		"half a head, then closed": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n")
		}, ClassReset, 0, 0},
		"half a line, then closed": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-")
		}, ClassProtocol, 0, 0},
		"half a head, then silence": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-")
			hold(r)
		}, ClassTimeout, 0, limit},
		"a head of one byte at a time": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			for range 1000 {
				if _, err := io.WriteString(c, "H"); err != nil {
					return
				}
				<-time.After(limit / 10)
			}
		}, ClassTimeout, 0, limit},
		"not HTTP": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.0 planted-secret-value\r\n")
			hold(r)
		}, ClassProtocol, 0, 0},
		"an impossible status": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 abc planted-secret-value\r\n\r\n")
			hold(r)
		}, ClassProtocol, 0, 0},
		"a head without end": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
			flood(c, "X-Filler: "+strings.Repeat("x", 1000)+"\r\n")
		}, ClassProtocol, 0, 0},
		"1xx without end": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			flood(c, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")
		}, ClassProtocol, 0, 0},
		"ten 1xx": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, strings.Repeat("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", 5)+"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}, ClassSuccess, 200, 0},
		"a status below 100": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n")
			hold(r)
		}, ClassProtocol, 99, 0},
		"another protocol": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
			hold(r)
		}, ClassProtocol, 101, 0},
		"success, then the body breaks off": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")
		}, ClassSuccess, 200, 0},
		"failure, then a reset": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\nabc")
			reset(c)
		}, Class5xx, 500, 0},
		"a success that tells of an error": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{\"error\": \"oops\"}")
		}, ClassSuccess, 200, 0},
		"a gigabyte": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 500 Oops\r\nContent-Length: 1073741824\r\n\r\n")
			flood(c, "x")
		}, Class5xx, 500, 0},
		"a body without end": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 502 Oops\r\nTransfer-Encoding: chunked\r\n\r\n")
			flood(c, "5\r\nhello\r\n")
		}, Class5xx, 502, 0},
		"a gzip bomb": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 500 Oops\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n")
			flood(c, bomb())
		}, Class5xx, 500, 0},
		"a body of one byte at a time": {func(c *rawConn, r *bufio.Reader, _ int) {
			_ = readRequest(r)
			_, _ = io.WriteString(c, "HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\n")
			for range 1000 {
				if _, err := io.WriteString(c, "x"); err != nil {
					return
				}
				<-time.After(limit / 10)
			}
		}, Class5xx, 503, 10 * limit},
		"answered before the request is read": {func(c *rawConn, r *bufio.Reader, _ int) {
			_, _ = r.ReadByte() // before it, net/http takes the answer for a stray one
			_, _ = io.WriteString(c, "HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
			hold(r)
		}, Class4xx, 413, 0},
	}
}

// transports are the two that requests go through: http1, and net/http for all that http1 is not made for.
func transports() map[string]func(*Config) {
	return map[string]func(*Config){"http1": func(*Config) {}, "net/http": func(c *Config) { c.netHTTP = true }}
}

// byBoth has a test run with each of them.
func byBoth(t *testing.T, test func(t *testing.T, change func(*Config))) {
	t.Helper()
	for transport, change := range transports() {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			test(t, change)
		})
	}
}

// secureTransports are transports by scheme and name: "https http1".
func secureTransports() map[string]func(*Config) {
	list := make(map[string]func(*Config))
	for name, change := range transports() {
		for _, scheme := range []string{"http", "https"} {
			list[scheme+" "+name] = change
		}
	}
	return list
}

// TestFaults has every fault end in its class, within the endpoint's timeout and with little memory, whatever the receiver sends: all that was
// allocated meanwhile, by either side, is less than the bound. So one runs at a time.
func TestFaults(t *testing.T) { //nolint:paralleltest // it counts what is allocated
	bomb()
	const slack = 30 * time.Second
	memory := map[string]int{"http": 2 << 20, "https": 8 << 20} // TLS makes pieces of what is sent, on both sides
	for transport, change := range secureTransports() {         //nolint:paralleltest // see above
		for name, c := range faultList() {
			t.Run(transport+"/"+name, func(t *testing.T) {
				b := setup(t, change, unchecked)
				scheme, _, _ := strings.Cut(transport, " ")
				ep := b.endpointWithin(cmp.Or(c.within, time.Minute), rawServerOf(t, scheme, c.handle), uncheckedEndpoint)
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				res := b.attempt(ep)
				runtime.ReadMemStats(&after)
				assert.Equal(t, c.class, res.Class, res.Err)
				assert.Equal(t, c.status, res.Status)
				assert.Less(t, res.Duration, c.within+slack)
				assert.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(memory[scheme]))
				assert.NotContains(t, res.Err, testSecret)
				assert.Zero(t, b.count(b.m.resends), "a new connection is no stale one")
				assert.Equal(t, 1, b.count(b.m.attempts[c.class]))
			})
		}
	}
}

func TestConnectFaults(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test's own listener
	require.NoError(t, err)
	free := l.Addr().String()
	require.NoError(t, l.Close())
	b := setup(t)
	res := b.attempt(b.endpoint("http://" + free))
	assert.Equal(t, ClassConnect, res.Class)
	assert.Equal(t, "connection refused", res.Err)
	assert.Equal(t, 1, b.count(b.m.connErrors[stageConnect]))
}

func TestTLSFaults(t *testing.T) {
	t.Parallel()
	byBoth(t, testTLSFaults)
}

func testTLSFaults(t *testing.T, change func(*Config)) {
	t.Helper()
	b := setup(t, change, unchecked)

	plain := serve(t, func(http.ResponseWriter, *http.Request) {})
	res := b.attempt(b.endpoint(strings.Replace(plain.URL, "http", "https", 1)))
	assert.Equal(t, ClassTLS, res.Class)
	assert.Equal(t, "the server does not speak TLS on this port", res.Err)

	silent := rawServer(t, func(_ *rawConn, r *bufio.Reader, _ int) { hold(r) })
	hasty := setup(t, change, func(c *Config) { c.TLSHandshakeTimeout = limit })
	res = hasty.attempt(hasty.endpoint(strings.Replace(silent, "http", "https", 1)))
	assert.Equal(t, ClassTimeout, res.Class)
	assert.Equal(t, "the TLS handshake took too long", res.Err)

	old := httptest.NewUnstartedServer(nil)
	old.Config.ErrorLog = discardLog()
	old.TLS = &tls.Config{MaxVersion: tls.VersionTLS11}
	old.StartTLS()
	t.Cleanup(old.Close)
	res = b.attempt(b.endpoint(old.URL, uncheckedEndpoint))
	assert.Equal(t, ClassTLS, res.Class)
	assert.Equal(t, "the server refused the TLS handshake: tls: protocol version not supported", res.Err)

	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = discardLog()
	secure.StartTLS()
	t.Cleanup(secure.Close)
	res = b.attempt(b.endpoint(strings.Replace(secure.URL, "https", "http", 1)))
	assert.Equal(t, Class4xx, res.Class, "HTTP to a TLS port")
	res = b.attempt(b.endpoint(secure.URL))
	assert.Equal(t, ClassTLS, res.Class)
	assert.Equal(t, "the certificate is signed by an unknown authority", res.Err)
	assert.Equal(t, 3, b.count(b.m.connErrors[stageTLS]))
	assert.Equal(t, 1, hasty.count(hasty.m.connErrors[stageTLS]))
}

// TestStaleConnection has the receiver close a kept connection while the next request is on its way.
func TestStaleConnection(t *testing.T) {
	t.Parallel()
	answer := "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	for name, c := range map[string]struct {
		end     func(*rawConn)
		alive   int // connections from this number on answer twice
		class   Class
		resends int
		conns   int
	}{
		"closed":          {func(*rawConn) {}, 2, ClassSuccess, 1, 2},
		"reset":           {reset, 2, ClassSuccess, 1, 2},
		"half an answer":  {func(c *rawConn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n") }, 2, ClassReset, 0, 1},
		"never any alive": {func(*rawConn) {}, 99, ClassReset, 1, 2},
	} {
		for transport, change := range secureTransports() {
			t.Run(transport+"/"+name, func(t *testing.T) {
				t.Parallel()
				scheme, _, _ := strings.Cut(transport, " ")
				url := rawServerOf(t, scheme, func(conn *rawConn, r *bufio.Reader, n int) {
					if n > 1 && n < c.alive {
						return
					}
					for served := 0; readRequest(r) == nil; served++ {
						if served == 1 && n < c.alive {
							c.end(conn)
							return
						}
						_, _ = io.WriteString(conn, answer)
					}
				})
				b := setup(t, change, unchecked)
				ep := b.endpoint(url, uncheckedEndpoint)
				first := b.attempt(ep)
				require.True(t, first.OK(), first.Err)
				second := b.attempt(ep)
				assert.Equal(t, c.class, second.Class, second.Err)
				assert.Equal(t, c.resends, b.count(b.m.resends))
				assert.Equal(t, c.conns, b.count(b.m.connOpened))
				total := 0
				for _, counter := range b.m.attempts {
					total += b.count(counter)
				}
				assert.Equal(t, 2, total, "the second request of an attempt is no attempt")
			})
		}
	}
}

// TestFailureKeepsOtherConnections holds the guard against retryablehttp closing all idle connections after a failed request.
func TestFailureKeepsOtherConnections(t *testing.T) {
	t.Parallel()
	good := serve(t, func(http.ResponseWriter, *http.Request) {})
	bad := rawServer(t, func(*rawConn, *bufio.Reader, int) {})
	b := setup(t)
	for range 3 {
		res := b.attempt(b.endpoint(good.URL))
		require.True(t, res.OK(), res.Err)
		res = b.attempt(b.endpoint(bad))
		require.Equal(t, ClassReset, res.Class)
	}
	assert.Equal(t, 2, b.count(b.m.connReused))
}

// TestBodiesAreBounded has receivers that never stop sending: what they get rid of is what is read and what lies in the sockets' buffers.
func TestBodiesAreBounded(t *testing.T) {
	t.Parallel()
	const buffers = 32 << 20
	for name, c := range map[string]struct {
		length, encoding string
		chunk            []byte // sent over and over
	}{
		"endless":    {"", "", make([]byte, 4<<10)},
		"a terabyte": {strconv.Itoa(1 << 40), "", make([]byte, 4<<10)},
		"gzip bomb":  {"", "gzip", []byte(bomb())},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sent := make(chan int64, 1)
			s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				if c.length != "" {
					w.Header().Set("Content-Length", c.length)
				}
				if c.encoding != "" {
					w.Header().Set("Content-Encoding", c.encoding)
				}
				w.WriteHeader(http.StatusInternalServerError)
				total := int64(0)
				for err := error(nil); err == nil; {
					var n int
					n, err = w.Write(c.chunk)
					total += int64(n)
				}
				sent <- total
			})
			b := setup(t, func(c *Config) { c.KeepResponseBytes = maxResponseBytes })
			res := b.attempt(b.endpoint(s.URL))
			assert.Equal(t, Class5xx, res.Class, res.Err)
			assert.Len(t, res.Body, maxResponseBytes)
			assert.Equal(t, c.encoding == "gzip", strings.HasPrefix(string(res.Body), "\x1f\x8b"), "as it came")
			assert.Less(t, <-sent, int64(buffers))
		})
	}
}

func discardLog() *log.Logger { return log.New(io.Discard, "", 0) }
