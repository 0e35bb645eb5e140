package route

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// What a filter may come to. The stream waits while an event is matched, and each value of a filter can cost a walk over the event's document: a
// tenant's filter must not be the pace of all the others.
const (
	maxFilterBytes  = 64 << 10
	maxFilterValues = 1024 // a list of a thousand ids, and some conditions beside it
	maxFilterDepth  = 64
)

// literal is a JSON value of a filter.
type literal struct {
	kind   kind
	text   []byte // of a string, unescaped
	number decimal
	keys   []string  // of an object, in jsonb's order: by length, then by bytes
	items  []literal // of an array, or of an object beside its keys
}

func parseFilter(doc []byte) (literal, error) {
	switch {
	case len(doc) > maxFilterBytes:
		return literal{}, fmt.Errorf("is %d bytes long, more than %d: share it out to several subscriptions of the endpoint", len(doc), maxFilterBytes)
	case !json.Valid(doc):
		return literal{}, errors.New("is not valid JSON")
	}
	p := parser{doc: bytes.Clone(doc)} // numbers refer to it
	return p.literal(space(doc, 0), 0)
}

// parser reads a valid document.
type parser struct {
	doc    []byte
	values int // read so far
}

// literal reads the value at i.
func (p *parser) literal(i, depth int) (literal, error) {
	doc := p.doc
	l := literal{kind: kindAt(doc, i)}
	p.values++
	switch {
	case depth > maxFilterDepth:
		return l, fmt.Errorf("is nested more than %d levels deep", maxFilterDepth)
	case p.values > maxFilterValues:
		return l, fmt.Errorf("holds more than %d values, items of lists included: share them out to several subscriptions of the endpoint", maxFilterValues)
	}
	switch l.kind {
	case kindString:
		l.text = unescape(nil, doc[i+1:skipString(doc, i)-1])
	case kindNumber:
		token := doc[i:skip(doc, i)]
		var ok bool
		if l.number, ok = parseDecimal(token); !ok {
			return l, fmt.Errorf("number %.40s is out of range", token)
		}
	case kindArray:
		for e := elementsOf(doc, i); e.advance(); {
			if e.depth > 1 {
				continue
			}
			item, err := p.literal(e.at, depth+1)
			if err != nil {
				return l, err
			}
			l.items = append(l.items, item)
		}
	case kindObject:
		return p.object(i, depth)
	case kindBad, kindNull, kindFalse, kindTrue:
	}
	return l, nil
}

func (p *parser) object(i, depth int) (literal, error) {
	type member struct {
		key  string
		item literal
	}
	var all []member
	for m := membersOf(p.doc, i); m.advance(); {
		item, err := p.literal(m.at, depth+1)
		if err != nil {
			return literal{}, err
		}
		all = append(all, member{string(unescape(nil, m.key)), item})
	}
	slices.SortFunc(all, func(a, b member) int {
		return cmp.Or(cmp.Compare(len(a.key), len(b.key)), strings.Compare(a.key, b.key))
	})
	l := literal{kind: kindObject}
	for k, m := range all {
		if k > 0 && m.key == all[k-1].key {
			return l, fmt.Errorf("key %.100q is there twice", m.key)
		}
		l.keys = append(l.keys, m.key)
		l.items = append(l.items, m.item)
	}
	return l, nil
}

func (l *literal) describe() string {
	switch l.kind {
	case kindNull:
		return "null"
	case kindFalse, kindTrue:
		return "a boolean"
	case kindNumber:
		return "a number"
	case kindString:
		return "a string"
	case kindArray:
		return "an array"
	case kindObject:
		return "an object"
	default:
		return "no JSON"
	}
}
