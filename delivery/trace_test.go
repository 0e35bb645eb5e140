package delivery

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

const goodParent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

func TestTraceHeaders(t *testing.T) {
	t.Parallel()
	parent := HeaderField{"traceparent", goodParent}
	for name, c := range map[string]struct {
		metadata string
		want     []HeaderField
	}{
		"none":                   {`{"user": "a"}`, nil},
		"empty":                  {``, nil},
		"not an object":          {`["traceparent"]`, nil},
		"not JSON":               {`{"traceparent": "` + goodParent + `"`, nil},
		"a number":               {`{"traceparent": 1}`, nil},
		"nested only":            {`{"http": {"traceparent": "` + goodParent + `"}}`, nil},
		"parent":                 {`{"traceparent": "` + goodParent + `"}`, []HeaderField{parent}},
		"parent and state":       {`{"tracestate": "a=1,b@c=2 3", "traceparent": "` + goodParent + `"}`, []HeaderField{parent, {"tracestate", "a=1,b@c=2 3"}}},
		"state alone":            {`{"tracestate": "a=1"}`, nil},
		"bad state":              {`{"tracestate": "a", "traceparent": "` + goodParent + `"}`, []HeaderField{parent}},
		"state of another type":  {`{"tracestate": {"a": 1}, "traceparent": "` + goodParent + `"}`, []HeaderField{parent}},
		"line break in state":    {`{"tracestate": "a=1\r\nX: y", "traceparent": "` + goodParent + `"}`, []HeaderField{parent}},
		"line break after":       {`{"traceparent": "` + goodParent + `\r\nX: y"}`, nil},
		"upper case":             {`{"traceparent": "` + strings.ToUpper(goodParent) + `"}`, nil},
		"version ff":             {`{"traceparent": "ff` + goodParent[2:] + `"}`, nil},
		"a later version":        {`{"traceparent": "01` + goodParent[2:] + `"}`, []HeaderField{{"traceparent", "01" + goodParent[2:]}}},
		"trace id of zeros":      {`{"traceparent": "00-00000000000000000000000000000000-b7ad6b7169203331-01"}`, nil},
		"parent id of zeros":     {`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"}`, nil},
		"hyphens in wrong place": {`{"traceparent": "00-0af7651916cd43dd8448eb211c80319-cb7ad6b7169203331-01"}`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			assert.Equal(t, c.want, traceHeaders([]byte(c.metadata)))
		})
	}
}

func TestTraced(t *testing.T) {
	t.Parallel()
	m := &Message{ID: outbox.UUID{1}, Body: []byte("{}"), ContentType: contentTypeJSON, Header: []HeaderField{
		{"ce-id", "1"}, {"traceparent", goodParent}, {"tracestate", "a=1"},
	}}
	other := HeaderField{"traceparent", strings.Replace(goodParent, "b7", "b8", 1)}
	traced := m.Traced([]HeaderField{other})
	assert.Equal(t, []HeaderField{other, {"ce-id", "1"}}, traced.Header, "the state belongs to the parent")
	assert.Equal(t, m.Body, traced.Body)
	assert.Equal(t, m.ID, traced.ID)
	assert.Equal(t, goodParent, m.Header[1].Value, "the message is as it was")
}

func TestValidTracestate(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]bool{
		"a=1": true, "a=1, b=2": true, "a=1,,b=2": true, "tenant@sys/x*y_z-0=!~": true,
		"": false, "A=1": false, "=1": false, "a=": false, "a=b=c": false, "a=é": false, "a=\x7f": false,
		strings.Repeat("a=1,", 32) + "a=1":         false,
		"a=" + strings.Repeat("x", 257):            false,
		"a=" + strings.Repeat("x", 256):            true,
		strings.Repeat("a", 257) + "=1":            false,
		strings.Repeat("a=xxxxxxxxxxxxx,", 31):     true,
		strings.Repeat("a=xxxxxxxxxxxxxxxxx,", 31): false, // more than 512 bytes
	} {
		assert.Equal(t, want, validTracestate(s), "%q", s)
	}
}

func FuzzTraceHeaders(f *testing.F) {
	f.Add(goodParent, "a=1,b=2")
	f.Add("\r\n", "a=1\r\n")
	f.Fuzz(func(t *testing.T, parent, state string) {
		metadata, err := json.Marshal(map[string]string{"traceparent": parent, "tracestate": state})
		require.NoError(t, err)
		for _, h := range traceHeaders(metadata) {
			require.True(t, validHeaderValue(h.Value), "%q", h)
			require.LessOrEqual(t, len(h.Value), maxTracestateLen)
			require.Contains(t, []string{parent, state}, h.Value)
		}
	})
}
