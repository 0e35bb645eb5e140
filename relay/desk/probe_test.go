package desk_test

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

func TestProbe(t *testing.T) {
	t.Parallel()
	const secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
	verify, err := standardwebhooks.NewWebhook(secret)
	require.NoError(t, err)
	status, faults := http.StatusNoContent, make(chan error, 1)
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil {
			err = verify.Verify(body, r.Header)
		}
		faults <- err
		w.WriteHeader(status)
		if status >= 300 {
			_, _ = w.Write([]byte("no such path"))
		}
	}))
	t.Cleanup(receiver.Close)
	cfg := delivery.Config{
		ConnectTimeout: 5 * time.Second, TLSHandshakeTimeout: 5 * time.Second, MaxConns: 1, MaxConnsPerHost: 1, IdleTimeout: time.Minute,
		KeepResponseBytes: 1 << 10, Version: "test", Source: "test",
	}
	guarded := cfg
	cfg.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	probe := func(cfg delivery.Config, row delivery.EndpointRow) *desk.ProbeResult {
		client, err := delivery.NewClient(cfg, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		defer client.Close()
		p, err := desk.Probe(t.Context(), client, row, defaults(), "test")
		require.NoError(t, err)
		return p
	}
	b := setup(t)
	id := b.endpoint("Shop", "none")
	b.exec(`UPDATE acme.webhook_endpoints SET endpoint_url = $1::text, secret_token = $2::text, is_active = false`, receiver.URL+"/hook?key=s3cret", secret)
	row, ok := b.registry().Routing(defaults()).EndpointRow(id)
	require.True(t, ok)

	p := probe(cfg, row)
	require.NoError(t, <-faults, "the signature")
	assert.True(t, p.Delivered)
	assert.Equal(t, 204, p.Status)
	assert.Equal(t, receiver.URL+"/hook", p.URL)

	status = http.StatusNotFound
	p = probe(cfg, row)
	require.NoError(t, <-faults)
	assert.False(t, p.Delivered)
	assert.Equal(t, delivery.Class4xx, p.Class)
	assert.Equal(t, "no such path", p.Answer)
	assert.Contains(t, p.Hint, "endpoint_url")

	p = probe(guarded, row)
	assert.Equal(t, delivery.ClassDenied, p.Class)
	assert.Contains(t, p.Hint, "network.allow")
	assert.Zero(t, b.count(), "nothing is recorded")

	row.URL = "ftp://x"
	client, err := delivery.NewClient(cfg, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer client.Close()
	_, err = desk.Probe(t.Context(), client, row, defaults(), "test")
	require.ErrorContains(t, err, "the scheme must be http or https")
	assert.NotEmpty(t, hint(err))
}

func (b *bundle) count() int64 {
	return get[int64](b, `SELECT (SELECT count(*) FROM acme.webhook_deliveries) + (SELECT count(*) FROM acme.webhook_events)`)
}
