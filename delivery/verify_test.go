package delivery

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// challengeOf finds the challenge as a receiver of the format does.
func challengeOf(t *testing.T, f Format, body []byte) string {
	t.Helper()
	var event map[string]any
	require.NoError(t, json.Unmarshal(body, &event))
	switch f {
	case FormatNeo:
		event, _ = event["event_data"].(map[string]any)
	case FormatStandard, FormatCloudEvents:
		event, _ = event["data"].(map[string]any)
	case FormatCloudEventsBinary, FormatRaw:
	}
	challenge, _ := event["challenge"].(string)
	require.Len(t, challenge, 26)
	return challenge
}

func TestVerifyByChallenge(t *testing.T) {
	t.Parallel()
	var format Format
	var answer func(w http.ResponseWriter, challenge string, body []byte)
	seen := map[string]bool{}
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if !assert.NoError(t, err) {
			return
		}
		assert.Equal(t, "PUT", r.Method)
		assert.Equal(t, "billing", r.Header.Get("X-Team"))
		assert.NoError(t, verifier(t, testSecret, true).Verify(body, r.Header))
		challenge := challengeOf(t, format, body)
		assert.False(t, seen[challenge], "no challenge comes twice")
		seen[challenge] = true
		answer(w, challenge, body)
	})
	b := setup(t, func(c *Config) { c.KeepResponseBytes = 10 })
	verify := func() Verification {
		ep := b.endpoint(s.URL+"/hook?key=s3cret", func(r *EndpointRow) {
			r.PayloadFormat, r.Method, r.Active, r.CustomHeaders = format.String(), "PUT", false, []byte(`{"X-Team": "billing"}`)
		})
		return b.client.Verify(t.Context(), ep, VerifyChallenge, "/src")
	}
	text := func(status int, format string) func(w http.ResponseWriter, challenge string, _ []byte) {
		return func(w http.ResponseWriter, challenge string, _ []byte) {
			w.WriteHeader(status)
			_, _ = fmt.Fprintf(w, format, challenge)
		}
	}
	for format = range Format(Formats) {
		for _, good := range []string{`{"challenge": %q}`, ` {"ok":true,"challenge":%q} `, "%s", "%s\n", "%q"} {
			answer = text(http.StatusAccepted, good)
			v := verify()
			assert.True(t, v.OK, "%s %s: %s", format, good, v.Reason)
			assert.Empty(t, v.Reason)
			assert.Nil(t, v.Result.Body)
		}
		answer = func(w http.ResponseWriter, _ string, body []byte) { _, _ = w.Write(body) }
		assert.False(t, verify().OK, "%s: a mirror", format)
		answer = func(w http.ResponseWriter, _ string, body []byte) {
			_, _ = w.Write(bytes.ReplaceAll(append(body, '\n'), []byte(": "), []byte(":")))
		}
		assert.False(t, verify().OK, "%s: one that prints it anew", format)
	}
	format = FormatStandard
	const unanswered = "answered 200, but did not send the challenge back"
	for bad, want := range map[string]string{
		"": unanswered, "ok%.0s": unanswered, `{"challenge": "other%.3s"}`: unanswered, `{"data": {"challenge": %q}}`: unanswered, "[%q]": unanswered,
		`{"challenge": ["%s"]}`: unanswered, "%s%[1]s": unanswered, strings.Repeat(" ", 20_000) + "%s": unanswered,
	} {
		answer = text(http.StatusOK, bad)
		v := verify()
		assert.False(t, v.OK, bad)
		assert.Equal(t, want, v.Reason, bad)
		assert.LessOrEqual(t, len(v.Result.Body), 10)
	}
	answer = text(http.StatusNotFound, "%s")
	v := verify()
	assert.False(t, v.OK)
	assert.Equal(t, "answered 404", v.Reason)
	assert.Equal(t, Class4xx, v.Result.Class)
	for _, c := range b.m.attempts {
		assert.Zero(t, b.count(c), "it is no attempt")
	}
}

func TestVerifyByHead(t *testing.T) {
	t.Parallel()
	status := http.StatusNoContent
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		assert.NoError(t, err)
		assert.Empty(t, body)
		assert.Equal(t, "HEAD", r.Method)
		assert.Equal(t, "/hook?key=s3cret", r.RequestURI)
		assert.Empty(t, r.TransferEncoding)
		assert.NoError(t, verifier(t, testSecret, true).Verify(nil, r.Header))
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
	})
	b := setup(t)
	ep := b.endpoint(s.URL + "/hook?key=s3cret")
	verify := func() Verification { return b.client.Verify(t.Context(), ep, VerifyHead, "/src") }
	assert.True(t, verify().OK)
	for status = range map[int]bool{301: true, 404: true, 405: true, 410: true, 500: true} {
		v := verify()
		assert.False(t, v.OK)
		assert.Contains(t, v.Reason, fmt.Sprintf("answered %d", status))
	}
	assert.True(t, func() bool { status = 200; return verify().OK }())
	assert.Equal(t, "POST", ep.Method, "the endpoint is as it was")
	assert.True(t, b.attemptStays(t, ep))
}

// attemptStays tells whether the endpoint is still one that http1 delivers to.
func (b *bundle) attemptStays(t *testing.T, ep *Endpoint) bool {
	t.Helper()
	return (b.client.small(ep, &Message{}) != nil) == canLook
}

// TestVerifyIsGuarded: what is not to be delivered to is not asked either.
func TestVerifyIsGuarded(t *testing.T) {
	t.Parallel()
	s := serve(t, func(http.ResponseWriter, *http.Request) { assert.Fail(t, "it was asked") })
	for _, change := range []func(*Config){
		func(c *Config) { c.Allow = nil },
		func(c *Config) { c.Deny = c.Allow },
		func(c *Config) { c.HTTPSOnly = true },
		func(c *Config) { c.Ports = []int{443} },
		func(c *Config) { c.AllowHosts = []string{"example.com"} },
	} {
		b := setup(t, change)
		for _, how := range []string{VerifyHead, VerifyChallenge} {
			v := b.client.Verify(t.Context(), b.endpoint(s.URL), how, "/src")
			assert.False(t, v.OK)
			assert.Equal(t, ClassDenied, v.Result.Class)
			assert.NotEmpty(t, v.Reason)
		}
	}
}

func TestVerifiedForOneURL(t *testing.T) {
	t.Parallel()
	const url = "https://example.com/hook?key=1"
	for _, tc := range []struct {
		verified, oneURL bool
		of               []byte
		want             bool
	}{
		{verified: true, oneURL: true, of: HashURL(url), want: true},
		{verified: true, oneURL: true, of: HashURL("https://example.com/hook?key=2"), want: false},
		{verified: true, oneURL: true, want: true},
		{verified: true, of: HashURL("https://example.com/hook?key=2"), want: true},
		{oneURL: true, of: HashURL(url), want: false},
	} {
		ep, err := NewEndpoint(EndpointRow{URL: url, SecretToken: testSecret, Verified: tc.verified, VerifiedFor: tc.of}, Defaults{OneURL: tc.oneURL})
		require.NoError(t, err)
		assert.Equal(t, tc.want, ep.Verified, "%+v", tc)
	}
}
