package delivery

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// The names of the headers that every attempt carries, spelled as the Standard Webhooks specification does.
const (
	headerID        = "webhook-id"
	headerTimestamp = "webhook-timestamp"
	headerSignature = "webhook-signature"
	headerAttempt   = "webhook-attempt"

	defaultSignatureHeader = "X-Webhook-Signature"
)

const maxHeaderName = 100

// field is a header in the form net/http wants. Attempts share values and never change it.
type field struct {
	name   string
	values []string
}

// parseCustomHeaders reads custom_headers: an object of names and strings. signature is the endpoint's signature header.
func parseCustomHeaders(raw []byte, signature string, b *Bounds, f *faults) []field {
	const column = "custom_headers"
	if len(raw) == 0 {
		return nil
	}
	var stored map[string]any
	if err := json.Unmarshal(raw, &stored); err != nil {
		f.add(column, "(hidden)", `must be a JSON object of names and strings, such as {"X-Team": "billing"}`)
		return nil
	}
	if len(stored) > b.MaxHeaders {
		f.add(column, fmt.Sprintf("with %d names", len(stored)), fmt.Sprintf("at most %d, see validation.max_headers", b.MaxHeaders))
	}
	seen := map[string]bool{}
	fields := make([]field, 0, len(stored))
	size := 0
	for name, v := range stored {
		quoted := fmt.Sprintf("%.60q", name)
		value, ok := v.(string)
		canonical := http.CanonicalHeaderKey(name)
		switch {
		case !validHeaderName(name):
			f.add(column, quoted, "is not a header name: letters, digits and hyphens, at most 100")
		case isReserved(name) || canonical == http.CanonicalHeaderKey(signature):
			f.add(column, quoted, "is set by the relay or belongs to the connection: remove it")
		case seen[canonical]:
			f.add(column, quoted, "is there twice in different case: keep one")
		case !ok:
			f.add(column, quoted, "the value must be a JSON string")
		case !validHeaderValue(value):
			f.add(column, quoted, "the value must not hold line breaks or other control characters")
		}
		seen[canonical] = true
		size += len(name) + len(value)
		fields = append(fields, field{name: canonical, values: []string{value}})
	}
	if size > b.MaxHeadersSize {
		f.add(column, fmt.Sprintf("of %d bytes", size), fmt.Sprintf("at most %d bytes in all, see validation.max_headers_size", b.MaxHeadersSize))
	}
	slices.SortFunc(fields, func(a, b field) int { return strings.Compare(a.name, b.name) })
	return fields
}

// isReserved reports whether an endpoint may not set the header: those the relay sets itself, those of one connection
// (RFC 9110, section 7.6.1) and those that would change what the request means to the HTTP stack.
func isReserved(name string) bool {
	name = strings.ToLower(name)
	switch name {
	case "host", "content-length", "content-type", "content-encoding", "user-agent", "expect", headerTraceparent, headerTracestate,
		"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings":
		return true
	}
	return strings.HasPrefix(name, "webhook-") || strings.HasPrefix(name, "ce-") || strings.HasPrefix(name, "proxy-")
}

// validHeaderName reports whether s is a token (RFC 9110, section 5.6.2) of a sensible length.
func validHeaderName(s string) bool {
	if s == "" || len(s) > maxHeaderName {
		return false
	}
	for _, c := range []byte(s) {
		letter := c|0x20 >= 'a' && c|0x20 <= 'z'
		if !letter && (c < '0' || c > '9') && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return true
}

// validHeaderValue reports whether s can stand in a header: no line break, no control character but the tab.
func validHeaderValue(s string) bool {
	for _, c := range []byte(s) {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}
