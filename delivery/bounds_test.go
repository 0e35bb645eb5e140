package delivery

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestBounds has a row that meets every bound exactly, and for each bound one that breaks it by one.
func TestBounds(t *testing.T) {
	t.Parallel()
	const base = "https://example.com/"
	headers := func(n, size int) []byte {
		list := make([]string, n)
		for i := range list {
			list[i] = fmt.Sprintf(`"X-%d": ""`, i)
			size -= len("X-0")
		}
		list[0] = fmt.Sprintf(`"X-0": %q`, strings.Repeat("v", size))
		return []byte("{" + strings.Join(list, ",") + "}")
	}
	d := testDefaults()
	d.Bounds = Bounds{
		MaxURLLength: 40, MaxHeaders: 3, MaxHeadersSize: 20, MinTimeout: 5 * time.Second, MaxTimeout: 60 * time.Second, MaxRetries: 4,
		MinBackoff: 2 * time.Second, MaxBackoff: 100 * time.Second,
	}
	good := func() EndpointRow {
		return EndpointRow{
			URL: base + strings.Repeat("p", 40-len(base)), SecretToken: "s", CustomHeaders: headers(3, 20), TimeoutSeconds: 60, MaxRetryAttempts: 4, BackoffSeconds: 100,
		}
	}
	for name, tc := range map[string]struct {
		change func(*EndpointRow)
		fault  string // empty: none
	}{
		"at most":  {func(*EndpointRow) {}, ""},
		"at least": {func(r *EndpointRow) { r.TimeoutSeconds, r.BackoffSeconds, r.MaxRetryAttempts = 5, 2, 0 }, ""},
		"left open": {func(r *EndpointRow) {
			r.TimeoutSeconds, r.BackoffSeconds, r.MaxRetryAttempts, r.CustomHeaders = 0, 0, -1, nil
		}, ""},
		"URL":               {func(r *EndpointRow) { r.URL += "p" }, "endpoint_url of 41 bytes: at most 40, see validation.max_url_length"},
		"number of headers": {func(r *EndpointRow) { r.CustomHeaders = headers(4, 20) }, "custom_headers with 4 names: at most 3, see validation.max_headers"},
		"size of headers":   {func(r *EndpointRow) { r.CustomHeaders = headers(3, 21) }, "custom_headers of 21 bytes: at most 20 bytes in all, see validation.max_headers_size"},
		"short timeout":     {func(r *EndpointRow) { r.TimeoutSeconds = 4 }, "timeout_seconds 4: use 5 to 60, see validation.min_timeout and max_timeout"},
		"long timeout":      {func(r *EndpointRow) { r.TimeoutSeconds = 61 }, "timeout_seconds 61: use 5 to 60, see validation.min_timeout and max_timeout"},
		"no timeout":        {func(r *EndpointRow) { r.TimeoutSeconds = -1 }, "timeout_seconds -1: use 5 to 60, see validation.min_timeout and max_timeout"},
		"retries":           {func(r *EndpointRow) { r.MaxRetryAttempts = 5 }, "max_retry_attempts 5: use 0 to 4, see validation.max_retries"},
		"short backoff":     {func(r *EndpointRow) { r.BackoffSeconds = 1 }, "retry_backoff_seconds 1: use 2 to 100, see validation.min_backoff and max_backoff"},
		"long backoff":      {func(r *EndpointRow) { r.BackoffSeconds = 101 }, "retry_backoff_seconds 101: use 2 to 100, see validation.min_backoff and max_backoff"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			row := good()
			tc.change(&row)
			_, err := NewEndpoint(row, d)
			if tc.fault == "" {
				require.NoError(t, err)
				return
			}
			require.EqualError(t, err, tc.fault)
		})
	}
	row := good()
	row.TimeoutSeconds, row.URL = 300, base+strings.Repeat("p", 4096-len(base))
	_, err := NewEndpoint(row, Defaults{})
	require.NoError(t, err, "the zero value is that of DefaultBounds")
	row.URL += "p"
	_, err = NewEndpoint(row, Defaults{})
	assert.Equal(t, []string{"endpoint_url"}, fieldsOf(t, err))
}
