package delivery

import (
	"fmt"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Format is an endpoint's payload_format: the shape of the body.
type Format uint8

// The formats. The zero value is the default.
const (
	FormatStandard Format = iota
	FormatNeo
	FormatCloudEvents
	FormatCloudEventsBinary
	FormatRaw
)

// Formats is the number of formats: every Format is below it.
const Formats = 5

const (
	contentTypeJSON        = "application/json"
	contentTypeCloudEvents = "application/cloudevents+json"

	// timeLayout is RFC 3339 with the microseconds PostgreSQL keeps; the time has to be UTC.
	timeLayout = "2006-01-02T15:04:05.000000Z"
)

func (f Format) String() string {
	switch f {
	case FormatStandard:
		return "standard"
	case FormatNeo:
		return "neo"
	case FormatCloudEvents:
		return "cloudevents"
	case FormatCloudEventsBinary:
		return "cloudevents-binary"
	case FormatRaw:
		return "raw"
	default:
		return "format " + strconv.Itoa(int(f))
	}
}

// parseFormat reads a payload_format. Empty is FormatStandard.
func parseFormat(s string) (Format, error) {
	if s == "" {
		return FormatStandard, nil
	}
	for f := range Format(Formats) {
		if f.String() == s {
			return f, nil
		}
	}
	return 0, fmt.Errorf("unknown payload format %q: want standard, neo, cloudevents, cloudevents-binary or raw", s)
}

// Encode makes the request body of an event, once for all endpoints of the format. Data and Metadata go out byte for byte: they are
// never parsed and printed again. The body is appended to dst and shares its memory, not the event's. source is the CloudEvents
// source attribute.
func Encode(dst []byte, f Format, e *outbox.Event, source string) Message {
	m := Message{ID: e.ID, ContentType: contentTypeJSON, Header: traceHeaders(e.Metadata)}
	start := len(dst)
	dst = slices.Grow(dst, 512+len(e.Data)+len(e.Metadata))
	switch f {
	case FormatNeo:
		dst = appendNeo(dst, e)
	case FormatCloudEvents:
		m.ContentType = contentTypeCloudEvents
		dst = appendCloudEvent(dst, e, source)
	case FormatCloudEventsBinary:
		m.Header = append(m.Header, cloudEventHeaders(e, source)...)
		dst = appendDocument(dst, e.Data)
	case FormatRaw:
		dst = appendDocument(dst, e.Data)
	case FormatStandard:
		dst = appendStandard(dst, e)
	}
	m.Body = dst[start:len(dst):len(dst)]
	return m
}

func appendStandard(b []byte, e *outbox.Event) []byte {
	b = appendUUID(append(b, `{"id":`...), e.ID)
	b = appendString(append(b, `,"type":`...), e.Type)
	b = appendTime(append(b, `,"timestamp":`...), e.OccurredAt)
	b = appendDocument(append(b, `,"data":`...), e.Data)
	if e.Name != "" {
		b = appendString(append(b, `,"name":`...), e.Name)
	}
	if !e.AggregateID.IsZero() {
		b = appendUUID(append(b, `,"aggregate":{"id":`...), e.AggregateID)
		b = appendString(append(b, `,"type":`...), e.AggregateType)
		b = append(b, `,"version":`...)
		b = append(strconv.AppendInt(b, int64(e.AggregateVersion), 10), '}')
	}
	if !e.CorrelationID.IsZero() {
		b = appendUUID(append(b, `,"correlation_id":`...), e.CorrelationID)
	}
	if !e.CausationID.IsZero() {
		b = appendUUID(append(b, `,"causation_id":`...), e.CausationID)
	}
	if !e.ContextID.IsZero() {
		b = appendUUID(append(b, `,"context_id":`...), e.ContextID)
	}
	if len(e.Metadata) > 0 && string(e.Metadata) != "{}" {
		b = append(append(b, `,"metadata":`...), e.Metadata...)
	}
	return append(b, '}')
}

// appendNeo writes the body that neo-commons sends: every key is there, null where the column is.
func appendNeo(b []byte, e *outbox.Event) []byte {
	b = appendUUID(append(b, `{"event_id":`...), e.ID)
	b = appendString(append(b, `,"event_type":`...), e.Type)
	b = append(b, `,"event_name":`...)
	if e.Name == "" {
		b = append(b, "null"...)
	} else {
		b = appendString(b, e.Name)
	}
	b = appendDocument(append(b, `,"event_data":`...), e.Data)
	b = appendDocument(append(b, `,"event_metadata":`...), e.Metadata)
	b = appendTime(append(b, `,"occurred_at":`...), e.OccurredAt)
	b = append(b, `,"context_id":`...)
	if e.ContextID.IsZero() {
		b = append(b, "null"...)
	} else {
		b = appendUUID(b, e.ContextID)
	}
	return append(b, '}')
}

// appendCloudEvent writes the JSON form of CloudEvents 1.0
// (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md).
func appendCloudEvent(b []byte, e *outbox.Event, source string) []byte {
	b = appendUUID(append(b, `{"specversion":"1.0","id":`...), e.ID)
	b = appendString(append(b, `,"source":`...), source)
	b = appendString(append(b, `,"type":`...), e.Type)
	if !e.AggregateID.IsZero() {
		b = appendUUID(append(b, `,"subject":`...), e.AggregateID)
	}
	b = appendTime(append(b, `,"time":`...), e.OccurredAt)
	b = appendDocument(append(b, `,"datacontenttype":"application/json","data":`...), e.Data)
	return append(b, '}')
}

// cloudEventHeaders returns the attributes as the HTTP binding's binary mode sends them; the content type stands for datacontenttype
// (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md#313-metadata-headers).
func cloudEventHeaders(e *outbox.Event, source string) []HeaderField {
	h := []HeaderField{
		{"ce-specversion", "1.0"},
		{"ce-id", e.ID.String()},
		{"ce-source", percentEncode(source)},
		{"ce-type", percentEncode(e.Type)},
		{"ce-time", e.OccurredAt.UTC().Format(timeLayout)},
	}
	if !e.AggregateID.IsZero() {
		h = append(h, HeaderField{"ce-subject", e.AggregateID.String()})
	}
	return h
}

// percentEncode keeps printable ASCII but space, double quote and percent, as section 3.1.3.2 of the HTTP binding wants it.
func percentEncode(s string) string {
	const hexDigits = "0123456789ABCDEF"
	b := make([]byte, 0, len(s)+8)
	for _, c := range []byte(s) {
		if c > ' ' && c < 0x7f && c != '"' && c != '%' {
			b = append(b, c)
			continue
		}
		b = append(b, '%', hexDigits[c>>4], hexDigits[c&15])
	}
	return string(b)
}

// appendDocument writes a jsonb column as it came. An empty one stands for the column's default.
func appendDocument(b, doc []byte) []byte {
	if len(doc) == 0 {
		return append(b, "{}"...)
	}
	return append(b, doc...)
}

func appendUUID(b []byte, id outbox.UUID) []byte {
	b, _ = id.AppendText(append(b, '"')) // its error is always nil
	return append(b, '"')
}

func appendTime(b []byte, t time.Time) []byte {
	return append(t.UTC().AppendFormat(append(b, '"'), timeLayout), '"')
}

// appendString writes s as a JSON string. Only what must be escaped is; a byte that is not UTF-8 becomes U+FFFD.
func appendString(b []byte, s string) []byte {
	const hexDigits = "0123456789abcdef"
	b = append(b, '"')
	done := 0 // s[:done] is written
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, size := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && size == 1 {
				b = append(append(b, s[done:i]...), `\ufffd`...)
				done = i + 1
			}
			i += size
			continue
		}
		if c < ' ' || c == '"' || c == '\\' {
			b = append(b, s[done:i]...)
			if c < ' ' {
				b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
			} else {
				b = append(b, '\\', c)
			}
			done = i + 1
		}
		i++
	}
	return append(append(b, s[done:]...), '"')
}
