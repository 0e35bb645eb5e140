package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/relay/wal"
	"github.com/neo-commons/outbox-relay/schema"
)

// decode reads what the relay reads, from the same slot, and makes events of it: how fast one slot can be.
type decode struct{ *stage }

func newDecode(ctx context.Context, s *stage) (contender, error) {
	return decode{s}, s.found(ctx)
}

func (d decode) fill(ctx context.Context, n int) error { return d.stage.fill(ctx, n, eventSQL) }

func (d decode) drain(ctx context.Context, n int) (drained, error) {
	s, err := wal.Open(ctx, wal.Options{
		URL: d.dsn, Slot: schema.Slot, Publications: []string{schema.EventsPublication, schema.RegistryPublication},
	})
	if err != nil {
		return drained{}, fmt.Errorf("open slot: %w", err)
	}
	r := &reader{left: n}
	limited, cancel := context.WithTimeout(ctx, time.Duration(n)*time.Millisecond+patience)
	defer cancel()
	err = s.Run(limited, r, func() wal.LSN { return 0 })
	if errors.Is(err, errEnough) {
		err = nil
	}
	if err := errors.Join(err, s.Close(ctx)); err != nil {
		return drained{}, fmt.Errorf("read %d events from slot, %d left: %w", n, r.left, err)
	}
	return drained{took: r.last.Sub(r.first)}, nil
}

var errEnough = errors.New("all events are read")

// reader is a wal.Handler that decodes events and drops them.
type reader struct {
	left        int
	plan        *wal.EventPlan
	first, last time.Time
}

func (*reader) Begin(context.Context, wal.Begin) error         { return nil }
func (*reader) Commit(context.Context, wal.Commit) error       { return nil }
func (*reader) Keepalive(context.Context, wal.LSN, bool) error { return nil }
func (r *reader) Change(_ context.Context, c *wal.Change) (err error) {
	if c.Relation.Schema != tenant || c.Relation.Table != "webhook_events" {
		return nil
	}
	if r.plan == nil {
		r.first = time.Now()
		if r.plan, err = wal.NewEventPlan(c.Relation); err != nil {
			return fmt.Errorf("plan events: %w", err)
		}
	}
	if _, err := r.plan.Decode(&c.New); err != nil {
		return fmt.Errorf("decode event: %w", err)
	}
	if r.left--; r.left == 0 {
		r.last = time.Now()
		return errEnough
	}
	return nil
}
