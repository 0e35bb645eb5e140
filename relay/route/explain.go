package route

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Verdict is what a table makes of an event for one subscription, or for an endpoint that has none.
type Verdict struct {
	Endpoint     outbox.UUID
	Subscription outbox.UUID // zero: the endpoint has none
	Source       Source
	EventType    string // the type or pattern that the subscription is for
	// Fits tells that the subscription is for events of this type, or may be meant to be: nothing but its pattern is wrong.
	Fits bool
	// Why says what stands in the way, a sentence each without its end; empty: the event matches. It quotes the filter, never the event.
	Why []string
	// Paused tells that what goes to the endpoint waits until it is resumed. It does not stand in the way.
	Paused bool
}

// Matches tells that the event goes to the endpoint.
func (v *Verdict) Matches() bool { return len(v.Why) == 0 }

// Explain tells why Match does or does not choose an endpoint for e, zero for all: a Verdict for each of its subscriptions, or one for having
// none, in order of endpoint and subscription. There are none for an endpoint that the table does not know. It takes its time.
func (t *Tenant) Explain(e *outbox.Event, endpoint outbox.UUID) []Verdict {
	var all []Verdict
	for _, s := range t.subscriptions {
		if endpoint.IsZero() || s.row.EndpointID == endpoint {
			all = append(all, t.explain(s, e))
		}
	}
	for id, ep := range t.endpoints {
		if ep.subscriptions == 0 && (endpoint.IsZero() || id == endpoint) {
			all = append(all, Verdict{Endpoint: id, Why: []string{"it has no subscription"}, Paused: ep.row.Paused})
		}
	}
	slices.SortFunc(all, func(a, b Verdict) int {
		return cmp.Or(bytes.Compare(a.Endpoint[:], b.Endpoint[:]), bytes.Compare(a.Subscription[:], b.Subscription[:]), cmp.Compare(a.Source, b.Source))
	})
	return all
}

func (t *Tenant) explain(s *subscription, e *outbox.Event) Verdict {
	v := Verdict{
		Endpoint: s.row.EndpointID, Subscription: s.row.ID, Source: s.row.Source, EventType: s.row.EventType, Paused: s.endpoint.row.Paused,
	}
	if t.explainType(s, e, &v); !v.Fits {
		return v
	}
	why := func(yes bool, format string, args ...any) {
		if yes {
			v.Why = append(v.Why, fmt.Sprintf(format, args...))
		}
	}
	kind, known := t.index.types[t.index.typeIDs[e.Type]]
	ep := s.endpoint
	why(known && !kind.Enabled, "events of type %.255s are disabled", e.Type)
	why(!ep.known, "its endpoint does not exist")
	v.cannotBeUsed("its endpoint", ep.err)
	why(ep.known && !ep.row.Active, "its endpoint is not active")
	required := ep.known && known && kind.RequiresVerification
	why(required && !ep.row.Verified, "its endpoint is not verified, which events of type %.255s require", e.Type)
	why(required && ep.row.Verified && ep.usable != nil && !ep.usable.Verified, "its endpoint was verified with another URL, and events of type %.255s require that it is with this one", e.Type)
	why(!s.row.Active, "the subscription is not active")
	v.cannotBeUsed("the subscription", s.err)
	if want := s.row.ContextID; !want.IsZero() && want != e.ContextID {
		why(e.ContextID.IsZero(), "it is for context %s, the event has none", want)
		why(!e.ContextID.IsZero(), "it is for context %s, the event has %s", want, e.ContextID)
	}
	if s.err == nil && s.filter != nil && !s.filter.Match(e) {
		b := blame{event: e}
		b.object(part{from: fromData, top: true, wrap: func(c []byte) []byte { return c }}, s.row.Filters)
		v.Why = append(v.Why, b.why...)
	}
	return v
}

// explainType tells whether the subscription is for events of this type.
func (t *Tenant) explainType(s *subscription, e *outbox.Event, v *Verdict) {
	p, err := parseEventType(&s.row)
	switch {
	case s.row.Source == Older:
		row, known := t.index.types[s.row.EventTypeID]
		v.EventType = row.EventType
		if !known {
			v.Why = []string{"it is for an event type that does not exist"}
			return
		}
		v.Fits = t.index.typeIDs[e.Type] == s.row.EventTypeID
	case err != nil:
		v.Fits = true // and it is among what keeps the subscription from being used
	case p != nil:
		v.Fits = p.match(e.Type)
	default:
		v.Fits = s.row.EventType == e.Type
	}
	if !v.Fits {
		v.Why = []string{fmt.Sprintf("it is for %.255s", v.EventType)}
	}
}

func (v *Verdict) cannotBeUsed(what string, err error) {
	if err != nil {
		v.Why = append(v.Why, what+" cannot be used: "+strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}

// blame collects the conditions of a filter that do not hold for an event. It takes the document apart and tries each part as a filter of its
// own: so matching need not know what it is about to refuse.
type blame struct {
	event *outbox.Event
	why   []string
}

// part is a place in a filter where a condition stands.
type part struct {
	name string // as in the errors of CompileFilter
	from source
	path []string
	top  bool
	wrap func(condition []byte) []byte // makes a filter that has this condition here, and no other
}

func (b *blame) fails(filter []byte) bool {
	f, err := CompileFilter(filter)
	return err == nil && !f.Match(b.event)
}

// condition blames what does not hold in one that fails.
func (b *blame) condition(p part, doc json.RawMessage) {
	if kindAt(doc, space(doc, 0)) == kindObject {
		b.object(p, doc)
		return
	}
	b.add(p, "$eq", doc)
}

func (b *blame) object(p part, doc json.RawMessage) {
	var items map[string]json.RawMessage
	_ = json.Unmarshal(doc, &items) // it has been compiled
	before := len(b.why)
	for _, key := range slices.Sorted(maps.Keys(items)) {
		if b.fails(p.wrap(member(key, items[key]))) {
			b.member(p, key, items[key])
		}
	}
	if len(b.why) == before { // each holds for some element of an array, not all for the same
		b.why = append(b.why, fmt.Sprintf("the filter wants one value of %s that meets %s", cmp.Or(p.name, "the event's data"), excerpt(doc)))
	}
}

func member(key string, condition []byte) []byte {
	name, _ := json.Marshal(key) // a string is always JSON
	return slices.Concat([]byte{'{'}, name, []byte{':'}, condition, []byte{'}'})
}

// member blames a key of an object and what stands there.
func (b *blame) member(p part, key string, item json.RawMessage) {
	inner := p
	inner.name = strings.TrimPrefix(p.name+"."+key, ".")
	first, rest, _ := strings.Cut(key, ".")
	from, isColumn := sourceOf(first)
	switch {
	case key == "$and" || key == "$or":
		var items []json.RawMessage
		_ = json.Unmarshal(item, &items) // it has been compiled
		for i, condition := range items {
			each := p
			each.name = fmt.Sprintf("%s[%d]", inner.name, i)
			if b.fails(p.wrap(condition)) {
				b.condition(each, condition)
			}
		}
		return
	case p.top && isColumn:
		inner.from, inner.path = from, nil
		if rest != "" {
			inner.path = strings.Split(rest, ".")
		}
	case strings.HasPrefix(key, "$"):
		b.add(p, key, item)
		return
	default:
		inner.path = append(slices.Clone(p.path), strings.Split(key, ".")...)
	}
	inner.top = false
	inner.wrap = func(condition []byte) []byte { return p.wrap(member(key, condition)) }
	b.condition(inner, item)
}

// add blames an operator.
func (b *blame) add(p part, operator string, operand json.RawMessage) {
	text := "the filter wants " + strings.TrimSpace(p.name+" "+operator) + " " + excerpt(operand)
	if operator != "$not" {
		text += ", the event has " + b.found(p)
	}
	b.why = append(b.why, text)
}

// found tells the JSON types at a place of the event.
func (b *blame) found(p part) string {
	m := matcher{event: b.event, left: math.MaxInt}
	var kinds []string
	m.kinds(m.start(p.from, value{}), p.path, func(k kind) {
		if text := (&literal{kind: k}).describe(); k != kindBad && !slices.Contains(kinds, text) {
			kinds = append(kinds, text)
		}
	})
	if len(kinds) == 0 {
		return "nothing there"
	}
	return strings.Join(kinds, " and ") + " there"
}

// kinds tells the kind of every value at path, seen from v, the way that walk goes.
func (m *matcher) kinds(v value, path []string, tell func(kind)) {
	if len(path) == 0 {
		tell(v.kind)
		return
	}
	if v.kind != kindArray {
		m.kinds(m.find(v, path[0]), path[1:], tell)
		return
	}
	e := elementsOf(v.doc, v.at)
	for e.advance() {
		if w := valueAt(v.doc, e.at); w.kind != kindArray {
			m.kinds(m.find(w, path[0]), path[1:], tell)
		}
	}
}

// excerpt is the beginning of a JSON document on one line.
func excerpt(doc []byte) string {
	const most = 120
	var b bytes.Buffer
	if json.Compact(&b, doc) != nil {
		return "(not JSON)"
	}
	if text := []rune(b.String()); len(text) > most {
		return string(text[:most]) + "…"
	}
	return b.String()
}
