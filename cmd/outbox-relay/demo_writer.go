package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
)

// demoWriters is how many connections the application writes with.
const demoWriters = 4

// demoInsert is a way to write events in a transaction of the application's.
type demoInsert func(ctx context.Context, tx pgx.Tx, schema string, events []outbox.Event) error

// demoInserts are the ways an application may choose from; the relay cannot tell them apart.
func demoInserts() []demoInsert {
	return []demoInsert{
		func(ctx context.Context, tx pgx.Tx, schema string, events []outbox.Event) error {
			for _, e := range events {
				if _, err := outbox.Insert(ctx, tx, schema, e); err != nil {
					return err
				}
			}
			return nil
		},
		func(ctx context.Context, tx pgx.Tx, schema string, events []outbox.Event) error {
			_, err := outbox.InsertMany(ctx, tx, schema, events)
			return err
		},
		func(ctx context.Context, tx pgx.Tx, schema string, events []outbox.Event) error {
			for _, e := range events {
				_, err := tx.Exec(ctx, "INSERT INTO "+table(schema, "webhook_events")+` (id, event_type, aggregate_id, aggregate_type, event_data)
					VALUES ($1, $2, $3, $4, $5)`, e.ID, e.Type, e.AggregateID, e.AggregateType, e.Data)
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// write is the application: it inserts all events and returns.
func (d *demo) write(ctx context.Context) error {
	pace := &demoPace{left: d.events, rate: d.rate, began: time.Now()}
	d.oracle.begin(pace.began)
	group, ctx := errgroup.WithContext(ctx)
	inserts := demoInserts()
	for i := range demoWriters {
		w := &demoWriter{
			demo: d, insert: inserts[i%len(inserts)],
			rnd: rand.New(rand.NewPCG(d.seed, uint64(i)+1)), //nolint:gosec // a show that can be repeated, not a secret
		}
		group.Go(func() error {
			if err := w.run(ctx, pace); err != nil {
				return fmt.Errorf("insert events: %w", err)
			}
			return nil
		})
	}
	return group.Wait()
}

// demoPace hands out the events to be inserted, each at its time: one that is late does not make those after it late.
type demoPace struct {
	rate  float64 // events per second; zero: at once
	began time.Time

	mu         sync.Mutex
	left, done int
}

// take waits until up to n events are due and returns how many there are; none at the end.
func (p *demoPace) take(ctx context.Context, n int) (int, error) {
	p.mu.Lock()
	n = min(n, p.left)
	p.left -= n
	p.done += n
	done := p.done
	p.mu.Unlock()
	if p.rate == 0 || n == 0 {
		return n, ctx.Err()
	}
	t := time.NewTimer(time.Until(p.began.Add(time.Duration(float64(done) / p.rate * float64(time.Second)))))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-t.C:
		return n, nil
	}
}

// demoWriter is one connection of the application.
type demoWriter struct {
	*demo
	insert demoInsert
	rnd    *rand.Rand
}

func (w *demoWriter) run(ctx context.Context, pace *demoPace) error {
	for {
		n, err := pace.take(ctx, 1+w.rnd.IntN(3))
		if n == 0 || err != nil {
			return err
		}
		if err := w.transaction(ctx, n); err != nil {
			return err
		}
	}
}

// transaction inserts n events of a tenant. One transaction in twelve rolls back, one in six goes back to a savepoint.
func (w *demoWriter) transaction(ctx context.Context, n int) error {
	tenant := demoTenants()[w.rnd.IntN(len(demoTenants()))]
	mood, kept := w.rnd.IntN(12), n
	if mood <= 2 {
		kept = w.rnd.IntN(n)
	}
	if mood == 0 {
		kept = 0
	}
	rows, pairs, err := w.events(tenant, n, kept)
	if err != nil {
		return err
	}
	if mood == 0 {
		err = w.changeMind(ctx, w.site.pool, tenant, rows)
	} else {
		err = pgx.BeginFunc(ctx, w.site.pool, func(tx pgx.Tx) error {
			if err := w.insert(ctx, tx, tenant, rows[:kept]); err != nil || kept == n {
				return err
			}
			return w.changeMind(ctx, tx, tenant, rows[kept:])
		})
	}
	if err != nil {
		return err
	}
	w.oracle.committed(time.Now(), kept, pairs)
	w.oracle.rolledBack(n - kept)
	return nil
}

// events makes n events, the first of which will be kept, and says where those have to arrive.
func (w *demoWriter) events(tenant string, n, kept int) (rows []outbox.Event, pairs []demoPair, err error) {
	rows = make([]outbox.Event, n)
	for i := range rows {
		e := newDemoEvent(w.rnd)
		if rows[i], err = e.row(); err != nil {
			return nil, nil, err
		}
		for _, ep := range w.endpoints {
			if i < kept && ep.wants(tenant, e) {
				pairs = append(pairs, demoPair{ep.id, rows[i].ID})
			}
		}
	}
	return rows, pairs, nil
}

// errChangedMind makes pgx.BeginFunc roll back.
var errChangedMind = errors.New("the application has changed its mind")

// changeMind inserts events in a transaction, or below a savepoint of one, and rolls back.
func (w *demoWriter) changeMind(ctx context.Context, db interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}, tenant string, rows []outbox.Event,
) error {
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		if err := w.insert(ctx, tx, tenant, rows); err != nil {
			return err
		}
		return errChangedMind
	})
	if errors.Is(err, errChangedMind) {
		return nil
	}
	return err
}
