package relay

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestBodyCountsUntilItsLastDelivery has twenty endpoints share bodies, of which one hangs: what it keeps is what the window counts.
func TestBodyCountsUntilItsLastDelivery(t *testing.T) {
	t.Parallel()
	b := newBench(10_000)
	b.cfg.Window.Bytes = 8 * MiB
	e := &engine{}
	e.config.Store(b.cfg)
	s := &session{engine: e, ledger: b.ledger}
	const endpoints, size = 20, 64 << 10
	for i := range endpoints {
		format := delivery.FormatStandard
		if i == endpoints-1 {
			format = delivery.FormatRaw // a body of its own
		}
		s.targets = append(s.targets, route.Target{Endpoint: &delivery.Endpoint{ID: outbox.UUID{byte(i + 1)}, Concurrency: 1, Host: fmt.Sprint(i), Format: format}})
	}
	hangs, data := outbox.UUID{1}, bytes.Repeat([]byte{'1'}, size)
	kept := 0
	for range 1000 {
		jobs := s.jobs(&tenant{schema: "t"}, &outbox.Event{ID: outbox.NewUUID(), Type: "a.b", Data: data, OccurredAt: time.Now()})
		total := int64(0)
		for _, j := range jobs {
			total += j.bytes
		}
		require.InDelta(t, 2*size+endpoints*jobOverhead, total, 4096, "two bodies")
		for _, j := range jobs {
			j.commit = noCommit
			b.admit(t.Context(), j)
		}
		if len(b.deferrals) > 0 {
			break
		}
		kept++
		for j := b.nextJob(); j != nil; j = b.nextJob() {
			if j.EndpointID != hangs {
				b.finish(j, verdict{})
				b.release([]*job{j})
			}
		}
		require.InDelta(t, kept*(size+jobOverhead), b.bytes(), float64(kept*1024), "one body each is left")
	}
	require.NotEmpty(t, b.deferrals)
	require.InDelta(t, int(b.cfg.Window.Bytes)/size, kept, 12)
}

// TestBodyOutlivesTheNextEvent, which is encoded in the same place while the deliveries of the one before are on their way.
func TestBodyOutlivesTheNextEvent(t *testing.T) {
	t.Parallel()
	scratch := make([]byte, 0, 4096)
	encode := func(data string) *delivery.Message {
		var m messages
		return m.of(scratch, delivery.FormatStandard, &outbox.Event{ID: outbox.NewUUID(), Type: "a.b", Data: []byte(data), OccurredAt: time.Now()}, "")
	}
	first := encode(`{"n":1}`)
	require.Contains(t, string(encode(`{"n":2}`).Body), `{"n":2}`)
	require.Contains(t, string(first.Body), `{"n":1}`)
}

// TestBodyIsPaidForOnce: whatever comes and goes in whatever order, nothing is counted when all are gone.
func TestBodyIsPaidForOnce(t *testing.T) {
	t.Parallel()
	b := newBench(100)
	share := new(sharing)
	make3 := func() (list []*job) {
		for i := range 3 {
			j := b.job(fmt.Sprint("e", i), 1)
			j.sharing, j.bytes = share, jobOverhead+100
			b.lane(j)
			list = append(list, j)
		}
		return list
	}
	jobs := make3()
	b.hold(jobs[0], inWindow)
	b.leaveRoom(jobs[0])
	require.Zero(t, b.bytes(), "nobody has it now")
	b.hold(jobs[1], inReserve)
	require.EqualValues(t, jobOverhead+200, b.rooms[inReserve].bytes, "whoever comes after that pays for those before")
	b.hold(jobs[2], inWindow)
	b.leaveRoom(jobs[1])
	require.Zero(t, b.rooms[inReserve].bytes)
	require.EqualValues(t, jobOverhead+300, b.rooms[inWindow].bytes, "the body is in the window as long as somebody has it")
	require.EqualValues(t, jobOverhead+300, jobs[2].lane.party.windowed.bytes)
	b.leaveRoom(jobs[2])
	require.Zero(t, b.bytes())
	require.Zero(t, jobs[2].lane.party.windowed.bytes)
}

// TestBodyDoesNotFillTheDeferrals has nineteen of twenty endpoints paused and one hang: what is recorded leaves the room of what is about to be.
func TestBodyDoesNotFillTheDeferrals(t *testing.T) {
	t.Parallel()
	b := newBench(1000)
	e := &engine{}
	e.config.Store(b.cfg)
	s := &session{engine: e, ledger: b.ledger}
	for i := range 20 {
		s.targets = append(s.targets, route.Target{Endpoint: &delivery.Endpoint{ID: outbox.UUID{byte(i + 1)}, Concurrency: 1, Host: fmt.Sprint(i)}})
	}
	const size = 64 << 10
	jobs := s.jobs(&tenant{schema: "t"}, &outbox.Event{ID: outbox.NewUUID(), Type: "a.b", Data: bytes.Repeat([]byte{'1'}, size), OccurredAt: time.Now()})
	for i, j := range jobs {
		j.commit = noCommit
		if i == 0 {
			b.admit(t.Context(), j)
			continue
		}
		b.postpone(t.Context(), j, store.DeferPaused, parked)
		b.release([]*job{j})
	}
	require.Zero(t, b.rooms[inDeferral].bytes)
	require.InDelta(t, size, b.rooms[inWindow].bytes, 2048)
	require.InDelta(t, size, jobs[0].lane.party.windowed.bytes, 2048)
}
