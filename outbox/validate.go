package outbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Lengths of the columns of webhook_events, in characters.
const (
	maxType          = 255
	maxName          = 255
	maxAggregateType = 100
)

// FieldError says what is wrong with one field of an Event. It never holds any of the payload.
type FieldError struct {
	Field  string // as in Event, such as "Type"
	Fault  string // what is wrong
	Remedy string // what would do
}

// Error names the field, the fault and the remedy.
func (e *FieldError) Error() string {
	return e.Field + ": " + e.Fault + "; " + e.Remedy
}

// Validate returns every fault of e at once, each a *FieldError, joined. Only what depends on the database's configuration is left
// to it, such as how deeply a document may be nested. Insert and its relatives call Validate themselves. ValidateWithin has the limits
// of the relay besides.
func (e *Event) Validate() error {
	var faults []error
	report := func(field, fault, remedy string) {
		if fault != "" {
			faults = append(faults, &FieldError{Field: field, Fault: fault, Remedy: remedy})
		}
	}

	report("Type", typeFault(e.Type), typeRemedy)
	report("Name", textFault(e.Name, maxName), "shorten or clean the text, or leave it empty")
	if e.AggregateID.IsZero() {
		report("AggregateID", "is missing", "set the id of what the event is about")
	}
	if e.AggregateType == "" {
		report("AggregateType", "is missing", "set the kind of thing AggregateID names, such as order")
	}
	report("AggregateType", textFault(e.AggregateType, maxAggregateType), "shorten or clean the text")
	if e.AggregateVersion < 0 {
		report("AggregateVersion", "is negative", "count from 1, or leave it zero for 1")
	}
	report("Data", jsonFault(e.Data), "set a JSON document that jsonb can hold, or leave it empty for {}")
	report("Metadata", metadataFault(e.Metadata), "set a JSON object that jsonb can hold, or leave it empty for {}")
	if year := e.OccurredAt.UTC().Year(); year < 1 || year > 9999 {
		report("OccurredAt", "is in the year "+strconv.Itoa(year), "use a time between the years 1 and 9999, or the zero time for now")
	}
	return errors.Join(faults...)
}

const typeRemedy = "use two or more segments of a-z, 0-9, _ and - joined by dots, such as order.created"

func typeFault(s string) string {
	switch {
	case s == "":
		return "is missing"
	case len(s) > maxType:
		return fmt.Sprintf("has %d characters, more than %d", len(s), maxType)
	case !strings.Contains(s, "."):
		return fmt.Sprintf("%.100q has one segment", s)
	}
	for segment := range strings.SplitSeq(s, ".") {
		if segment == "" {
			return fmt.Sprintf("%.100q has an empty segment", s)
		}
	}
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '_' && r != '-' && r != '.' {
			return fmt.Sprintf("%.100q holds %q", s, r)
		}
	}
	return ""
}

// textFault finds what a varchar(limit) refuses.
func textFault(s string, limit int) string {
	if !utf8.ValidString(s) {
		return "is not valid UTF-8"
	}
	if strings.Contains(s, "\x00") {
		return "holds a zero byte, which PostgreSQL cannot store"
	}
	if n := utf8.RuneCountInString(s); n > limit {
		return fmt.Sprintf("has %d characters, more than %d", n, limit)
	}
	return ""
}

func metadataFault(doc json.RawMessage) string {
	if fault := jsonFault(doc); fault != "" {
		return fault
	}
	if start := bytes.TrimLeft(doc, " \t\r\n"); len(start) > 0 && start[0] != '{' {
		return "is not a JSON object"
	}
	return ""
}

// jsonFault finds what jsonb refuses, empty meaning the default. JSON itself allows what PostgreSQL has no text for, the character U+0000 and halves
// of surrogate pairs, and numbers that numeric does not hold.
func jsonFault(doc json.RawMessage) string {
	if len(doc) == 0 {
		return ""
	}
	if !utf8.Valid(doc) {
		return "is not valid UTF-8"
	}
	if !json.Valid(doc) {
		return "is not valid JSON"
	}
	if overflows(doc) {
		return fmt.Sprintf("holds a number that overflows numeric, which has at most %d digits before and %d behind the decimal point",
			maxWeight+1, maxScale)
	}
	for rest := []byte(doc); ; {
		at := bytes.IndexByte(rest, '\\')
		if at < 0 {
			return ""
		}
		if rest[at+1] != 'u' {
			rest = rest[at+2:]
			continue
		}
		unit := escaped(rest[at:])
		rest = rest[at+6:]
		switch {
		case unit == 0:
			return `holds \u0000, which jsonb cannot store`
		case unit >= 0xd800 && unit < 0xdc00 && isLowSurrogate(escaped(rest)):
			rest = rest[6:]
		case unit >= 0xd800 && unit < 0xe000:
			return `holds half of a surrogate pair, which jsonb cannot store`
		}
	}
}

// What numeric holds at most: the exponent of the first digit, and digits behind the decimal point, zeros included. Source: NUMERIC_WEIGHT_MAX in
// base 10,000 and NUMERIC_DSCALE_MAX in src/backend/utils/adt/numeric.c.
const (
	maxWeight = 131071
	maxScale  = 16383
)

// overflows tells whether a valid document holds a number that numeric does not.
func overflows(doc []byte) bool {
	for token := range tokens(doc) {
		if c := token[0]; (c == '-' || c >= '0' && c <= '9') && overflowsNumeric(string(token)) {
			return true
		}
	}
	return false
}

func overflowsNumeric(number string) bool {
	d := parseDecimal(number)
	if d.exponent == maxExponent || d.exponent == -maxExponent {
		return true // of zero as well
	}
	scale := len(d.fraction) - d.exponent
	significant := strings.TrimLeft(d.whole+d.fraction, "0")
	return scale > maxScale || significant != "" && len(significant)-1-scale > maxWeight
}

// decimal is the text of a number, taken apart.
type decimal struct {
	whole, fraction string // digits before and behind the point
	exponent        int    // maxExponent stands for it and all beyond, and so below zero
}

const maxExponent = 1<<30 + 1

func parseDecimal(number string) (d decimal) {
	mantissa := strings.TrimPrefix(number, "-")
	if at := strings.IndexAny(mantissa, "eE"); at >= 0 {
		n, err := strconv.Atoi(mantissa[at+1:])
		if d.exponent = min(max(n, -maxExponent), maxExponent); err != nil && n == 0 {
			d.exponent = maxExponent // no number at all
		}
		mantissa = mantissa[:at]
	}
	d.whole, d.fraction, _ = strings.Cut(mantissa, ".")
	return d
}

// escaped returns the UTF-16 unit of a leading \uXXXX, or -1.
func escaped(b []byte) int {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return -1
	}
	unit, err := strconv.ParseUint(string(b[2:6]), 16, 16)
	if err != nil {
		return -1
	}
	return int(unit)
}

func isLowSurrogate(unit int) bool { return unit >= 0xdc00 && unit < 0xe000 }
