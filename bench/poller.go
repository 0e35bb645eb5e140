package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sync/errgroup"
)

const (
	// pollers is the number of batches under way. While one writes its outcomes or fetches, the others keep the workers busy.
	pollers = 4
	// pollBatch is the number of rows of one batch at most.
	pollBatch = 500
	// pollInterval is how long a poller rests that has found nothing; all four together look four times as often. A NOTIFY in each transaction took a
	// third off the median latency, but transactions that notify commit one after the other: of 1,000 a second, the writers got 400 to 700.
	pollInterval = 5 * time.Millisecond
)

// pollerSQL is the outbox of a team that polls: the row carries its own outcome. Only what is pending is in the index.
const pollerSQL = `CREATE TABLE outbox (
	id uuid PRIMARY KEY, event_type text NOT NULL, event_data jsonb NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
	due timestamptz NOT NULL DEFAULT now(), attempts int NOT NULL DEFAULT 0, delivered_at timestamptz, http_status int, duration_us bigint)`

const (
	pollerIndex = `CREATE INDEX outbox_pending ON outbox (due) WHERE delivered_at IS NULL`
	// fetchSQL locks the rows for as long as the attempts take: a lease would be a second update of every row.
	fetchSQL = `SELECT id::text, created_at, event_data FROM outbox WHERE delivered_at IS NULL AND due <= now()
		ORDER BY due LIMIT $1 FOR UPDATE SKIP LOCKED`
	settleSQL = `UPDATE outbox o SET attempts = o.attempts + 1, http_status = u.status, duration_us = u.took,
			delivered_at = CASE WHEN u.ok THEN now() END, due = CASE WHEN u.ok THEN o.due ELSE now() + interval '30 s' * 2 ^ o.attempts END
		FROM unnest($1::uuid[], $2::bool[], $3::int[], $4::bigint[]) u (id, ok, status, took) WHERE o.id = u.id`
)

func newPoller(ctx context.Context, s *stage) (contender, error) {
	if err := s.exec(ctx, pollerSQL, pollerIndex); err != nil {
		return nil, err
	}
	return &service{
		stage: s,
		row:   `INSERT INTO outbox (id, event_type, event_data) VALUES (` + idSQL + `, 'order.created', ` + dataSQL + `)`,
		add: func(ctx context.Context, tx pgx.Tx, n int) ([]string, error) {
			ids := newIDs(n)
			_, err := tx.Exec(ctx, `INSERT INTO outbox (id, event_type, event_data) SELECT unnest($1::uuid[]), $2, $3`, ids, "order.created", data)
			return ids, err
		},
		outcomes: "SELECT count(*) FROM outbox WHERE delivered_at IS NOT NULL",
		launch: func(ctx context.Context) (*process, error) {
			return child(ctx, rolePoller, dsnVar+"="+s.dsn, urlVar+"="+s.receiver.url)
		},
	}, nil
}

// attempt is one row of a batch, and what became of it.
type attempt struct {
	id     string
	at     time.Time
	data   []byte
	ok     bool
	status int32
	took   int64 // microseconds
	done   *sync.WaitGroup
}

// poller is the role of the child.
type poller struct {
	pool   *pgxpool.Pool
	sender *sender
	work   chan *attempt
}

// poll delivers until ctx is done. The batches that are under way are then finished and recorded.
func poll(ctx context.Context, dsn, url string) error {
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return fmt.Errorf("parse DSN: %w", err)
	}
	cfg.MaxConns = pollers
	// A plan that was made while the table was small is kept for long by a prepared statement: it must be the one by the indexes.
	cfg.ConnConfig.RuntimeParams["enable_seqscan"] = "off"
	cfg.ConnConfig.RuntimeParams["enable_bitmapscan"] = "off"
	cfg.ConnConfig.RuntimeParams["jit"] = "off"
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer pool.Close()
	p := &poller{pool: pool, sender: newSender(url, workers), work: make(chan *attempt, workers)}
	defer p.sender.close()
	unhurried := context.WithoutCancel(ctx)
	var sending sync.WaitGroup
	for range workers {
		sending.Go(func() { p.send(unhurried) })
	}
	group, polling := errgroup.WithContext(ctx)
	for i := range pollers {
		group.Go(func() error { return p.loop(polling, time.Duration(i)*pollInterval/pollers) })
	}
	err = group.Wait()
	close(p.work)
	sending.Wait()
	return err
}

func (p *poller) send(ctx context.Context) {
	var body []byte
	for a := range p.work {
		body = appendBody(body[:0], a.id, a.at, a.data)
		began := time.Now()
		status, err := p.sender.post(ctx, a.id, body)
		a.ok, a.status, a.took = err == nil, int32(status), time.Since(began).Microseconds() //nolint:gosec // three digits
		a.done.Done()
	}
}

// loop works off batches, at once one after the other while there are any.
func (p *poller) loop(ctx context.Context, offset time.Duration) error {
	rest := time.NewTimer(offset) // or all would look at the same time
	defer rest.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-rest.C:
		}
		for ctx.Err() == nil {
			n, err := p.batch(context.WithoutCancel(ctx))
			if err != nil {
				return err
			}
			if n == 0 {
				break
			}
		}
		rest.Reset(pollInterval)
	}
}

// batch fetches, sends and records in one transaction. What a crash interrupts is pending again at once.
func (p *poller) batch(ctx context.Context) (n int, err error) {
	err = pgx.BeginFunc(ctx, p.pool, func(tx pgx.Tx) error {
		list, err := fetch(ctx, tx)
		if n = len(list); n == 0 || err != nil {
			return err
		}
		var done sync.WaitGroup
		done.Add(n)
		for i := range list {
			list[i].done = &done
			p.work <- &list[i]
		}
		done.Wait()
		return settle(ctx, tx, list)
	})
	if err != nil {
		return n, fmt.Errorf("work off a batch: %w", err)
	}
	return n, nil
}

func fetch(ctx context.Context, tx pgx.Tx) ([]attempt, error) {
	rows, err := tx.Query(ctx, fetchSQL, pollBatch)
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (a attempt, err error) {
		return a, row.Scan(&a.id, &a.at, &a.data)
	})
	if err != nil {
		return nil, fmt.Errorf("fetch: %w", err)
	}
	return list, nil
}

func settle(ctx context.Context, tx pgx.Tx, list []attempt) error {
	ids, oks := make([]string, len(list)), make([]bool, len(list))
	statuses, tooks := make([]int32, len(list)), make([]int64, len(list))
	for i, a := range list {
		ids[i], oks[i], statuses[i], tooks[i] = a.id, a.ok, a.status, a.took
	}
	if _, err := tx.Exec(ctx, settleSQL, ids, oks, statuses, tooks); err != nil {
		return fmt.Errorf("record %d outcomes: %w", len(list), err)
	}
	return nil
}
