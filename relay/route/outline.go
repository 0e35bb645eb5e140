package route

import "github.com/neo-commons/outbox-relay/outbox"

// outlineFrom is the size of an event's data from which on it is worth an outline: a walk over less costs no more than looking for the key there.
const outlineFrom = 4 << 10

// An outline is where the keys of an event's data are, those of the object itself. Filters that look for one need not walk, each anew, over all that stands before
// it. It belongs to one Match; the zero value is one that has not been drawn.
type outline struct {
	drawn   bool
	bad     bool // the object is broken after the last member
	members []place
}

// place is that of a key, between its quotes, and the index of its value.
type place struct {
	key []byte
	at  int
}

// draw lists the members of e's data. It returns false if it is not worth while, or there are none.
func (o *outline) draw(e *outbox.Event) bool {
	if o.drawn {
		return true
	}
	root := space(e.Data, 0)
	if len(e.Data) < outlineFrom || kindAt(e.Data, root) != kindObject {
		return false
	}
	it := membersOf(e.Data, root)
	for it.advance() {
		o.members = append(o.members, place{it.key, it.at})
	}
	o.drawn, o.bad = true, it.bad
	return true
}

// drop forgets the event, and keeps some room for the next one.
func (o *outline) drop() {
	const room = 1024
	clear(o.members)
	o.drawn, o.bad, o.members = false, false, o.members[:0]
	if cap(o.members) > room {
		o.members = nil
	}
}

// outlined is find in an outline.
func (m *matcher) outlined(key string) value {
	for i := range m.outline.members {
		member := &m.outline.members[i]
		if m.left -= stepCost + len(member.key); m.left <= 0 {
			return value{}
		}
		if m.isKey(member.key, key) {
			w := valueAt(m.event.Data, member.at)
			m.bad = m.bad || w.kind == kindBad
			return w
		}
	}
	m.bad = m.bad || m.outline.bad
	return value{}
}
