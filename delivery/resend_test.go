package delivery

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/neo-commons/outbox-relay/delivery/certtest"
)

// tlsServer hands each connection to handle. ca is the file with its authority.
func tlsServer(t *testing.T, proto string, handle func(c *tls.Conn)) (url, ca string) {
	t.Helper()
	a := certtest.New(t, "all")
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{a.Pair(t, "receiver", "127.0.0.1")}, NextProtos: []string{proto}})
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer func() { _ = c.Close() }()
				if secure, ok := c.(*tls.Conn); ok {
					handle(secure)
				}
			})
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return "https://" + l.Addr().String(), certtest.Write(t, t.TempDir(), "ca.pem", a.PEM())
}

// TestOneMoreRequest has many kept connections, and all of them break when the next request has come over them. With such a header net/http takes a POST for one
// that it may send until there is no kept connection left.
func TestOneMoreRequest(t *testing.T) {
	t.Parallel()
	byBoth(t, testOneMoreRequest)
}

func testOneMoreRequest(t *testing.T, change func(*Config)) {
	t.Helper()
	const kept = 5
	for _, headers := range []string{`{}`, `{"Idempotency-Key": "x"}`, `{"X-Idempotency-Key": "x"}`} {
		var broken atomic.Bool
		var requests atomic.Int32
		var all sync.WaitGroup
		all.Add(kept)
		url, ca := tlsServer(t, "http/1.1", func(c *tls.Conn) {
			in := bufio.NewReader(c)
			for first := true; ; first = false {
				req, err := http.ReadRequest(in)
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, req.Body)
				if broken.Load() {
					requests.Add(1)
					return
				}
				if first {
					all.Done()
					all.Wait()
				}
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
		b := setup(t, change, func(c *Config) { c.TLS.CAFile = ca })
		ep := b.endpoint(url, func(r *EndpointRow) { r.CustomHeaders = []byte(headers) })
		var wg sync.WaitGroup
		for range kept {
			wg.Go(func() { res := b.attempt(ep); assert.True(t, res.OK(), res.Err) })
		}
		wg.Wait()
		broken.Store(true)
		res := b.attempt(ep)
		assert.Equal(t, ClassReset, res.Class, res.Err)
		assert.EqualValues(t, 2, requests.Load(), headers)
		assert.Equal(t, 1, b.count(b.m.resends), headers)
		b.client.closeIdle()
	}
}

// h2Receiver answers requests over HTTP/2 with 200, unless refuse has done something else. It is told of the number of the connection, and that of the request among all.
func h2Receiver(t *testing.T, refuse func(f *http2.Framer, conn, request int, stream uint32) bool) (url, ca string) {
	t.Helper()
	var conns, requests atomic.Int32
	return tlsServer(t, "h2", func(c *tls.Conn) {
		conn := conns.Add(1)
		if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		f := http2.NewFramer(c, c)
		_ = f.WriteSettings()
		var ok bytes.Buffer
		_ = hpack.NewEncoder(&ok).WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
		for frame, err := f.ReadFrame(); err == nil; frame, err = f.ReadFrame() {
			stream := frame.Header().StreamID
			switch data, ended := frame.(*http2.DataFrame); {
			case frame.Header().Type == http2.FrameSettings && !frame.Header().Flags.Has(http2.FlagSettingsAck):
				_ = f.WriteSettingsAck()
			case ended && data.StreamEnded() && !refuse(f, int(conn), int(requests.Add(1)), stream):
				_ = f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: ok.Bytes(), EndHeaders: true, EndStream: true})
			}
		}
	})
}

// TestRefusedStreams: what HTTP/2 refuses is sent once more, like all else.
func TestRefusedStreams(t *testing.T) {
	t.Parallel()
	for refused, class := range map[int]Class{1: ClassSuccess, 9: ClassReset} {
		var requests atomic.Int32
		url, ca := h2Receiver(t, func(f *http2.Framer, _, request int, stream uint32) bool {
			requests.Store(int32(request))
			if request > refused {
				return false
			}
			_ = f.WriteRSTStream(stream, http2.ErrCodeRefusedStream)
			return true
		})
		b := setup(t, func(c *Config) { c.TLS.CAFile, c.netHTTP = ca, true })
		res := b.attempt(b.endpoint(url))
		assert.Equal(t, class, res.Class, res.Err)
		assert.EqualValues(t, 2, requests.Load())
		assert.Equal(t, 1, b.count(b.m.resends))
		b.client.closeIdle()
	}
}

// TestGoAway: a receiver that ends a connection says which requests it has not looked at. These are sent once more, over another one.
func TestGoAway(t *testing.T) {
	t.Parallel()
	for _, unseen := range []int{1, 20} {
		var requests atomic.Int32
		url, ca := h2Receiver(t, func(f *http2.Framer, conn, request int, _ uint32) bool {
			requests.Store(int32(request))
			if conn > 1 || request == 1 {
				return false
			}
			if request == 1+unseen {
				_ = f.WriteGoAway(1, http2.ErrCodeNo, nil)
			}
			return true
		})
		b := setup(t, func(c *Config) { c.TLS.CAFile, c.netHTTP = ca, true })
		ep := b.endpoint(url)
		require.Equal(t, ClassSuccess, b.attempt(ep).Class)
		var wg sync.WaitGroup
		for range unseen {
			wg.Go(func() {
				res := b.attempt(ep)
				assert.Equal(t, ClassSuccess, res.Class, res.Err)
			})
		}
		wg.Wait()
		assert.EqualValues(t, 1+2*unseen, requests.Load())
		assert.Equal(t, unseen, b.count(b.m.resends))
		b.client.closeIdle()
	}
}
