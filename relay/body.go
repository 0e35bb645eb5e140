package relay

import (
	"bytes"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
)

// messages are the bodies of one event, by format.
type messages [delivery.Formats]*delivery.Message

// of encodes the body in scratch, which may be nil, if it fits.
func (m *messages) of(scratch []byte, f delivery.Format, e *outbox.Event, source string) *delivery.Message {
	if m[f] == nil {
		encoded := delivery.Encode(scratch, f, e, source)
		if len(encoded.Body) <= cap(scratch) { // it may be kept for seconds: not a byte more than it needs
			encoded.Body = bytes.Clone(encoded.Body)
		}
		m[f] = &encoded
	}
	return m[f]
}

// sharing is how the deliveries of one event that have one body pay for it: each for its part. That of one that is gone is the window's until the last of them is,
// wherever it was charged: the body is still there, and nothing is on its way to be recorded. What is below belongs to the dispatcher's lock.
type sharing struct {
	holders int
	left    int64 // charged to the window for those that are gone
	paid    int64 // by all that are gone, while there is no holder: the next one takes it over
}

// sharings are those of one event, by format.
type sharings [delivery.Formats]struct {
	n  int
	is *sharing
}

func (s *sharings) count(targets []route.Target) {
	for i := range targets {
		s[targets[i].Endpoint.Format].n++
	}
}

// of has a job pay for its part of the body.
func (s *sharings) of(f delivery.Format, j *job) {
	if s[f].n > 1 && s[f].is == nil {
		s[f].is = new(sharing)
	}
	j.sharing = s[f].is
	j.bytes = int64(jobOverhead + len(j.Message.Body)/s[f].n)
}

// hold takes room for a delivery; release gives it back.
func (d *dispatcher) hold(j *job, where int) {
	if s := j.sharing; s != nil {
		j.bytes += s.paid
		s.paid = 0
		s.holders++
	}
	j.room = where
	d.rooms[where].n++
	j.lane.used++
	if where == inWindow {
		j.lane.windowed++
		j.lane.party.windowed.n++
	}
	d.charge(j.lane.party, where, j.bytes)
}

func (d *dispatcher) leaveRoom(j *job) {
	d.rooms[j.room].n--
	j.lane.used--
	if j.room == inWindow {
		j.lane.windowed--
		j.lane.party.windowed.n--
	}
	d.charge(j.lane.party, j.room, -j.bytes)
	s := j.sharing
	if s == nil {
		return
	}
	part := j.bytes - jobOverhead
	if s.holders--; s.holders > 0 {
		d.charge(j.lane.party, inWindow, part)
		s.left += part
		return
	}
	d.charge(j.lane.party, inWindow, -s.left)
	s.left, s.paid = 0, s.left+part
}

// charge counts bytes of a tenant in a room. All that share a body are the same tenant's.
func (d *dispatcher) charge(p *party, where int, bytes int64) {
	d.rooms[where].bytes += bytes
	if where == inWindow {
		p.windowed.bytes += bytes
	}
}
