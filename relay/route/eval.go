package route

import (
	"bytes"
	"math"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Match reports whether e passes the filter. It reads e.Data and e.Metadata as they are, building nothing: each key that the filter
// names costs a walk over the object it is in. It allocates only to unescape a long string. JSON that is found broken does not match.
func (f *Filter) Match(e *outbox.Event) bool {
	left := math.MaxInt
	matches, _ := f.match(e, nil, &left)
	return matches
}

// match is Match within a budget: left is how many bytes of JSON may still be walked over, and is taken from. Nothing is decided once it is used up. o is the
// outline of e, or nil.
func (f *Filter) match(e *outbox.Event, o *outline, left *int) (matches, decided bool) {
	m := matcher{event: e, outline: o, left: *left}
	matches = m.holds(&f.root, value{}) && !m.bad
	*left = m.left
	return matches, m.left > 0
}

type matcher struct {
	event   *outbox.Event
	outline *outline // of the event; nil: there is none
	left    int      // bytes that may still be walked over
	bad     bool     // the JSON is broken
	scratch [64]byte // for strings that are not in the JSON as they are
}

// stepCost is how many bytes a step costs that walks over none.
const stepCost = 8

// walked takes what lies between two places of a document from what may still be walked over, and tells whether anything is left. What is found after that does
// not count.
func (m *matcher) walked(from, to int) bool {
	m.left -= max(to-from, 1)
	return m.left > 0
}

// over ends a walk over an array or an object: at is the last value that was come to, end where the whole ends, bad that it is broken.
func (m *matcher) over(at, end int, bad bool) {
	m.walked(at, end)
	m.bad = m.bad || bad
}

// value is a place in a document, or a column of the event that is text. The zero value is missing.
type value struct {
	kind   kind // kindBad: missing
	doc    []byte
	at     int
	column source // fromValue: a place in doc
	isData bool   // all of the event's data
}

func valueAt(doc []byte, i int) value { return value{kind: kindAt(doc, i), doc: doc, at: i} }

// holds evaluates n for v. Its recursion is as deep as the filter, never as the document.
func (m *matcher) holds(n *node, v value) bool {
	switch n.op {
	case opAll:
		return m.allHold(n.nodes, v)
	case opAny:
		for i := range n.nodes {
			if m.holds(&n.nodes[i], v) {
				return true
			}
		}
		return false
	case opNot:
		return !m.holds(&n.nodes[0], v)
	default:
		return m.walk(n, m.start(n.from, v), n.path)
	}
}

func (m *matcher) allHold(nodes []node, v value) bool {
	for i := range nodes {
		if !m.holds(&nodes[i], v) {
			return false
		}
	}
	return true
}

func (m *matcher) start(from source, v value) value {
	switch from {
	case fromData:
		data := valueAt(m.event.Data, space(m.event.Data, 0))
		data.isData = true
		return data
	case fromMetadata:
		return valueAt(m.event.Metadata, space(m.event.Metadata, 0))
	case fromType, fromAggregateType:
		return value{kind: kindString, column: from}
	case fromContextID:
		if m.event.ContextID.IsZero() {
			return value{}
		}
		return value{kind: kindString, column: from}
	default:
		return v
	}
}

// walk reports whether a value at path, seen from v, passes n.
func (m *matcher) walk(n *node, v value, path []string) bool {
	if m.left -= stepCost; m.left <= 0 {
		return false
	}
	if len(path) == 0 || v.kind == kindBad {
		return m.pass(n, v)
	}
	if v.kind != kindArray {
		return m.walk(n, m.find(v, path[0]), path[1:])
	}
	e := elementsOf(v.doc, v.at)
	for last := e.at; e.advance() && m.walked(last, e.at); last = e.at {
		if w := valueAt(v.doc, e.at); w.kind != kindArray && m.walk(n, m.find(w, path[0]), path[1:]) {
			return true
		}
	}
	m.over(e.at, e.end, e.bad)
	return false
}

// find returns the value of a key in v, missing if v is no object.
func (m *matcher) find(v value, key string) value {
	if v.kind != kindObject {
		return value{}
	}
	if v.isData && m.outline != nil && m.outline.draw(m.event) {
		return m.outlined(key)
	}
	it := membersOf(v.doc, v.at)
	for last := v.at; it.advance() && m.walked(last, it.at); last = it.at {
		if m.isKey(it.key, key) {
			w := valueAt(v.doc, it.at)
			m.bad = m.bad || w.kind == kindBad
			return w
		}
	}
	m.over(it.at, it.next, it.bad)
	return value{}
}

func (m *matcher) isKey(inside []byte, key string) bool {
	if !isEscaped(inside) {
		return string(inside) == key
	}
	return string(unescape(m.scratch[:0], inside)) == key
}

// pass reports whether v, or an element of it, passes n. An array itself is compared as a whole; it has no keys.
func (m *matcher) pass(n *node, v value) bool {
	if n.op == opExists {
		return v.kind != kindBad
	}
	if v.kind != kindArray {
		return m.passOne(n, v)
	}
	whole := len(n.nodes) == 0
	if whole && m.passTests(n.tests, v) {
		return true
	}
	e := elementsOf(v.doc, v.at)
	for last := e.at; e.advance() && m.walked(last, e.at); last = e.at {
		if w := valueAt(v.doc, e.at); (whole || w.kind != kindArray) && m.passOne(n, w) {
			return true
		}
	}
	m.over(e.at, e.end, e.bad)
	return false
}

func (m *matcher) passOne(n *node, v value) bool {
	return m.passTests(n.tests, v) && m.allHold(n.nodes, v)
}

func (m *matcher) passTests(tests []test, v value) bool {
	for i := range tests {
		if v.kind == kindBad || !m.passTest(&tests[i], v) {
			return false
		}
	}
	return true
}

func (m *matcher) passTest(t *test, v value) bool {
	m.left -= stepCost
	switch t.op {
	case testEqual:
		return m.equal(v, &t.operand)
	case testIn:
		return m.in(v, t)
	case testStartsWith:
		return v.kind == kindString && bytes.HasPrefix(m.text(v), t.operand.text)
	case testEndsWith:
		return v.kind == kindString && bytes.HasSuffix(m.text(v), t.operand.text)
	case testContains:
		return v.kind == kindString && bytes.Contains(m.text(v), t.operand.text)
	default:
		return m.inOrder(v, t)
	}
}

func (m *matcher) inOrder(v value, t *test) bool {
	c, ok := m.compare(v, &t.operand)
	if !ok {
		return false
	}
	switch t.op {
	case testGreater:
		return c > 0
	case testGreaterOrEqual:
		return c >= 0
	case testLess:
		return c < 0
	default: // testLessOrEqual
		return c <= 0
	}
}

func (m *matcher) in(v value, t *test) bool {
	if v.kind == kindString {
		_, ok := t.strings[string(m.text(v))]
		return ok
	}
	for i := range t.operand.items {
		if m.equal(v, &t.operand.items[i]) {
			return true
		}
		if m.left <= 0 {
			return false
		}
	}
	return false
}

// compare compares numbers with numbers and strings with strings.
func (m *matcher) compare(v value, l *literal) (int, bool) {
	if v.kind != l.kind {
		return 0, false
	}
	if v.kind == kindString {
		return bytes.Compare(m.text(v), l.text), true
	}
	d, ok := m.number(v)
	return d.compare(l.number), ok
}

// number reads the number v.
func (m *matcher) number(v value) (decimal, bool) {
	end := skip(v.doc, v.at)
	m.walked(v.at, end)
	d, ok := parseDecimal(v.doc[v.at:end])
	m.bad = m.bad || !ok
	return d, ok
}

// text returns what the string v stands for. It is valid until the next call.
func (m *matcher) text(v value) []byte {
	switch v.column {
	case fromType:
		return append(m.scratch[:0], m.event.Type...)
	case fromAggregateType:
		return append(m.scratch[:0], m.event.AggregateType...)
	case fromContextID:
		text, _ := m.event.ContextID.AppendText(m.scratch[:0]) // the error is always nil
		return text
	case fromValue, fromData, fromMetadata:
	}
	end := skipString(v.doc, v.at)
	if end < 0 {
		m.bad = true
		return nil
	}
	m.walked(v.at, end)
	inside := v.doc[v.at+1 : end-1]
	if !isEscaped(inside) {
		return inside
	}
	return unescape(m.scratch[:0], inside)
}

// equal compares v with l, whole objects and arrays too. Its recursion is as deep as l.
func (m *matcher) equal(v value, l *literal) bool {
	m.left -= stepCost
	if v.kind != l.kind {
		return false
	}
	switch v.kind {
	case kindString:
		return bytes.Equal(m.text(v), l.text)
	case kindNumber:
		d, ok := m.number(v)
		return ok && d.compare(l.number) == 0
	case kindArray:
		return m.equalArray(v, l)
	case kindObject:
		return m.equalObject(v, l)
	default:
		return true // null, true and false are what their first byte says
	}
}

func (m *matcher) equalArray(v value, l *literal) bool {
	count := 0
	e := elementsOf(v.doc, v.at)
	for last := e.at; e.advance() && m.walked(last, e.at); last = e.at {
		if e.depth > 1 {
			continue
		}
		if count == len(l.items) || !m.equal(valueAt(v.doc, e.at), &l.items[count]) {
			return false
		}
		count++
	}
	m.over(e.at, e.end, e.bad)
	return count == len(l.items)
}

// equalObject goes through both objects side by side, as jsonb has them in the order of l, and looks for keys that are elsewhere.
func (m *matcher) equalObject(v value, l *literal) bool {
	count := 0
	it := membersOf(v.doc, v.at)
	for last := v.at; it.advance() && m.walked(last, it.at); last = it.at {
		if count == len(l.keys) {
			return false
		}
		w := valueAt(v.doc, it.at)
		if !m.isKey(it.key, l.keys[count]) {
			w = m.find(v, l.keys[count])
		}
		if !m.equal(w, &l.items[count]) {
			return false
		}
		count++
	}
	m.over(it.at, it.next, it.bad)
	return count == len(l.keys)
}
