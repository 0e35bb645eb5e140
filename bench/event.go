package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
)

const (
	// workers is the number of requests in flight of every contender that has a say in it: the relay, the bare loop and the poller.
	workers = 64
	// secret signs what the contenders send.
	secret = "secret of the benchmark"
	// idHeader names the event, by which the receiver tells events apart.
	idHeader = "webhook-id"
)

// The events are the same for all contenders: about 300 bytes, with ids of version 7 as package outbox makes them. The expressions stand within a loop over i.
const (
	idSQL = `(lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7' || substr(md5(i::text), 1, 3) || '8' ||
		substr(md5(random()::text), 1, 15))::uuid`
	dataSQL = `jsonb_build_object('n', i, 'note', repeat('x', 240))`
)

// data is what a single event of the steady load carries.
var data = []byte(`{"n": 1, "note": "` + string(bytes.Repeat([]byte("x"), 240)) + `"}`) //nolint:gochecknoglobals // a constant, if slices could be

func newIDs(n int) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = outbox.NewUUID().String()
	}
	return ids
}

// appendBody adds the body that the relay sends in its format "standard".
func appendBody(b []byte, id string, at time.Time, data []byte) []byte {
	b = append(append(b, `{"id":"`...), id...)
	b = append(b, `","type":"order.created","timestamp":"`...)
	b = at.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
	b = append(append(b, `","data":`...), data...)
	return append(b, '}')
}

// sender posts signed bodies over kept connections. It is safe for concurrent use.
type sender struct {
	client *http.Client
	url    string
}

// newSender keeps as many connections as there are requests in flight: with the two that net/http keeps by itself, most requests would connect anew.
func newSender(url string, inFlight int) *sender {
	return &sender{url: url, client: &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			MaxIdleConns: inFlight, MaxIdleConnsPerHost: inFlight, IdleConnTimeout: time.Minute, DisableCompression: true,
		},
	}}
}

func (s *sender) close() { s.client.CloseIdleConnections() }

// post sends one body, signed by the Standard Webhooks scheme, and returns the status.
func (s *sender) post(ctx context.Context, id string, body []byte) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body)) //nolint:gosec // the URL is our own receiver's
	if err != nil {
		return 0, fmt.Errorf("make request: %w", err)
	}
	at := strconv.FormatInt(time.Now().Unix(), 10)
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(id + "." + at + "."))
	mac.Write(body)
	req.Header = http.Header{
		"Content-Type":      {"application/json"},
		"Webhook-Id":        {id},
		"Webhook-Timestamp": {at},
		"Webhook-Signature": {"v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))},
	}
	res, err := s.client.Do(req) //nolint:gosec // as above
	if err != nil {
		return 0, fmt.Errorf("post event %s: %w", id, err)
	}
	_, err = io.Copy(io.Discard, res.Body)
	if err := res.Body.Close(); err != nil {
		return 0, fmt.Errorf("post event %s: close answer: %w", id, err)
	}
	if err != nil {
		return 0, fmt.Errorf("post event %s: read answer: %w", id, err)
	}
	if res.StatusCode/100 != 2 {
		return res.StatusCode, fmt.Errorf("post event %s: status %d", id, res.StatusCode)
	}
	return res.StatusCode, nil
}
