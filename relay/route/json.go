package route

import (
	"bytes"
	"unicode/utf16"
	"unicode/utf8"
)

// The functions here walk over JSON as bytes, forwards and without recursion. Each takes the index of what it reads and returns an
// index, -1 for JSON that is not well-formed. PostgreSQL prints jsonb well-formed; anything else must only do no harm, so what is
// not looked at is not checked either.

type kind uint8

const (
	kindBad kind = iota
	kindNull
	kindFalse
	kindTrue
	kindNumber
	kindString
	kindArray
	kindObject
)

// kindAt tells the kind of the value at i by its first byte.
func kindAt(doc []byte, i int) kind {
	if i < 0 || i >= len(doc) {
		return kindBad
	}
	switch c := doc[i]; c {
	case '{':
		return kindObject
	case '[':
		return kindArray
	case '"':
		return kindString
	case 'n':
		return kindNull
	case 't':
		return kindTrue
	case 'f':
		return kindFalse
	default:
		if c == '-' || c >= '0' && c <= '9' {
			return kindNumber
		}
		return kindBad
	}
}

// space returns the index of the first byte from i on that is not white space, at most len(doc).
func space(doc []byte, i int) int {
	for i < len(doc) && (doc[i] == ' ' || doc[i] == '\n' || doc[i] == '\t' || doc[i] == '\r') {
		i++
	}
	return i
}

// skipString returns the index after the string at i.
func skipString(doc []byte, i int) int {
	for i++; i < len(doc); i++ {
		switch doc[i] {
		case '"':
			return i + 1
		case '\\':
			i++
		}
	}
	return -1
}

// skip returns the index after the value at i.
func skip(doc []byte, i int) int {
	switch kindAt(doc, i) {
	case kindBad:
		return -1
	case kindString:
		return skipString(doc, i)
	case kindArray, kindObject:
		return skipContainer(doc, i)
	default:
		for ; i < len(doc); i++ {
			switch doc[i] {
			case ',', ']', '}', ' ', '\n', '\t', '\r':
				return i
			}
		}
		return i
	}
}

func skipContainer(doc []byte, i int) int {
	for depth := 0; i >= 0 && i < len(doc); {
		switch doc[i] {
		case '"':
			i = skipString(doc, i)
			continue
		case '[', '{':
			depth++
		case ']', '}':
			depth--
			if depth == 0 {
				return i + 1
			}
		}
		i++
	}
	return -1
}

// members goes through an object. Use advance until it returns false; then bad tells whether the object was broken.
type members struct {
	doc  []byte
	next int    // the index of the next key, or of the end
	key  []byte // the current key between its quotes
	at   int    // the index of the current value
	bad  bool
}

// membersOf starts at the object at i.
func membersOf(doc []byte, i int) members {
	return members{doc: doc, next: space(doc, i+1), at: -1}
}

func (m *members) advance() bool {
	if m.at >= 0 { // behind a value
		end := skip(m.doc, m.at)
		if end < 0 {
			return m.broken()
		}
		m.next = space(m.doc, end)
		if m.next < len(m.doc) && m.doc[m.next] == ',' {
			m.next = space(m.doc, m.next+1)
		} else if m.next >= len(m.doc) || m.doc[m.next] != '}' {
			return m.broken()
		}
	}
	if m.next < len(m.doc) && m.doc[m.next] == '}' {
		return false
	}
	if kindAt(m.doc, m.next) != kindString {
		return m.broken()
	}
	end := skipString(m.doc, m.next)
	if end < 0 {
		return m.broken()
	}
	m.key = m.doc[m.next+1 : end-1]
	colon := space(m.doc, end)
	if colon >= len(m.doc) || m.doc[colon] != ':' {
		return m.broken()
	}
	m.at = space(m.doc, colon+1)
	return true
}

func (m *members) broken() bool {
	m.bad = true
	return false
}

// elements goes through an array and the arrays in it, however deep. Arrays in it are visited themselves, before what they hold.
type elements struct {
	doc   []byte
	at    int // the index of the current element; at first of the array itself
	end   int // the index of what ended the array, once advance has returned false
	depth int
	bad   bool
}

// elementsOf starts at the array at i.
func elementsOf(doc []byte, i int) elements {
	return elements{doc: doc, at: i}
}

func (e *elements) advance() bool {
	i := 0
	if e.depth == 0 || e.doc[e.at] == '[' { // go in
		e.depth++
		i = space(e.doc, e.at+1)
		if i < len(e.doc) && e.doc[i] != ']' {
			return e.visit(i)
		}
	} else {
		end := skip(e.doc, e.at)
		if end < 0 {
			return e.broken()
		}
		i = space(e.doc, end)
	}
	for ; i < len(e.doc); i = space(e.doc, i+1) {
		switch e.doc[i] {
		case ',':
			return e.visit(space(e.doc, i+1))
		case ']':
			e.depth--
			if e.depth == 0 {
				e.end = i
				return false
			}
		default:
			return e.broken()
		}
	}
	return e.broken()
}

func (e *elements) visit(i int) bool {
	if kindAt(e.doc, i) == kindBad {
		return e.broken()
	}
	e.at = i
	return true
}

func (e *elements) broken() bool {
	e.bad = true
	return false
}

// isEscaped tells whether the inside of a JSON string has to go through unescape.
func isEscaped(inside []byte) bool { return bytes.IndexByte(inside, '\\') >= 0 }

// unescape appends what the inside of a JSON string stands for. Half a surrogate pair becomes U+FFFD, as in encoding/json.
func unescape(dst, inside []byte) []byte {
	for {
		backslash := bytes.IndexByte(inside, '\\')
		if backslash < 0 || backslash+1 >= len(inside) {
			return append(dst, inside...)
		}
		dst = append(dst, inside[:backslash]...)
		c := inside[backslash+1]
		if c == 'u' {
			var r rune
			r, inside = unescapeRune(inside[backslash:])
			dst = utf8.AppendRune(dst, r)
			continue
		}
		inside = inside[backslash+2:]
		switch c {
		case 'b':
			c = '\b'
		case 'f':
			c = '\f'
		case 'n':
			c = '\n'
		case 'r':
			c = '\r'
		case 't':
			c = '\t'
		}
		dst = append(dst, c)
	}
}

// unescapeRune reads a leading \uXXXX, two of them for a surrogate pair, and returns what follows.
func unescapeRune(inside []byte) (rune, []byte) {
	r := escapedUnit(inside)
	if r < 0 {
		return utf8.RuneError, inside[2:]
	}
	if utf16.IsSurrogate(r) {
		if pair := utf16.DecodeRune(r, escapedUnit(inside[6:])); pair != utf8.RuneError {
			return pair, inside[12:]
		}
		r = utf8.RuneError
	}
	return r, inside[6:]
}

// escapedUnit returns the UTF-16 unit of a leading \uXXXX, or -1.
func escapedUnit(b []byte) rune {
	if len(b) < 6 || b[0] != '\\' || b[1] != 'u' {
		return -1
	}
	var r rune
	for _, c := range b[2:6] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return -1
		}
		r = r<<4 | rune(c)
	}
	return r
}
