package delivery

import (
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"strings"
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
			ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: c.token}, testDefaults())
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
	ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: documented}, testDefaults())
	require.NoError(t, err)
	s := ep.sign(&Message{Body: []byte("Hello, World!")}, time.Unix(1, 0))
	assert.Equal(t, "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17", s.legacy)
	assert.Equal(t, "1", s.timestamp)
}

func TestSignDuringRotation(t *testing.T) {
	t.Parallel()
	now := time.Now()
	row := EndpointRow{URL: "http://h", SecretToken: testSecret, SecondarySecret: olderToken, SecondarySecretExpires: now.Add(time.Second)}
	ep, err := NewEndpoint(row, testDefaults())
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
	ep, err = NewEndpoint(row, testDefaults())
	require.NoError(t, err)
	require.NoError(t, older.VerifyIgnoringTimestamp(m.Body, headersOf(ep.sign(&m, now.AddDate(10, 0, 0)))))
}

// verifyAsymmetric checks webhook-signature as its specification says: one of its signatures is v1a, of {id}.{timestamp}.{body}. No library at hand
// reads v1a.
func verifyAsymmetric(public ed25519.PublicKey, body []byte, h http.Header) bool {
	signed := []byte(h.Get("webhook-id") + "." + h.Get("webhook-timestamp") + "." + string(body))
	for one := range strings.SplitSeq(h.Get("webhook-signature"), " ") {
		encoded, ok := strings.CutPrefix(one, "v1a,")
		signature, err := base64.StdEncoding.DecodeString(encoded)
		if ok && err == nil && ed25519.Verify(public, signed, signature) {
			return true
		}
	}
	return false
}

// The first key of RFC 8032, section 7.1, as seed and public key.
const (
	rfcSeed   = "nWGxne/9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="
	rfcPublic = "11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="
)

func asymmetric(t *testing.T) (seed, full string, public ed25519.PublicKey) {
	t.Helper()
	secret, err := base64.StdEncoding.DecodeString(rfcSeed)
	require.NoError(t, err)
	public, err = base64.StdEncoding.DecodeString(rfcPublic)
	require.NoError(t, err)
	return privatePrefix + rfcSeed, privatePrefix + base64.StdEncoding.EncodeToString(append(secret, public...)), public
}

func TestSignAsymmetric(t *testing.T) {
	t.Parallel()
	seed, full, public := asymmetric(t)
	for _, token := range []string{seed, full} {
		ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: token, SignatureHeader: "X-Sig"}, testDefaults())
		require.NoError(t, err)
		m := Encode(nil, FormatStandard, fullEvent(), "src")
		for range 3 {
			s := ep.sign(&m, time.Now())
			assert.True(t, verifyAsymmetric(public, m.Body, headersOf(s)), s.v1)
			assert.False(t, verifyAsymmetric(public, append(m.Body, ' '), headersOf(s)))
			assert.Empty(t, s.legacy)
			h := (&Client{}).header(ep, &m, 1, s)
			assert.NotContains(t, h, "X-Sig", "there is no secret to make it with")
			assert.Contains(t, h, headerSignature)
		}
	}
}

func TestSignDuringRotationOfBothKinds(t *testing.T) {
	t.Parallel()
	seed, _, public := asymmetric(t)
	m := Encode(nil, FormatStandard, fullEvent(), "src")
	for _, row := range []EndpointRow{{SecretToken: seed, SecondarySecret: olderToken}, {SecretToken: olderToken, SecondarySecret: seed}} {
		row.URL = "http://h"
		ep, err := NewEndpoint(row, testDefaults())
		require.NoError(t, err)
		s := ep.sign(&m, time.Now())
		require.NoError(t, verifier(t, olderToken, false).Verify(m.Body, headersOf(s)), "the official verifier passes v1a by")
		assert.True(t, verifyAsymmetric(public, m.Body, headersOf(s)), s.v1)
		assert.Equal(t, row.SecretToken == olderToken, legacyValid(olderToken, m.Body, s.legacy), "it is the primary token's")
	}
}

func TestKeysThatCannotSign(t *testing.T) {
	t.Parallel()
	_, full, _ := asymmetric(t)
	for token, want := range map[string]string{
		"":                                  "must not be empty: use whsec_",
		"whsec_":                            "must not be empty",
		publicPrefix + rfcPublic:            "is a public key, which is for the receiver: use the private one, whsk_",
		privatePrefix:                       "is no private key of ed25519: use whsk_ and its seed of 32 bytes",
		privatePrefix + "planted-secret":    "is no private key",
		privatePrefix + rfcSeed[:40]:        "is no private key",
		strings.TrimSuffix(full, "=="):      "is no private key",
		privatePrefix + rfcPublic + rfcSeed: "is no private key",
		full[:60] + "AAAA" + full[64:]:      "is no private key",
	} {
		for _, row := range []EndpointRow{{SecretToken: token}, {SecretToken: "s", SecondarySecret: token}} {
			if row.SecondarySecret == "" && row.SecretToken == "s" {
				continue // there is none
			}
			row.URL = "http://h"
			_, err := NewEndpoint(row, testDefaults())
			require.ErrorContains(t, err, "secret_token (hidden): "+want, token)
			assert.NotContains(t, err.Error(), "planted")
		}
	}
}

func TestSignConcurrently(t *testing.T) {
	t.Parallel()
	ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: olderToken, SecondarySecret: testSecret}, testDefaults())
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
