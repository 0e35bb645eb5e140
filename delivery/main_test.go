package delivery

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/outbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testSecret = "planted-secret-value"

// bundle is a Client that may reach loopback addresses, with its metrics.
type bundle struct {
	t      testing.TB
	client *Client
	m      *Metrics
}

func setup(t testing.TB, change ...func(*Config)) *bundle {
	t.Helper()
	return setupLookup(t, net.DefaultResolver.LookupHost, change...)
}

func setupLookup(t testing.TB, lookup func(context.Context, string) ([]string, error), change ...func(*Config)) *bundle {
	t.Helper()
	cfg := testConfig()
	cfg.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}
	for _, f := range change {
		f(&cfg)
	}
	m := NewMetrics(prometheus.NewRegistry())
	c, err := newClient(cfg, m, slog.New(slog.DiscardHandler), lookup)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return &bundle{t: t, client: c, m: m}
}

// endpoint makes an endpoint with a timeout of five seconds, which no test that passes waits for.
func (b *bundle) endpoint(url string, change ...func(*EndpointRow)) *Endpoint {
	b.t.Helper()
	return b.endpointWithin(5*time.Second, url, change...)
}

func (b *bundle) endpointWithin(timeout time.Duration, url string, change ...func(*EndpointRow)) *Endpoint {
	b.t.Helper()
	row := EndpointRow{ID: outbox.NewUUID(), URL: url, SecretToken: testSecret, VerifySSL: true, Active: true}
	for _, f := range change {
		f(&row)
	}
	d := testDefaults()
	d.Timeout = timeout
	ep, err := NewEndpoint(row, d)
	require.NoError(b.t, err)
	return ep
}

func (b *bundle) attempt(ep *Endpoint) Result {
	b.t.Helper()
	m := Encode(nil, ep.Format, testEvent(), "test")
	return b.client.Attempt(b.t.Context(), ep, &m, 1)
}

func (b *bundle) count(c prometheus.Collector) int { return int(testutil.ToFloat64(c)) }

func testEvent() *outbox.Event {
	return &outbox.Event{
		ID:          outbox.UUID{1, 0x9f, 15: 1},
		Type:        "order.created",
		AggregateID: outbox.UUID{2, 15: 2}, AggregateType: "order", AggregateVersion: 3,
		Data:       json.RawMessage(`{"a": 1}`),
		Metadata:   json.RawMessage(`{}`),
		OccurredAt: time.Date(2024, 5, 6, 7, 8, 9, 123456789, time.FixedZone("east", 7200)),
	}
}

// serve runs an HTTP server for the test.
func serve(t testing.TB, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	return serveOver(t, "http", h)
}

// serveOver is serve, with a certificate that is to be left unchecked if how begins with https.
func serveOver(t testing.TB, how string, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	if strings.HasPrefix(how, "https") {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return s
}

func testConfig() Config {
	return Config{
		ConnectTimeout:      5 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second,
		MaxConns:            1024,
		MaxConnsPerHost:     256,
		IdleTimeout:         55 * time.Second,
		DNSCacheTime:        30 * time.Second,
		KeepResponseBytes:   4 << 10,
		Version:             "dev",
		Source:              "outbox-relay",
	}
}

func testDefaults() Defaults {
	return Defaults{
		Timeout:    30 * time.Second,
		MaxRetries: 5,
		Backoff:    Backoff{First: 30 * time.Second, Max: time.Hour, Multiplier: 2},
		Bounds:     DefaultBounds(),
	}
}
