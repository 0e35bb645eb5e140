package route

import (
	"fmt"
	"strings"
)

// Filter is a compiled event_filters document. It never changes and is safe for concurrent use.
//
// A condition on a key looks at the value there. A plain value must be equal: numbers as exact decimals, strings by their
// characters, arrays and objects as a whole. An object holds conditions in its turn: operators on that value, and keys within it.
//
//   - An array matches if any of its elements does, or the elements of arrays in it. All comparisons and keys of one object must
//     then hold for the same element: {"items": {"sku": "A", "qty": {"$gt": 2}}} wants one such item.
//   - "items.sku" is the value of sku in items, or in any element of items; each such condition stands alone.
//   - $ne, $nin, $not and $exists: false hold where $eq, $in, the condition and $exists: true do not. So {"tags": {"$ne": "a"}}
//     wants no tag to be a, and holds without tags. Every other operator wants a value: null is one, a missing key is not.
//   - $gt, $gte, $lt and $lte compare numbers with numbers, and strings with strings by their UTF-8 bytes. $startsWith, $endsWith
//     and $contains look for a piece of a string.
//   - $and and $or take a list of conditions, $not takes one, all for the same value as the object they stand in.
//
// At the top, and in $and, $or and $not there, $type, $aggregate_type and $context_id stand for the event's columns, and $metadata
// for its metadata, with keys as in "$metadata.source". A context_id that is NULL is missing.
type Filter struct{ root node }

// CompileFilter reads an event_filters document of at most 64 KiB, 1,024 values and 64 levels. {} matches all; as a condition anywhere else, in
// $and, $or and $not too, it is an error, since a form that was filled in by half must not match by accident. So are an unknown operator and an
// operand of the wrong type. Errors say where in the document they are. CompileFilter keeps no reference to doc.
func CompileFilter(doc []byte) (*Filter, error) {
	l, err := parseFilter(doc)
	if err != nil {
		return nil, fmt.Errorf("filter: %w", err)
	}
	root, err := compile(&l, scope{top: true, from: fromData})
	if err != nil {
		return nil, err
	}
	return &Filter{root: root}, nil
}

// node is one step of a compiled filter: a condition on a value.
type node struct {
	op    op
	nodes []node // of all, any, not; of some, what must hold within the value
	tests []test // of some, what must hold of the value itself
	from  source // of some and exists: where path starts
	path  []string
}

type op uint8

const (
	opAll    op = iota // every node holds
	opAny              // a node holds
	opNot              // the one node does not hold
	opSome             // a value at path passes all tests and nodes
	opExists           // there is a value at path
)

// source is where a path starts.
type source uint8

const (
	fromValue source = iota // the value that the node stands for
	fromData
	fromMetadata
	fromType
	fromAggregateType
	fromContextID
)

// sourceOf finds what a key at the top with a $ stands for, if it is not an operator.
func sourceOf(name string) (s source, ok bool) {
	switch name {
	case "$metadata":
		return fromMetadata, true
	case "$type":
		return fromType, true
	case "$aggregate_type":
		return fromAggregateType, true
	case "$context_id":
		return fromContextID, true
	}
	return 0, false
}

func (s source) isText() bool { return s == fromType || s == fromAggregateType || s == fromContextID }

// test compares one value with an operand.
type test struct {
	op      testOp
	operand literal
	strings map[string]struct{} // of in: the strings of operand, the rest being in operand.items
}

type testOp uint8

const (
	testEqual testOp = iota
	testIn
	testGreater
	testGreaterOrEqual
	testLess
	testLessOrEqual
	testStartsWith
	testEndsWith
	testContains
)

// scope is what a condition is about, and how it is called in an error.
type scope struct {
	top  bool
	from source
	path []string
	name string
}

func (s scope) sub(name string) scope {
	if s.name != "" {
		name = s.name + "." + name
	}
	s.name = name
	return s
}

func (s scope) errorf(format string, args ...any) error {
	if s.name == "" {
		s.name = "at the top"
	}
	return fmt.Errorf("filter: %.255s: "+format, append([]any{s.name}, args...)...)
}

// compile turns the condition l on the values of s into a node.
func compile(l *literal, s scope) (node, error) {
	value := node{op: opSome, from: s.from, path: s.path} // what one and the same value must pass
	if l.kind != kindObject {
		if s.top {
			return node{}, s.errorf("want an object, got %s", l.describe())
		}
		value.tests = []test{{op: testEqual, operand: *l}}
		return value, nil
	}
	if len(l.keys) == 0 && s.name != "" { // only the document itself has no name
		return node{}, s.errorf(`an empty object tests nothing: use {"$eq": {}} or {"$exists": true}`)
	}

	all := node{op: opAll}
	for i, key := range l.keys {
		var err error
		item, name := &l.items[i], s.sub(key)
		if strings.HasPrefix(key, "$") {
			err = operator(key, item, s, &value, &all)
		} else if s.from.isText() {
			err = name.errorf("has no keys within")
		} else if name.path, err = splitPath(key, name); err == nil {
			name.top, name.from = false, fromValue
			err = appendNode(&value.nodes, item, name)
		}
		if err != nil {
			return node{}, err
		}
	}
	if len(value.tests) > 0 || len(value.nodes) > 0 {
		all.nodes = append(all.nodes, value)
	}
	if len(all.nodes) == 1 {
		return all.nodes[0], nil
	}
	return all, nil
}

// operator compiles a key with a $ into all, or as a test of value.
func operator(key string, l *literal, s scope, value, all *node) error {
	name := s.sub(key)
	if s.top {
		first, rest, dotted := strings.Cut(key, ".")
		if from, ok := sourceOf(first); ok && (!dotted || !from.isText()) {
			column := scope{from: from, name: name.name}
			if dotted {
				var err error
				if column.path, err = splitPath(rest, name); err != nil {
					return err
				}
			}
			return appendNode(&all.nodes, l, column)
		}
	}

	switch key {
	case "$and", "$or":
		return logical(key, l, s, all)
	case "$not":
		inner := node{op: opNot}
		s.name = name.name
		if err := appendNode(&inner.nodes, l, s); err != nil {
			return err
		}
		all.nodes = append(all.nodes, inner)
		return nil
	case "$exists":
		if l.kind != kindTrue && l.kind != kindFalse {
			return name.errorf("want true or false, got %s", l.describe())
		}
		all.nodes = append(all.nodes, negate(l.kind == kindFalse, node{op: opExists, from: s.from, path: s.path}))
		return nil
	}

	t, err := newTest(key, l, name)
	if err != nil {
		return err
	}
	if key == "$ne" || key == "$nin" {
		all.nodes = append(all.nodes, negate(true, node{op: opSome, from: s.from, path: s.path, tests: []test{t}}))
		return nil
	}
	value.tests = append(value.tests, t)
	return nil
}

func logical(key string, l *literal, s scope, all *node) error {
	name := s.sub(key)
	if l.kind != kindArray || len(l.items) == 0 {
		return name.errorf("want an array of one or more conditions")
	}
	inner := node{op: opAll}
	if key == "$or" {
		inner.op = opAny
	}
	for i := range l.items {
		s.name = fmt.Sprintf("%s[%d]", name.name, i)
		if err := appendNode(&inner.nodes, &l.items[i], s); err != nil {
			return err
		}
	}
	all.nodes = append(all.nodes, inner)
	return nil
}

func appendNode(nodes *[]node, l *literal, s scope) error {
	n, err := compile(l, s)
	*nodes = append(*nodes, n)
	return err
}

func negate(yes bool, n node) node {
	if yes {
		return node{op: opNot, nodes: []node{n}}
	}
	return n
}

func newTest(key string, l *literal, name scope) (test, error) {
	t := test{operand: *l}
	switch key {
	case "$eq", "$ne":
		return t, nil
	case "$in", "$nin":
		t.op = testIn
		if l.kind != kindArray {
			return t, name.errorf("want an array, got %s", l.describe())
		}
		t.indexStrings()
		return t, nil
	case "$gt":
		t.op = testGreater
	case "$gte":
		t.op = testGreaterOrEqual
	case "$lt":
		t.op = testLess
	case "$lte":
		t.op = testLessOrEqual
	case "$startsWith":
		t.op = testStartsWith
	case "$endsWith":
		t.op = testEndsWith
	case "$contains":
		t.op = testContains
	default:
		return t, name.errorf("is no operator: use $eq $ne $gt $gte $lt $lte $in $nin $exists $startsWith $endsWith $contains $not $and $or" +
			", and at the top $type $aggregate_type $context_id $metadata")
	}
	switch {
	case t.op >= testStartsWith && l.kind != kindString:
		return t, name.errorf("want a string, got %s", l.describe())
	case l.kind != kindString && l.kind != kindNumber:
		return t, name.errorf("want a number or a string, got %s", l.describe())
	}
	return t, nil
}

// indexStrings makes room for long lists of ids.
func (t *test) indexStrings() {
	t.strings = make(map[string]struct{})
	others := []literal(nil)
	for _, item := range t.operand.items {
		if item.kind == kindString {
			t.strings[string(item.text)] = struct{}{}
		} else {
			others = append(others, item)
		}
	}
	t.operand.items = others
}

func splitPath(key string, s scope) ([]string, error) {
	path := strings.Split(key, ".")
	if len(path) > maxFilterDepth {
		return nil, s.errorf("has more than %d segments", maxFilterDepth)
	}
	for _, segment := range path {
		if segment == "" {
			return nil, s.errorf("has an empty segment")
		}
		if segment[0] == '$' {
			return nil, s.errorf("holds %.40q, which is no key", segment)
		}
	}
	return path, nil
}
