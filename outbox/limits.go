package outbox

import (
	"bytes"
	"errors"
	"fmt"
	"iter"
	"unicode/utf8"
)

// Limits bound events beyond what the table does: what an operator lets through to receivers. The zero value bounds nothing. An application that
// checks its events against the limits of its relay learns of one that breaks them while its transaction can still do without it; the relay makes dead
// letters of such events.
type Limits struct {
	// MaxTypeLength is how many characters a type has at most. Zero: as many as the column.
	MaxTypeLength int
	// AnyType lets types through that are not of the form that Event.Validate asks for. It is for relays, whose events may have been inserted without
	// this package.
	AnyType bool
	// MaxPayload is how many bytes Data and Metadata have together at most, without the white space between the tokens of JSON, and with numbers written
	// out as PostgreSQL writes them. Zero: any number.
	MaxPayload int
	// MaxDepth is how deeply objects and arrays of Data and Metadata may be nested: {"a":[1]} has a depth of 2. Zero: as deeply as the database lets them.
	MaxDepth int
}

// ProductionLimits are those of a relay with validation.profile: production.
func ProductionLimits() Limits {
	return Limits{MaxTypeLength: maxType, MaxPayload: 256 << 10, MaxDepth: 32}
}

// ValidateWithin returns every fault of e that Validate finds, and the first one of its limits, each a *FieldError, joined.
func (e *Event) ValidateWithin(l Limits) error {
	l.AnyType = true // the form is Validate's to judge
	err := e.Validate()
	if jsonFault(e.Data) != "" || metadataFault(e.Metadata) != "" {
		l.MaxPayload, l.MaxDepth = 0, 0 // they are for what is JSON
	}
	return errors.Join(err, l.check(e, func() int { return printedSize(e.Data) + printedSize(e.Metadata) }))
}

// Check returns the first fault of an event that the database has printed, a *FieldError, or nil. It costs next to nothing for an event that is far from
// the limits.
func (l Limits) Check(e *Event) error {
	return l.check(e, func() int {
		if n := len(e.Data) + len(e.Metadata); n <= l.MaxPayload { // what is printed is not longer without its white space
			return n
		}
		return printedSize(e.Data) + printedSize(e.Metadata)
	})
}

func (l Limits) check(e *Event, size func() int) error {
	if err := l.CheckType(e.Type); err != nil {
		return err
	}
	if l.MaxPayload > 0 {
		if n := size(); n > l.MaxPayload {
			return &FieldError{"Data", fmt.Sprintf("has %d bytes together with Metadata, more than %d", n, l.MaxPayload), "keep what is large elsewhere, and tell where"}
		}
	}
	switch {
	case l.MaxDepth == 0:
	case deeper(e.Data, l.MaxDepth):
		return l.tooDeep("Data")
	case deeper(e.Metadata, l.MaxDepth):
		return l.tooDeep("Metadata")
	}
	return nil
}

func (l Limits) tooDeep(field string) error {
	return &FieldError{field, fmt.Sprintf("is nested more than %d deep", l.MaxDepth), "make it flatter"}
}

// CheckType is the part of Check that is about the type.
func (l Limits) CheckType(eventType string) error {
	if l.MaxTypeLength > 0 && len(eventType) > l.MaxTypeLength {
		if n := utf8.RuneCountInString(eventType); n > l.MaxTypeLength {
			return &FieldError{"Type", fmt.Sprintf("has %d characters, more than %d", n, l.MaxTypeLength), "shorten it"}
		}
	}
	if l.AnyType {
		return nil
	}
	if fault := typeFault(eventType); fault != "" {
		return &FieldError{"Type", fault, typeRemedy}
	}
	return nil
}

// deeper tells whether objects and arrays of a document are nested more than limit deep. Few documents have as many at all, which is quickly found out.
func deeper(doc []byte, limit int) bool {
	if bytes.Count(doc, []byte{'{'})+bytes.Count(doc, []byte{'['}) <= limit {
		return false
	}
	depth := 0
	for token := range tokens(doc) {
		switch token[0] {
		case '{', '[':
			if depth++; depth > limit {
				return true
			}
		case '}', ']':
			depth--
		}
	}
	return false
}

// printedSize is the length of a document as the database prints it, but without white space between the tokens: the database has a habit of its own
// there. It has none of letters either that were escaped for no need; those are counted as given.
func printedSize(doc []byte) (n int) {
	if len(doc) == 0 {
		return len("{}") // which it stands for
	}
	for token := range tokens(doc) {
		if c := token[0]; c == '-' || c >= '0' && c <= '9' {
			n += printedNumber(string(token))
		} else {
			n += len(token)
		}
	}
	return n
}

// printedNumber is how long a number is at most without its exponent. One that has none is as long as it is.
func printedNumber(number string) int {
	d := parseDecimal(number)
	n := max(len(d.whole)+d.exponent, 1) // digits before the point
	if behind := len(d.fraction) - d.exponent; behind > 0 {
		n += 1 + behind
	}
	if number[0] == '-' {
		n++
	}
	return n
}

// tokens yields the tokens of a document: strings, numbers and words as a whole, all else by the byte. Of what is no JSON it yields some tokens or other.
func tokens(doc []byte) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for i := 0; i < len(doc); {
			end := i + 1
			switch c := doc[i]; {
			case c == ' ' || c == '\t' || c == '\n' || c == '\r':
				i = end
				continue
			case c == '"':
				for end < len(doc) && doc[end] != '"' {
					if doc[end] == '\\' {
						end++
					}
					end++
				}
				end = min(end+1, len(doc))
			case inWord(c):
				for end < len(doc) && inWord(doc[end]) {
					end++
				}
			}
			if !yield(doc[i:end]) {
				return
			}
			i = end
		}
	}
}

// inWord tells the bytes of numbers and of true, false and null.
func inWord(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c == '-' || c == '+' || c == '.' || c == 'E'
}
