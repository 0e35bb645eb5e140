package delivery

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/neo-commons/outbox-relay/outbox"
)

// HeaderField is one request header.
type HeaderField struct{ Name, Value string }

// Message is what an event becomes on the wire, the same for every endpoint of one format and for every attempt. It is not changed
// after Encode or ParseMessage and then safe for concurrent use.
type Message struct {
	// ID is the event's id, sent as webhook-id.
	ID          outbox.UUID
	Body        []byte
	ContentType string
	// Header holds what comes from the event: traceparent, tracestate and, for FormatCloudEventsBinary, the ce- attributes.
	Header []HeaderField
}

// valid tells whether the headers can be sent.
func (m *Message) valid() bool {
	for _, f := range m.Header {
		if !validHeaderName(f.Name) || !validHeaderValue(f.Value) {
			return false
		}
	}
	return validHeaderValue(m.ContentType)
}

// HeaderJSON returns the content type and Header as a JSON object, the form in which a deferred delivery keeps them.
func (m *Message) HeaderJSON() []byte {
	b := append(make([]byte, 0, 256), `{"content-type":`...)
	b = appendString(b, m.ContentType)
	for _, f := range m.Header {
		b = append(b, ',')
		b = appendString(b, f.Name)
		b = append(b, ':')
		b = appendString(b, f.Value)
	}
	return append(b, '}')
}

// SameHeader tells whether HeaderJSON of both is the same.
func (m *Message) SameHeader(other *Message) bool {
	return m == other || m.ContentType == other.ContentType && slices.Equal(m.Header, other.Header)
}

// ParseMessage restores the Message of event id from its body and HeaderJSON. Names that an event does not set are dropped: the row
// may have been written by another dispatcher, or edited. The Message keeps body.
func ParseMessage(id outbox.UUID, body, headerJSON []byte) (Message, error) {
	m := Message{ID: id, Body: body, ContentType: contentTypeJSON}
	if len(headerJSON) == 0 {
		return m, nil
	}
	var stored map[string]any
	if err := json.Unmarshal(headerJSON, &stored); err != nil {
		return Message{}, fmt.Errorf("parse request headers of event %s: %w", id, err)
	}
	for name, v := range stored {
		name = strings.ToLower(name)
		isType := name == "content-type"
		if !isType && !isEventHeader(name) {
			continue
		}
		value, ok := v.(string)
		if !ok || !validHeaderValue(value) {
			return Message{}, fmt.Errorf("parse request headers of event %s: %s is not a valid header value", id, name)
		}
		if isType {
			m.ContentType = value
			continue
		}
		m.Header = append(m.Header, HeaderField{Name: name, Value: value})
	}
	slices.SortFunc(m.Header, func(a, b HeaderField) int { return strings.Compare(a.Name, b.Name) })
	return m, nil
}

// isEventHeader reports whether name, in lower case, is one that Encode writes.
func isEventHeader(name string) bool {
	if attribute, ok := strings.CutPrefix(name, "ce-"); ok {
		return attribute != "" && strings.Trim(attribute, "abcdefghijklmnopqrstuvwxyz0123456789") == ""
	}
	return name == headerTraceparent || name == headerTracestate
}
