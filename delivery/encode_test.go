package delivery

import (
	"encoding/json"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

const (
	eventID     = "019f0000-0000-0000-0000-000000000001"
	aggregateID = "02000000-0000-0000-0000-000000000002"
)

// oddData is what a parser and printer would change: key order, a big number, trailing zeros, escapes, unusual characters.
const oddData = `{"b": 1, "a": 12345678901234567890.10, "e": 1e400, "s": "\u2028<&>\ud83d\ude00 ` + "\u00e9\u2028\U0001F600\uFFFD" + `", "n": {"": []}}`

func fullEvent() *outbox.Event {
	e := testEvent()
	e.Name = `Order "created"` + "\n"
	e.Data = json.RawMessage(oddData)
	e.CorrelationID, e.CausationID, e.ContextID = outbox.UUID{3}, outbox.UUID{4}, outbox.UUID{5}
	e.TriggeredByUserID = outbox.UUID{6}
	e.Metadata = json.RawMessage(`{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`)
	return e
}

// assertBody compares byte for byte: two documents that mean the same are not the same to a signature.
func assertBody(t *testing.T, want string, m Message) {
	t.Helper()
	assert.Equal(t, want, string(m.Body))
}

func TestEncodeStandard(t *testing.T) {
	t.Parallel()
	m := Encode(nil, FormatStandard, fullEvent(), "src")
	assertBody(t, `{"id":"`+eventID+`","type":"order.created","timestamp":"2024-05-06T05:08:09.123456Z","data":`+oddData+
		`,"name":"Order \"created\"\u000a","aggregate":{"id":"`+aggregateID+`","type":"order","version":3}`+
		`,"correlation_id":"03000000-0000-0000-0000-000000000000","causation_id":"04000000-0000-0000-0000-000000000000"`+
		`,"context_id":"05000000-0000-0000-0000-000000000000","metadata":`+string(fullEvent().Metadata)+`}`, m)
	assert.Equal(t, "application/json", m.ContentType)
	assert.Equal(t, []HeaderField{{"traceparent", goodParent}}, m.Header)

	bare := Encode(nil, FormatStandard, &outbox.Event{Type: "a.b", OccurredAt: time.Unix(0, 0)}, "")
	assertBody(t, `{"id":"00000000-0000-0000-0000-000000000000","type":"a.b","timestamp":"1970-01-01T00:00:00.000000Z","data":{}}`, bare)
	assert.Empty(t, bare.Header)
}

func TestEncodeNeo(t *testing.T) {
	t.Parallel()
	m := Encode(nil, FormatNeo, fullEvent(), "src")
	assertBody(t, `{"event_id":"`+eventID+`","event_type":"order.created","event_name":"Order \"created\"\u000a","event_data":`+oddData+
		`,"event_metadata":`+string(fullEvent().Metadata)+
		`,"occurred_at":"2024-05-06T05:08:09.123456Z","context_id":"05000000-0000-0000-0000-000000000000"}`, m)

	m = Encode(nil, FormatNeo, testEvent(), "src")
	assertBody(t, `{"event_id":"`+eventID+`","event_type":"order.created","event_name":null,"event_data":{"a": 1},"event_metadata":{},`+
		`"occurred_at":"2024-05-06T05:08:09.123456Z","context_id":null}`, m)
}

func TestEncodeCloudEvents(t *testing.T) {
	t.Parallel()
	m := Encode(nil, FormatCloudEvents, fullEvent(), "https://shop.example/é")
	assertBody(t, `{"specversion":"1.0","id":"`+eventID+`","source":"https://shop.example/é","type":"order.created","subject":"`+aggregateID+
		`","time":"2024-05-06T05:08:09.123456Z","datacontenttype":"application/json","data":`+oddData+`}`, m)
	assert.Equal(t, "application/cloudevents+json", m.ContentType)

	e := fullEvent()
	e.Type = "bestellung.größe 100%"
	m = Encode(nil, FormatCloudEventsBinary, e, "/shop")
	assertBody(t, oddData, m)
	assert.Equal(t, "application/json", m.ContentType)
	assert.Equal(t, []HeaderField{
		{"traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
		{"ce-specversion", "1.0"},
		{"ce-id", eventID},
		{"ce-source", "/shop"},
		{"ce-type", "bestellung.gr%C3%B6%C3%9Fe%20100%25"},
		{"ce-time", "2024-05-06T05:08:09.123456Z"},
		{"ce-subject", aggregateID},
	}, m.Header)
}

func TestEncodeRawAppends(t *testing.T) {
	t.Parallel()
	first := Encode(nil, FormatRaw, fullEvent(), "src")
	assertBody(t, oddData, first)

	buf := make([]byte, 0, 4096)
	a := Encode(buf, FormatRaw, fullEvent(), "src")
	b := Encode(buf[:len(a.Body)], FormatNeo, testEvent(), "src")
	assertBody(t, oddData, a)
	_ = append(a.Body, "xx"...)
	assert.Equal(t, byte('{'), b.Body[0], "appending to the first body overwrote the second")
}

func TestFormatNames(t *testing.T) {
	t.Parallel()
	for f := range Format(Formats) {
		parsed, err := parseFormat(f.String())
		require.NoError(t, err)
		assert.Equal(t, f, parsed)
	}
	_, err := parseFormat("xml")
	require.ErrorContains(t, err, `"xml"`)
	f, err := parseFormat("")
	require.NoError(t, err)
	assert.Equal(t, FormatStandard, f)
}

func TestAppendString(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"":                        `""`,
		"plain":                   `"plain"`,
		"a\"b\\c":                 `"a\"b\\c"`,
		"\x00\x1f\n\t\x7f":        `"\u0000\u001f\u000a\u0009` + "\x7f" + `"`,
		"é\u2028\U0001F600\uFFFD": "\"é\u2028\U0001F600\uFFFD\"",
		"x\xffy\xc3":              `"x\ufffdy\ufffd"`,
		"</script>&":              `"</script>&"`,
	} {
		assert.Equal(t, want, string(appendString(nil, in)))
	}
}

func FuzzEncode(f *testing.F) {
	f.Add("order.created", "name", `{"a": 1}`, `{}`, "/src", int64(0))
	f.Add("a\x00\xff\"", "\\", oddData, `{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}`, "é", int64(1e18))
	f.Fuzz(func(t *testing.T, typ, name, data, metadata, source string, at int64) {
		if !json.Valid([]byte(data)) || !json.Valid([]byte(metadata)) {
			return
		}
		e := testEvent()
		e.Type, e.Name, e.Data, e.Metadata, e.OccurredAt = typ, name, json.RawMessage(data), json.RawMessage(metadata), time.Unix(at/1e9, at%1e9)
		for format := range Format(Formats) {
			m := Encode(nil, format, e, source)
			require.True(t, json.Valid(m.Body), "%s: %s", format, m.Body)
			require.Contains(t, string(m.Body), data)
			for _, h := range m.Header {
				require.True(t, validHeaderName(h.Name) && validHeaderValue(h.Value), "%s: %q", format, h)
			}
			back, err := ParseMessage(m.ID, m.Body, m.HeaderJSON())
			require.NoError(t, err)
			require.ElementsMatch(t, m.Header, back.Header)
		}
		var s struct{ Type string }
		require.NoError(t, json.Unmarshal(Encode(nil, FormatStandard, e, source).Body, &s))
		if utf8.ValidString(typ) {
			require.Equal(t, typ, s.Type)
		}
	})
}
