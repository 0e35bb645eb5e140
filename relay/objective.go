package relay

import (
	"encoding/binary"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Objective is what the relay is held to.
type Objective struct {
	// Latency is the time after the COMMIT of an event within which the first attempt of each of its deliveries is to be answered.
	Latency time.Duration `mapstructure:"latency"`
}

func (o Objective) validate(f *faults) { atLeast(f, "objective.latency", o.Latency, time.Millisecond) }

// The objective counts every delivery that the log brings once, when the first of three things happens to it: its first attempt has ended, it becomes a row
// (so it is missed, unless the attempt is made up for in time), or it has been attempted for longer than it may hold back the log. It is counted as met when
// the first attempt is answered within the latency of the COMMIT, by whichever relay. So in any period met and total differ by what was late, and by what is
// on its way at that moment.
//
//	log ──► total, with ──► attempt ended ───────────────► met, if answered in time
//	              └───────► row ──► claimed, attempted ──► met, if answered in time
//
// A delivery that is claimed is known by its id: a version 7 UUID whose time is that of the COMMIT, where the last bit says so. That costs no column, and what
// the log did not bring (backfills, heals, recoveries, audits) has no such id and is not counted.

// committedID makes an id for a delivery of an event that was committed at a time, to the millisecond.
func committedID(at time.Time) outbox.UUID {
	id := outbox.NewUUID()
	first := store.FirstID(at)
	copy(id[:6], first[:6]) // behind it are the version, a part of a millisecond and chance
	id[15] |= 1
	return id
}

// uncommittedID makes an id for a delivery that the log has not brought.
func uncommittedID() outbox.UUID {
	id := outbox.NewUUID()
	id[15] &^= 1
	return id
}

// committedAt is the COMMIT that an id tells of; zero: it tells of none.
func committedAt(id outbox.UUID) time.Time {
	if id[6]>>4 != 7 || id[15]&1 == 0 {
		return time.Time{}
	}
	return time.UnixMilli(int64(binary.BigEndian.Uint64(id[:8]) >> 16))
}

// objective is the three counters of the relay, of a tenant, or of an endpoint.
type objective struct{ total, met, unanswered prometheus.Counter }

// owe counts a delivery of the log, unless it has been counted.
func (m *metrics) owe(j *job) {
	if j.committed.IsZero() || !j.owed.CompareAndSwap(false, true) {
		return
	}
	m.objective.total.Inc()
	for _, s := range m.shares {
		s.of(j.Tenant, j.EndpointID).total.Inc()
	}
}

// tried counts the end of an attempt. Only the first one of a delivery says how late it is, and not one that we ended ourselves: it will be made again.
func (m *metrics) tried(j *job, res *delivery.Result) {
	for _, s := range m.shares {
		s.of(j.Tenant, j.EndpointID).attempts[res.Class].Inc()
	}
	if res.Class == delivery.ClassCanceled || res.Class == delivery.ClassLocal {
		m.owe(j)
		return
	}
	if j.Attempts > 0 {
		return
	}
	if j.Replay > 0 {
		m.replays.Inc()
		return
	}
	if j.committed.IsZero() {
		return
	}
	m.owe(j)
	began, ended := res.Started.Sub(j.committed), res.Started.Add(res.Duration).Sub(j.committed)
	m.toAttempt.Observe(max(began.Seconds(), 0))
	m.latency.Observe(max(ended.Seconds(), 0))
	m.judge(&m.objective, began, ended, res)
	for _, s := range m.shares {
		t := s.of(j.Tenant, j.EndpointID)
		t.latency.Observe(max(ended.Seconds(), 0))
		m.judge(&t.objective, began, ended, res)
	}
}

// judge tells what was met from what the receiver is to blame for. The rest is the relay's, or was on its way when it had to be.
func (m *metrics) judge(o *objective, began, ended time.Duration, res *delivery.Result) {
	switch {
	case res.Status > 0 && ended <= m.within:
		o.met.Inc()
	case began <= m.within:
		o.unanswered.Inc()
	}
}
