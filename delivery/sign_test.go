package delivery

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"sync"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// verifier returns the official verifier for a token.
func verifier(t *testing.T, token string, raw bool) *standardwebhooks.Webhook {
	t.Helper()
	parse := standardwebhooks.NewWebhook
	if raw {
		parse = func(s string) (*standardwebhooks.Webhook, error) { return standardwebhooks.NewWebhookRaw([]byte(s)) }
	}
	v, err := parse(token)
	require.NoError(t, err)
	return v
}

// legacyValid checks the older header. No Go library at hand reads it: this is written after GitHub's description of
// X-Hub-Signature-256, apart from the code under test.
func legacyValid(token string, body []byte, value string) bool {
	mac := hmac.New(sha256.New, []byte(token))
	mac.Write(body)
	return hmac.Equal([]byte("sha256="+hex.EncodeToString(mac.Sum(nil))), []byte(value))
}

const olderToken = secretPrefix + "b2xkZXI="

func headersOf(s signatures) http.Header {
	h := http.Header{}
	h.Set("webhook-id", s.id)
	h.Set("webhook-timestamp", s.timestamp)
	h.Set("webhook-signature", s.v1)
	return h
}

func TestSign(t *testing.T) {
	t.Parallel()
	whsec := "whsec_" + base64.StdEncoding.EncodeToString([]byte("\x00\xff 32 bytes of no particular kind"))
	for name, c := range map[string]struct {
		token string
		raw   bool
	}{
		"raw":                        {"any token, é", true},
		"whsec":                      {whsec, false},
		"whsec that is not base64":   {"whsec_not-base64_", true},
		"whsec without its padding":  {"whsec_YWI", true},
		"longer than a hash's block": {string(make([]byte, 100)) + "x", true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: c.token}, DefaultDefaults())
			require.NoError(t, err)
			m := Encode(nil, FormatStandard, fullEvent(), "src")
			for range 3 { // the states are used again
				s := ep.sign(&m, time.Now())
				assert.Equal(t, eventID, s.id)
				require.NoError(t, verifier(t, c.token, c.raw).Verify(m.Body, headersOf(s)))
				require.Error(t, verifier(t, c.token, c.raw).Verify(append(m.Body, ' '), headersOf(s)))
				assert.True(t, legacyValid(c.token, m.Body, s.legacy))
			}
		})
	}
}

// TestSignKnownAnswer is the example of GitHub's documentation for the older header
// (https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries).
func TestSignKnownAnswer(t *testing.T) {
	t.Parallel()
	const documented = "It's a Secret to Everybody"
	ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: documented}, DefaultDefaults())
	require.NoError(t, err)
	s := ep.sign(&Message{Body: []byte("Hello, World!")}, time.Unix(1, 0))
	assert.Equal(t, "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", s.legacy)
	assert.Equal(t, "1", s.timestamp)
}

func TestSignDuringRotation(t *testing.T) {
	t.Parallel()
	now := time.Now()
	row := EndpointRow{URL: "http://h", SecretToken: testSecret, SecondarySecret: olderToken, SecondarySecretExpires: now.Add(time.Second)}
	ep, err := NewEndpoint(row, DefaultDefaults())
	require.NoError(t, err)
	m := Encode(nil, FormatStandard, fullEvent(), "src")
	before, after := ep.sign(&m, now), ep.sign(&m, now.Add(time.Second))
	for _, s := range []signatures{before, after} {
		require.NoError(t, verifier(t, testSecret, true).VerifyIgnoringTimestamp(m.Body, headersOf(s)))
		assert.True(t, legacyValid(testSecret, m.Body, s.legacy))
	}
	older := verifier(t, olderToken, false)
	require.NoError(t, older.VerifyIgnoringTimestamp(m.Body, headersOf(before)))
	require.Error(t, older.VerifyIgnoringTimestamp(m.Body, headersOf(after)), "still signed when its time had passed")

	row.SecondarySecretExpires = time.Time{}
	ep, err = NewEndpoint(row, DefaultDefaults())
	require.NoError(t, err)
	require.NoError(t, older.VerifyIgnoringTimestamp(m.Body, headersOf(ep.sign(&m, now.AddDate(10, 0, 0)))))
}

func TestSignConcurrently(t *testing.T) {
	t.Parallel()
	ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: olderToken, SecondarySecret: testSecret}, DefaultDefaults())
	require.NoError(t, err)
	m := Encode(nil, FormatStandard, fullEvent(), "src")
	now := time.Now()
	want := ep.sign(&m, now)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				assert.Equal(t, want, ep.sign(&m, now))
			}
		})
	}
	wg.Wait()
}
