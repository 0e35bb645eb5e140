package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

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
// become pending rows. The rows and the place reached are written together, so a restart goes on where it stopped.
func (s *session) fill(ctx context.Context) error {
	for {
		names, err := s.store.Backfills(ctx)
		if err != nil {
			return fmt.Errorf("list backfills: %w", err)
		}
		var worked bool
		var faults error
		for _, name := range names {
			t := s.tenant(name)
			if t == nil || !t.is(stateActive) {
				continue
			}
			if err := s.fillPage(ctx, t); err != nil {
				faults = errors.Join(faults, fmt.Errorf("backfill tenant %q: %w", name, err))
				continue
			}
			worked = true
		}
		if !worked || faults != nil {
			return faults
		}
	}
}

func (s *session) fillPage(ctx context.Context, t *tenant) error {
	page, err := s.store.BackfillPage(ctx, t.schema, backfillPage)
	if err != nil {
		return err
	}
	var out []store.Outcome
	for i := range page.Events {
		e := &page.Events[i]
		for _, target := range t.match(e, nil) {
			out = append(out, s.missed(t, e, target, deferBackfill))
		}
	}
	if err := s.store.RecordBackfill(ctx, s.epoch, page, out); err != nil {
		return err
	}
	if page.Done {
		s.log.Info("backfill done", "tenant", t.schema)
	}
	s.queued(out)
	return nil
}

// A checkpoint is a snapshot of the database that is saved once everything it shows has been recorded: what a later heal need not look at.
type checkpoint struct {
	taken    time.Time
	snapshot store.Snapshot
	lsn      wal.LSN // whatever the snapshot shows lies below; zero: nothing waits to be saved
}

// advance takes a snapshot now and then, and saves it when the recorded position has reached it.
func (c *checkpoint) advance(ctx context.Context, s *session) error {
	if c.lsn == 0 && time.Since(c.taken) >= snapshotEvery {
		snapshot, lsn, err := s.store.Snapshot(ctx)
		if err != nil {
			return fmt.Errorf("read snapshot: %w", err)
		}
		c.taken, c.snapshot, c.lsn = time.Now(), snapshot, lsn
	}
	if c.lsn == 0 || wal.LSN(s.confirmed.Load()) < c.lsn {
		return nil
	}
	if err := s.store.SaveSnapshot(ctx, s.epoch, c.snapshot); err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	c.lsn = 0
	return nil
}
