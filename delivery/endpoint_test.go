package delivery

import (
	"fmt"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

func TestNewEndpoint(t *testing.T) {
	t.Parallel()
	ep, err := NewEndpoint(EndpointRow{
		ID: outbox.UUID{7}, URL: "https://" + testSecret + "@hooks.example:8443/a%2Fb?key=1#top", Method: "PUT", SecretToken: testSecret,
		CustomHeaders: []byte(`{"x-team": "a", "Authorization": "Bearer t"}`), TimeoutSeconds: 7, MaxRetryAttempts: 0, BackoffSeconds: 9,
		BackoffMultiplier: 1.5, Active: true, Verified: true, PayloadFormat: "neo", Order: "aggregate", MaxConcurrency: 3, RatePerSecond: 0.5,
	}, testDefaults())
	require.NoError(t, err)
	assert.Equal(t, "https://hooks.example:8443/a%2Fb", ep.URL)
	assert.Equal(t, "PUT", ep.Method)
	assert.Equal(t, FormatNeo, ep.Format)
	assert.Equal(t, OrderAggregate, ep.Order)
	assert.True(t, ep.Active && ep.Verified)
	assert.Equal(t, 7*time.Second, ep.Timeout)
	assert.Equal(t, 0, ep.MaxRetries)
	assert.Equal(t, Backoff{First: 9 * time.Second, Max: time.Hour, Multiplier: 1.5}, ep.Retry)
	assert.Equal(t, 3, ep.Concurrency)
	assert.InDelta(t, 0.5, ep.Rate, 0)
	assert.Equal(t, []field{{"Authorization", []string{"Bearer t"}}, {"X-Team", []string{"a"}}}, ep.custom)
}

func TestNewEndpointDefaults(t *testing.T) {
	t.Parallel()
	d := testDefaults()
	d.Concurrency, d.Rate = 10, 20
	ep, err := NewEndpoint(EndpointRow{URL: "http://[2001:db8::1]:/x", SecretToken: "s", MaxRetryAttempts: -1}, d)
	require.NoError(t, err)
	assert.Equal(t, "POST", ep.Method)
	assert.Equal(t, "http://[2001:db8::1]/x", ep.URL)
	assert.Equal(t, "X-Webhook-Signature", ep.signatureHeader)
	assert.Equal(t, 30*time.Second, ep.Timeout)
	assert.Equal(t, 5, ep.MaxRetries)
	assert.Equal(t, d.Backoff, ep.Retry)
	assert.Equal(t, 10, ep.Concurrency)
	assert.InDelta(t, 20, ep.Rate, 0)
}

// fieldsOf returns the faulty fields of err, in order.
func fieldsOf(t *testing.T, err error) []string {
	t.Helper()
	joined, ok := err.(interface{ Unwrap() []error })
	require.True(t, ok, "%v", err)
	var names []string
	for _, e := range joined.Unwrap() {
		var fe *FieldError
		require.ErrorAs(t, e, &fe)
		assert.NotEmpty(t, fe.Remedy)
		names = append(names, fe.Field)
	}
	return names
}

func TestNewEndpointReportsAllFaults(t *testing.T) {
	t.Parallel()
	_, err := NewEndpoint(EndpointRow{
		URL: "ftp://" + testSecret + "@host/" + testSecret, Method: "GET", SignatureHeader: "Webhook-Signature", CustomHeaders: []byte(`[]`),
		SecondarySecret: "whsec_", TimeoutSeconds: 301, MaxRetryAttempts: 11, BackoffSeconds: 3601, BackoffMultiplier: 5.1,
		PayloadFormat: "xml", Order: "some", MaxConcurrency: -1, RatePerSecond: math.NaN(),
	}, testDefaults())
	assert.Equal(t, []string{
		"payload_format", "delivery_order", "http_method", "endpoint_url", "signature_header", "custom_headers", "secret_token",
		"secondary_secret_token", "timeout_seconds", "max_retry_attempts", "retry_backoff_seconds", "retry_backoff_multiplier",
		"max_concurrency", "rate_limit_per_second",
	}, fieldsOf(t, err))
	assert.NotContains(t, err.Error(), testSecret)
	require.ErrorContains(t, err, `endpoint_url "ftp://host": the scheme must be http or https`)
}

func TestNewEndpointURLs(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{
		"", "host/path", "//host/x", "http://", "http:///x", "https:host", "http://host:0/", "http://host:65536/", "http://host:x/",
		"javascript:alert(1)", "file:///etc/passwd", "http://ho st/", "http://host/\r\nX: y", "http://%zz/", "http://[::1/", "http://:80/",
		"http://a%2fb/", "http://\u0300a.example/", "http://a\u05d0.example/", "http://a\uff0fb.example/", "http://[\u00fc::1]/", "http://" + strings.Repeat("a", DefaultBounds().MaxURLLength), "\x00", "http://@/", "http://h/?a=b c", "http://h/?\u00fc", "http://h/?a\x7f",
		"https://\u00ad/", "https://\u200b\u00ad:443/",
	} {
		_, err := NewEndpoint(EndpointRow{URL: bad, SecretToken: "s"}, testDefaults())
		require.Error(t, err, bad)
		assert.Equal(t, []string{"endpoint_url"}, fieldsOf(t, err), bad)
	}
	for _, good := range []string{"http://host", "HTTPS://host:1/", "http://127.0.0.1:65535/?a=b", "http://b\u00fccher.example/\u00fc", "http://[::1]:80/", "http://h/a b?c=%20%C3%BC#d e"} {
		_, err := NewEndpoint(EndpointRow{URL: good, SecretToken: "s"}, testDefaults())
		require.NoError(t, err, good)
	}
}

func TestNewEndpointHeaders(t *testing.T) {
	t.Parallel()
	many := make([]string, 51)
	for i := range many {
		many[i] = fmt.Sprintf(`"X-%d": ""`, i)
	}
	for _, bad := range []string{
		`null2`, `"x"`, `{"Host": "evil"}`, `{"content-length": "1"}`, `{"TRANSFER-ENCODING": "chunked"}`, `{"Connection": "close"}`,
		`{"Webhook-Anything": "1"}`, `{"content-type": "a/b"}`, `{"User-Agent": "x"}`, `{"X-Webhook-Signature": "1"}`, `{"x-webhook-signature": "1"}`,
		`{"ce-id": "1"}`, `{"traceparent": "1"}`, `{"Proxy-Authorization": "1"}`, `{"Upgrade": "h2c"}`, `{"Expect": "100-continue"}`, `{"TE": "x"}`,
		`{"Keep-Alive": "x"}`, `{"Trailer": "x"}`,
		`{"": "x"}`, `{"a b": "x"}`, `{"a:": "x"}`, `{"a\r\nb": "x"}`, `{"é": "x"}`, `{"` + strings.Repeat("a", 101) + `": "x"}`,
		`{"X": "planted-secret-value\r\nY: z"}`, `{"X": "planted-secret-value\u0000"}`, `{"X": "planted-secret-value\n"}`, `{"X": 1}`, `{"X": null}`, `{"X": ["planted-secret-value"]}`,
		`{"X": "1", "x": "2"}`, `{"X": "` + strings.Repeat("a", 9000) + `"}`, `{` + strings.Join(many, ",") + `}`,
	} {
		_, err := NewEndpoint(EndpointRow{URL: "http://host", SecretToken: "s", CustomHeaders: []byte(bad)}, testDefaults())
		require.Error(t, err, bad)
		assert.Equal(t, []string{"custom_headers"}, fieldsOf(t, err), bad)
		assert.NotContains(t, err.Error(), testSecret)
	}
	for _, good := range []string{``, `null`, `{}`, `{"X": ""}`, `{"X": "é\t"}`, `{"Authorization": "Basic x", "Cookie": "a=b"}`} {
		_, err := NewEndpoint(EndpointRow{URL: "http://host", SecretToken: "s", CustomHeaders: []byte(good)}, testDefaults())
		require.NoError(t, err, good)
	}
	for _, bad := range []string{"Host", "a b", "content-type", "X\r\nY", "webhook-signature", "Authorization\x00", strings.Repeat("a", 101)} {
		_, err := NewEndpoint(EndpointRow{URL: "http://host", SecretToken: "s", SignatureHeader: bad}, testDefaults())
		require.Error(t, err, bad)
		assert.Equal(t, []string{"signature_header"}, fieldsOf(t, err), bad)
	}
}

func TestEndpointPrintsNoSecret(t *testing.T) {
	t.Parallel()
	row := EndpointRow{
		URL: "https://" + testSecret + ":" + testSecret + "@h/?" + testSecret, SecretToken: testSecret, SecondarySecret: testSecret,
		CustomHeaders: []byte(`{"Authorization": "` + testSecret + `"}`),
	}
	ep, err := NewEndpoint(row, testDefaults())
	require.NoError(t, err)
	for _, v := range []any{row, &row, ep, []EndpointRow{row}, struct{ R EndpointRow }{row}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
			assert.NotContains(t, fmt.Sprintf(verb, v), testSecret, verb)
		}
	}
	assert.NotContains(t, row.LogValue().String()+ep.LogValue().String()+ep.URL, testSecret)
}

func FuzzNewEndpoint(f *testing.F) {
	f.Add("https://host/x", "POST", "whsec_c2VjcmV0", "X-Sig", []byte(`{"X": "y"}`), int32(30), 2.0)
	f.Add("://", "", "", "", []byte(`{"a": {}}`), int32(-1), math.Inf(-1))
	f.Fuzz(func(t *testing.T, url, method, secret, header string, custom []byte, n int32, x float64) {
		ep, err := NewEndpoint(EndpointRow{
			URL: url, Method: method, SecretToken: secret, SecondarySecret: secret, SignatureHeader: header, CustomHeaders: custom,
			TimeoutSeconds: n, MaxRetryAttempts: n, BackoffSeconds: n, BackoffMultiplier: x, MaxConcurrency: n, RatePerSecond: x,
		}, testDefaults())
		if err != nil {
			require.Nil(t, ep)
			require.NotEmpty(t, fieldsOf(t, err))
			return
		}
		require.Positive(t, ep.Timeout)
		require.GreaterOrEqual(t, ep.Retry.Multiplier, 1.0)
		m := Encode(nil, ep.Format, testEvent(), "src")
		c := &Client{}
		for name, values := range c.header(ep, &m, 1, ep.sign(&m, time.Unix(0, 0))) {
			require.True(t, validHeaderName(name), "%q", name)
			for _, v := range values {
				require.True(t, validHeaderValue(v), "%q", v)
			}
		}
	})
}

func TestConfigReportsAllFaults(t *testing.T) {
	t.Parallel()
	good := testConfig()
	require.NoError(t, good.Validate())
	bad := Config{DNSCacheTime: -1, KeepResponseBytes: maxResponseBytes + 1, Allow: make([]netip.Prefix, 1), Deny: make([]netip.Prefix, 1)}
	assert.Len(t, fieldsOf(t, bad.Validate()), 11)
	pairs := testConfig()
	pairs.MaxConns, pairs.MaxConnsPerHost = 1, 2
	assert.Len(t, fieldsOf(t, pairs.Validate()), 1)
	pairs.MaxConns = 0
	assert.Len(t, fieldsOf(t, pairs.Validate()), 1, "of what is 0, and not of what is above it")
	_, err := NewClient(bad, nil, nil)
	var fe *FieldError
	require.ErrorAs(t, err, &fe)
}

// TestConfigSource has what a CloudEvents SDK takes for a URI reference, and what it refuses.
func TestConfigSource(t *testing.T) {
	t.Parallel()
	c := testConfig()
	for _, c.Source = range []string{"outbox-relay", "/shop", "urn:shop:1", "https://shop.example/gr%C3%B6%C3%9Fe?a=b#c", "http://[::1]/"} {
		require.NoError(t, c.Validate(), c.Source)
	}
	for _, c.Source = range []string{"", "my shop", "https://shop.example/gr\u00f6\u00dfe", "%zz", "<shop>", "a|b", `\shop`, "shop\n", "\x7f"} {
		require.ErrorContains(t, c.Validate(), "delivery.source", c.Source)
	}
}
