package main

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
)

// recordBatch is the relay's record.batch.
const recordBatch = 1000

// record writes what the relay writes for events that are delivered at the first attempt, in as many transactions as it needs at least.
type record struct {
	*stage

	outcomes []store.Outcome
}

func newRecord(ctx context.Context, s *stage) (contender, error) {
	return &record{stage: s}, s.found(ctx)
}

// fill makes the outcomes, so that drain does nothing but write them.
func (r *record) fill(ctx context.Context, n int) error {
	var endpoint outbox.UUID
	if err := r.pool.QueryRow(ctx, "SELECT id FROM "+tenant+".webhook_endpoints").Scan(&endpoint); err != nil {
		return fmt.Errorf("find endpoint: %w", err)
	}
	at := time.Now()
	for range n {
		id := outbox.NewUUID()
		r.outcomes = append(r.outcomes, store.Outcome{
			Delivery: &store.Delivery{
				ID: outbox.NewUUID(), Tenant: tenant, EventID: id, EndpointID: endpoint, URL: r.receiver.url, Method: "POST", Attempts: 1,
				Message: &delivery.Message{ID: id, Body: appendBody(nil, id.String(), at, data), ContentType: "application/json"},
			},
			Status: store.Success, Attempted: true,
			Result: delivery.Result{
				Class: delivery.ClassSuccess, Status: 200, Started: at, Duration: time.Millisecond,
				Signature: "v1,K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
			},
		})
	}
	return nil
}

func (r *record) drain(ctx context.Context, n int) (drained, error) {
	s, err := store.New(ctx, store.Config{URL: r.dsn, Slot: schema.Slot, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return drained{}, fmt.Errorf("open store: %w", err)
	}
	defer s.Close()
	p, err := s.Lead(ctx, store.LeadOptions{})
	if err != nil {
		return drained{}, fmt.Errorf("lead: %w", err)
	}
	owner := outbox.NewUUID()
	began := time.Now()
	for batch := range slices.Chunk(r.outcomes[:n], recordBatch) {
		p.LSN++ // each batch moves the position in the log, as the relay's do
		broken, err := s.Record(ctx, owner, &p, batch)
		if err != nil {
			return drained{}, err
		}
		if len(broken) > 0 {
			return drained{}, fmt.Errorf("record outcomes: %w", &broken[0])
		}
	}
	return drained{took: time.Since(began)}, nil
}
