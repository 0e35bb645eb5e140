package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

const (
	// backfillPage is how many events one step of a backfill reads.
	backfillPage = 500
	// snapshotEvery is how often the leader notes which transactions are recorded.
	snapshotEvery = 30 * time.Second
)

// fill takes every waiting backfill one page further, until none is left: events that were in a tenant's table before the log carried them
// become pending rows. The rows and the place reached are written together, so a restart goes on where it stopped. A tenant whose page failed is left
// out for a while.
func (s *session) fill(ctx context.Context, left aside) error {
	for {
		list, err := s.store.Backfills(ctx)
		if err != nil {
			return fmt.Errorf("list backfills: %w", err)
		}
		if len(list) == 0 {
			clear(s.gates)
		}
		var worked bool
		var faults error
		for _, b := range list {
			t := s.tenant(b.Tenant)
			if t == nil || !t.is(store.StateActive) || left.has(b.Tenant) {
				continue
			}
			ready, err := s.mayFill(ctx, b)
			if err == nil && ready {
				err = s.fillPage(ctx, t)
			}
			left.note(b.Tenant, err)
			if err != nil {
				faults = errors.Join(faults, fmt.Errorf("backfill tenant %q: %w", b.Tenant, err))
				continue
			}
			worked = worked || ready
		}
		if !worked || faults != nil {
			return faults
		}
	}
}

// mayFill tells whether the routing table is as new as the request: who asks for older events may have subscribed a moment before.
func (s *session) mayFill(ctx context.Context, b store.Backfill) (bool, error) {
	gate, known := s.gates[b]
	if !known {
		var err error
		if _, gate, err = s.store.Snapshot(ctx); err != nil {
			return false, err
		}
		s.gates[b] = gate
	}
	if wal.LSN(s.confirmed.Load()) >= gate {
		return true, nil
	}
	s.recorder.writePosition() // or a quiet log keeps it waiting
	return false, nil
}

func (s *session) fillPage(ctx context.Context, t *tenant) error {
	page, err := s.store.BackfillPage(ctx, t.schema, backfillPage)
	if err != nil {
		return err
	}
	var p portion
	parted := false // the event before was too much for one
	for i := range page.Events {
		if parted || p.holds(1, s.cfg()) {
			page.Cut(i)
			break
		}
		e := &page.Events[i]
		targets := t.Match(e, nil)
		if len(targets) == 0 {
			continue
		}
		var m messages
		refused := s.inspector.look(t.schema, t, e, targets)
		for _, target := range targets {
			if p.holds(2, s.cfg()) { // one event with many endpoints: if its page comes again, rows that are there stay as they are
				if err := s.store.Queue(ctx, s.epoch, p.out); err != nil {
					return err
				}
				s.queued(p.out)
				p, parted = portion{}, true
			}
			p.add(missed(t.schema, e, target, &m, page.Places[i], s.cfg().Delivery.Source, store.DeferBackfill, refused))
		}
	}
	if u := page.Unreadable; u != nil {
		s.log.Error("an event cannot be read, and is left out", "tenant", t.schema, "event", u.ID, "error", u.Err,
			"hint", "delete it, or make it shorter and run for each of its endpoints: outbox-relay endpoints recover ENDPOINT -t "+t.schema+" --since "+u.ID.String())
	}
	if err := s.store.RecordBackfill(ctx, s.epoch, page, p.out); err != nil {
		return err
	}
	failpoint.Hit(failpoint.HealQueued)
	s.queued(p.out)
	if page.Done {
		s.log.Info("backfill done", "tenant", t.schema)
		// A tenant that was moved may have rows that the other shard's leader wrote after the tenant had come here: what is to be sent goes behind those.
		if err := s.blockOrdered(ctx, []string{t.schema}); err != nil {
			return fmt.Errorf("load what waits in order: %w", err)
		}
		t.setFilling(false)
		s.resumed.Store(true) // what was parked behind it
		signal(s.attention)
	}
	return nil
}

// A portion is what is queued in one transaction, past the recorder.
type portion struct {
	out   []store.Outcome
	bytes int // of bodies
}

func (p *portion) add(o store.Outcome) {
	p.out = append(p.out, o)
	p.bytes += len(o.Delivery.Message.Body)
}

// holds tells whether it is n times what the recorder writes at once, or what a page of small events comes to. A larger transaction costs memory on both
// sides, and keeps the row of the position, for which the outcomes of all tenants wait.
func (p *portion) holds(n int, cfg *Config) bool {
	return len(p.out) >= n*max(cfg.Record.Batch, backfillPage) || p.bytes > n*maxBatchBytes
}

// A checkpoint is a snapshot of the database that is saved once everything it shows has been recorded: what a later heal need not look at.
type checkpoint struct {
	saved    store.Snapshot     // the one before; zero: none, and the audit goes back to the admission of each tenant
	routes   map[string]version // the routing tables when that was taken; nil: by another session
	taken    time.Time
	snapshot store.Snapshot
	lsn      wal.LSN            // whatever the snapshot shows lies below; zero: nothing waits to be saved
	next     map[string]version // the routing tables when it was taken
	read     uint64             // events that had been read when the last one was saved
}

// checkPublished suspends the tenants whose events, or changes of whose routing, the log does not carry. It comes after a snapshot is taken and
// before it is saved, which would count what they have committed as handled: they are resumed from the one before. It returns which they are.
func (s *session) checkPublished(ctx context.Context) (tables map[string]string, err error) {
	tables, err = s.store.Unpublished(ctx)
	if err != nil {
		return nil, err
	}
	for name, list := range tables {
		t := s.tenant(name)
		if t == nil || t.until != 0 {
			continue
		}
		if err := s.markSuspended(ctx, t, errors.New("tables are not published: "+list)); err != nil { // resuming it publishes them
			return nil, err
		}
	}
	return tables, nil
}

// advance takes a snapshot now and then, and saves it when the recorded position has reached it.
func (c *checkpoint) advance(ctx context.Context, s *session) error {
	if c.lsn == 0 && time.Since(c.taken) >= snapshotEvery {
		next := s.routes() // before: with a change that the snapshot does not show, what it does not show would be judged by it
		snapshot, lsn, err := s.store.Snapshot(ctx)
		if err != nil {
			return fmt.Errorf("read snapshot: %w", err)
		}
		c.taken, c.snapshot, c.lsn, c.next = time.Now(), snapshot, lsn, next
	}
	if c.lsn == 0 {
		return nil
	}
	if wal.LSN(s.confirmed.Load()) < c.lsn {
		if s.read.Load() != c.read { // a log without events may take its time
			s.recorder.writePosition()
		}
		return nil
	}
	unpublished, err := s.checkPublished(ctx)
	if err != nil {
		return err
	}
	if err := s.audit(ctx, c.saved, c.snapshot, c.routes, unpublished); err != nil {
		return err
	}
	failpoint.Hit(failpoint.Audited)
	if err := s.store.SaveSnapshot(ctx, s.epoch, c.snapshot); err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	c.saved, c.routes, c.lsn, c.read = c.snapshot, c.next, 0, s.read.Load()
	return c.saveDigests(ctx, s)
}

// saveDigests comes after the snapshot has been saved: those of an older one say less, and nothing that is not true.
func (c *checkpoint) saveDigests(ctx context.Context, s *session) error {
	fresh := make(map[string]int64)
	for name, v := range c.next {
		if t := s.tenant(name); t != nil && (t.saved == nil || *t.saved != int64(v.digest)) {
			fresh[name] = int64(v.digest)
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	saved, err := s.store.SaveDigests(ctx, s.epoch, fresh)
	for _, name := range saved {
		if t := s.tenant(name); t != nil {
			t.saved = new(fresh[name])
		}
	}
	return err
}

// routes tells which state each tenant's routing table is in.
func (s *session) routes() map[string]version {
	routes := make(map[string]version)
	for _, t := range s.served() {
		routes[t.schema] = t.version()
	}
	return routes
}
