package main

import (
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// deliver sends an event to a receiver the way a relay would, and returns the status; 0 if the connection was dropped.
func deliver(t *testing.T, client *http.Client, r *demoReceiver, endpoint, event outbox.UUID, secret string) int {
	t.Helper()
	const body = `{"type": "order.created"}`
	signer, err := standardwebhooks.NewWebhook(secret)
	require.NoError(t, err)
	now := time.Now()
	signature, err := signer.Sign(event.String(), now, []byte(body))
	require.NoError(t, err)
	url := "http://" + r.listener.Addr().String() + "/" + endpoint.String()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	require.NoError(t, err)
	req.Header.Set(standardwebhooks.HeaderWebhookID, event.String())
	req.Header.Set(standardwebhooks.HeaderWebhookTimestamp, strconv.FormatInt(now.Unix(), 10))
	req.Header.Set(standardwebhooks.HeaderWebhookSignature, signature)
	res, err := client.Do(req)
	if err != nil {
		require.ErrorIs(t, err, io.EOF)
		return 0
	}
	require.NoError(t, res.Body.Close())
	return res.StatusCode
}

func TestDemoReceivers(t *testing.T) {
	t.Parallel()
	client := &http.Client{Transport: new(http.Transport)}
	t.Cleanup(client.CloseIdleConnections)
	oracle := newDemoOracle()
	for _, r := range newDemoReceivers(1, oracle) {
		require.NoError(t, r.listen(t.Context()))
		served := make(chan error, 1)
		go func() { served <- r.serve() }()
		t.Cleanup(func() {
			require.NoError(t, r.close())
			require.NoError(t, <-served)
			require.NoError(t, r.close(), "a second time")
		})
		endpoint, other := outbox.NewUUID(), outbox.NewUUID()
		secret, err := r.register(endpoint)
		require.NoError(t, err)
		othersSecret, err := r.register(other)
		require.NoError(t, err)

		answers := make(map[int]int)
		for range 200 {
			answers[deliver(t, client, r, endpoint, outbox.NewUUID(), secret)]++
		}
		switch r.name {
		case "healthy":
			assert.Equal(t, map[int]int{200: 200}, answers)
		case "flaky":
			assert.InDelta(t, 160, answers[204], 25)
			for _, status := range []int{0, 500, 503} {
				assert.Positive(t, answers[status], status)
			}
		case "dead":
			assert.Equal(t, map[int]int{500: 200}, answers)
		}
		assert.Zero(t, oracle.forgeries)
		assert.Equal(t, http.StatusUnauthorized, deliver(t, client, r, endpoint, outbox.NewUUID(), othersSecret))
		assert.Equal(t, http.StatusUnauthorized, deliver(t, client, r, outbox.NewUUID(), outbox.NewUUID(), secret), "an endpoint that nobody knows")
		assert.Equal(t, 2, oracle.forgeries)
		oracle.forgeries = 0
	}
}

func TestReceiverThatNeverServedCloses(t *testing.T) {
	t.Parallel()
	r := newDemoReceivers(1, newDemoOracle())[0]
	require.NoError(t, r.close())
	require.NoError(t, r.listen(t.Context()))
	require.NoError(t, r.close())
	require.NoError(t, r.serve())
}
