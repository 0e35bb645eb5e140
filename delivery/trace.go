package delivery

import (
	"bytes"
	"encoding/json"
	"strings"
)

const (
	headerTraceparent = "traceparent"
	headerTracestate  = "tracestate"

	maxTracestateLen     = 512 // what a vendor must be ready to pass on
	maxTracestateMembers = 32
)

// traceHeaders takes the W3C trace context out of an event's metadata (https://www.w3.org/TR/trace-context/). What is not well formed is
// left out: the application wrote it, and a header must not be what it likes.
func traceHeaders(metadata []byte) []HeaderField {
	if !bytes.Contains(metadata, []byte(`"traceparent"`)) {
		return nil // most events: not worth parsing
	}
	var found struct {
		Traceparent json.RawMessage `json:"traceparent"`
		Tracestate  json.RawMessage `json:"tracestate"`
	}
	if json.Unmarshal(metadata, &found) != nil {
		return nil
	}
	parent := stringOf(found.Traceparent)
	if !validTraceparent(parent) {
		return nil
	}
	fields := []HeaderField{{headerTraceparent, parent}}
	if state := stringOf(found.Tracestate); validTracestate(state) {
		fields = append(fields, HeaderField{headerTracestate, state})
	}
	return fields
}

// Traced returns m with another trace context, made of traceparent and tracestate, for one attempt. Body and other headers are shared.
func (m *Message) Traced(context []HeaderField) *Message {
	traced := *m
	traced.Header = context
	for _, f := range m.Header {
		if f.Name != headerTraceparent && f.Name != headerTracestate {
			traced.Header = append(traced.Header, f)
		}
	}
	return &traced
}

// stringOf returns a JSON string's value, empty if raw is anything else.
func stringOf(raw json.RawMessage) string {
	var s string
	if len(raw) == 0 || json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

// validTraceparent reports whether s is version-traceid-parentid-flags, in lower-case hexadecimal. Later versions may be longer; they are
// passed on only in the form that version 00 has.
func validTraceparent(s string) bool {
	if len(s) != 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return false
	}
	version, traceID, parentID, flags := s[:2], s[3:35], s[36:52], s[53:]
	return isHex(version) && version != "ff" &&
		isHex(traceID) && isHex(parentID) && isHex(flags) &&
		strings.Trim(traceID, "0") != "" && strings.Trim(parentID, "0") != ""
}

// validTracestate reports whether s is a list of 1 to 32 key=value members.
func validTracestate(s string) bool {
	if s == "" || len(s) > maxTracestateLen {
		return false
	}
	members := strings.Split(s, ",")
	if len(members) > maxTracestateMembers {
		return false
	}
	for _, m := range members {
		m = strings.Trim(m, " \t")
		if m == "" {
			continue // empty members are allowed
		}
		key, value, ok := strings.Cut(m, "=")
		if !ok || !validTraceKey(key) || value == "" || !validTraceValue(value) {
			return false
		}
	}
	return true
}

func isHex(s string) bool { return strings.Trim(s, "0123456789abcdef") == "" }

func validTraceKey(s string) bool {
	return s != "" && len(s) <= 256 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789_-*/@") == ""
}

func validTraceValue(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' || c == '=' {
			return false
		}
	}
	return len(s) <= 256
}
