package delivery

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

func benchEvent(size int) *outbox.Event {
	e := fullEvent()
	e.Data = json.RawMessage(`{"text": "` + strings.Repeat("x", size) + `"}`)
	e.Metadata = json.RawMessage(`{"user": "b"}`)
	return e
}

// BenchmarkEncode compares with encoding/json over a struct that carries the documents as they are.
func BenchmarkEncode(b *testing.B) {
	type body struct {
		ID        string          `json:"id"`
		Type      string          `json:"type"`
		Timestamp time.Time       `json:"timestamp"`
		Data      json.RawMessage `json:"data"`
		Name      string          `json:"name,omitempty"`
		Aggregate struct {
			ID      string `json:"id"`
			Type    string `json:"type"`
			Version int32  `json:"version"`
		} `json:"aggregate"`
		Metadata json.RawMessage `json:"metadata"`
	}
	for _, size := range []int{300, 30_000} {
		e := benchEvent(size)
		b.Run(fmt.Sprintf("%dB/append", size), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Encode(nil, FormatStandard, e, "src")
			}
		})
		b.Run(fmt.Sprintf("%dB/encoding-json", size), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				v := body{ID: e.ID.String(), Type: e.Type, Timestamp: e.OccurredAt, Data: e.Data, Name: e.Name, Metadata: e.Metadata}
				v.Aggregate.ID, v.Aggregate.Type, v.Aggregate.Version = e.AggregateID.String(), e.AggregateType, e.AggregateVersion
				_, err := json.Marshal(&v)
				require.NoError(b, err)
			}
		})
	}
}

// BenchmarkSign compares both headers of one attempt with the official library, which makes only one of them.
func BenchmarkSign(b *testing.B) {
	for _, size := range []int{300, 30_000} {
		m := Encode(nil, FormatStandard, benchEvent(size), "src")
		now := time.Now()
		for name, token := range map[string]string{"raw": testSecret, "whsec": "whsec_c2VjcmV0", "whsk": privatePrefix + rfcSeed} {
			ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: token}, testDefaults())
			require.NoError(b, err)
			b.Run(fmt.Sprintf("%dB/%s", size, name), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					ep.sign(&m, now)
				}
			})
		}
		b.Run(fmt.Sprintf("%dB/library", size), func(b *testing.B) {
			b.ReportAllocs()
			wh, err := standardwebhooks.NewWebhookRaw([]byte(testSecret))
			require.NoError(b, err)
			for b.Loop() {
				_, _ = wh.Sign(m.ID.String(), now, m.Body)
			}
		})
	}
}

// sink is the cheapest HTTP server there can be, so that a benchmark measures the client: it looks for the head's end and the length, and
// allocates nothing per request.
func sink(b *testing.B) (url string) {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // the benchmark's own listener
	require.NoError(b, err)
	var wg sync.WaitGroup
	serve := func(conn net.Conn) {
		defer func() { _ = conn.Close() }()
		r := bufio.NewReaderSize(conn, 64<<10)
		answer := []byte("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		for {
			length := 0
			for {
				line, err := r.ReadSlice('\n')
				if err != nil {
					return
				}
				if len(line) == 2 {
					break
				}
				if v, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
					for _, c := range bytes.TrimSpace(v) {
						length = length*10 + int(c-'0')
					}
				}
			}
			if _, err := r.Discard(length); err != nil {
				return
			}
			if _, err := conn.Write(answer); err != nil {
				return
			}
		}
	}
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(conn) })
		}
	})
	b.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return "http://" + l.Addr().String()
}

// BenchmarkAttempt compares a signed attempt with the same through net/http, and with a bare POST through net/http, to the same server.
func BenchmarkAttempt(b *testing.B) {
	url := sink(b)
	m := Encode(nil, FormatStandard, benchEvent(300), "src")

	bare := &http.Transport{MaxIdleConnsPerHost: 256}
	defer bare.CloseIdleConnections()
	client := &http.Client{Transport: bare}
	post := func(b *testing.B) {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, url, bytes.NewReader(m.Body))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := client.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
	attempt := func(netHTTP bool) func(b *testing.B) {
		ours := setup(b, func(cfg *Config) { cfg.netHTTP = netHTTP })
		ep := ours.endpoint(url)
		return func(b *testing.B) {
			if res := ours.client.Attempt(b.Context(), ep, &m, 1); !res.OK() {
				b.Fatal(res.Err)
			}
		}
	}
	for _, c := range []struct {
		name string
		do   func(*testing.B)
	}{{"attempt", attempt(false)}, {"attempt-net-http", attempt(true)}, {"net-http-post", post}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.do(b)
			}
		})
		b.Run(c.name+"-parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					c.do(b)
				}
			})
		})
	}
}

// BenchmarkAttemptTLS compares attempts by http1 with those by net/http, over TLS and without it, all to servers of net/http.
func BenchmarkAttemptTLS(b *testing.B) {
	m := Encode(nil, FormatStandard, benchEvent(300), "src")
	ours := setup(b, unchecked)
	theirs := setup(b, unchecked, func(c *Config) { c.netHTTP = true })
	answer := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	h2 := httptest.NewUnstartedServer(answer)
	h2.EnableHTTP2 = true
	h2.StartTLS()
	b.Cleanup(h2.Close)
	h1, plain := serveOver(b, "https", answer), serve(b, answer)
	for _, c := range []struct {
		name, url string
		by        *bundle
	}{
		{"http/http1", plain.URL, ours},
		{"http/net-http", plain.URL, theirs},
		{"https/http1", h1.URL, ours},
		{"https/net-http-1", h1.URL, theirs},
		{"https/net-http-2", h2.URL, theirs},
	} {
		ep := c.by.endpoint(c.url, uncheckedEndpoint)
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if res := c.by.client.Attempt(b.Context(), ep, &m, 1); !res.OK() {
						b.Error(res.Err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkNewEndpoint is what a row costs once, and each delivery that is claimed from the retry queue: with a plain secret, and with a sealed one.
func BenchmarkNewEndpoint(b *testing.B) {
	key, err := seal.ParseKey("k", seal.NewKey())
	require.NoError(b, err)
	d := testDefaults()
	d.Tenant = "acme"
	d.Keys, err = seal.NewRing(key)
	require.NoError(b, err)
	row := EndpointRow{ID: outbox.UUID{1}, URL: "https://example.com/hooks", SecretToken: testSecret}
	sealed, err := d.Keys.Seal(d.Tenant, row.ID, testSecret)
	require.NoError(b, err)
	for name, token := range map[string]string{"plain": testSecret, "sealed": sealed} {
		b.Run(name, func(b *testing.B) {
			row := row
			row.SecretToken = token
			b.ReportAllocs()
			for b.Loop() {
				if _, err := NewEndpoint(row, d); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
