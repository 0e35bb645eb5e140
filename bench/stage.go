package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// patience is how long nothing may arrive before a contender is given up.
const patience = 30 * time.Second

// contender is one way of getting events from a table to a receiver, or a part of that which bounds how fast it can be.
type contender interface {
	// fill commits n events for it. It is called once, before drain.
	fill(ctx context.Context, n int) error
	// drain works them off.
	drain(ctx context.Context, n int) (drained, error)
}

// deliverer is a contender that also takes events while they are committed.
type deliverer interface {
	contender
	// start starts it. The caller stops the process.
	start(ctx context.Context) (*process, error)
	// insert adds n events in one round trip and returns their ids.
	insert(ctx context.Context, tx pgx.Tx, n int) (ids []string, err error)
}

// drained is the result of one drain.
type drained struct {
	took time.Duration // from the first event to the last
	cpu  time.Duration // of the contender's process; zero if it has none
	// The rest is told of growth only.
	start  time.Duration // from the start of the process to the first event
	peak   int64         // memory of the process, in bytes
	slower float64       // time of the last tenth of the events ÷ time of the first
}

// candidate is a contender that is not on stage yet.
type candidate struct {
	name   string
	about  string
	steady bool // it is a deliverer
	enter  func(ctx context.Context, s *stage) (contender, error)
}

func candidates() []candidate {
	return []candidate{
		{"post", "a bare loop of signed POSTs, no database: the limit", false, newPost},
		{"decode", "reading and decoding the backlog from a slot, nothing else", false, newDecode},
		{"record", "writing as many outcomes in batches of 1,000, nothing else", false, newRecord},
		{"relay", "outbox-relay, the real binary", true, newRelay},
		{"poller", "a polling outbox: SKIP LOCKED, batches, outcomes by UPDATE … FROM unnest", true, newPoller},
		{"river", "the job queue River, a job per event", true, newRiver},
	}
}

// stage is where a contender runs once: a durable server and a receiver of its own. What another one has left behind, in tables to be vacuumed and
// log to be skipped, would be measured otherwise.
type stage struct {
	binary   string // of the relay
	dir      string // for files, removed by who made it
	together int    // events in a transaction of a backlog, 1 if zero
	server   *pgtest.Server
	dsn      string
	pool     *pgxpool.Pool
	receiver *receiver
	relays   int // started so far
}

// newStage sets a stage up. The caller closes it.
func newStage(ctx context.Context, binary, dir string) (*stage, error) {
	s := &stage{binary: binary, dir: dir}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.close()) //nolint:contextcheck // what there is goes, even if ctx is why
	}
	return s, nil
}

func (s *stage) open(ctx context.Context) (err error) {
	s.server, err = pgtest.Start(ctx, pgtest.Options{Durable: true, Config: map[string]string{"shared_buffers": "512MB", "max_wal_size": "8GB"}})
	if err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	s.dsn = s.server.URL("postgres")
	if s.pool, err = pgxpool.New(ctx, s.dsn); err != nil {
		return fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	if err := s.moveApart(ctx); err != nil {
		return err
	}
	s.receiver, err = newReceiver(ctx)
	return err
}

func (s *stage) close() error {
	var err error
	if s.receiver != nil {
		err = s.receiver.close()
	}
	if s.pool != nil {
		s.pool.Close()
	}
	if s.server != nil {
		err = errors.Join(err, s.server.Close())
	}
	return err
}

func (s *stage) exec(ctx context.Context, statements ...string) error {
	for _, sql := range statements {
		if _, err := s.pool.Exec(ctx, sql); err != nil {
			head, _, _ := strings.Cut(strings.TrimSpace(sql), "\n")
			return fmt.Errorf("%s: %w", head, err)
		}
	}
	return nil
}

// fill executes an INSERT n times, with i as its number, some of them together in a transaction. The end makes all of it durable, and lets the planner
// know of the rows, as autovacuum would have in time.
func (s *stage) fill(ctx context.Context, n int, insert string) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return fmt.Errorf("insert %d events: %w", n, err)
	}
	defer conn.Release()
	for _, sql := range []string{
		"SET synchronous_commit = off",
		fmt.Sprintf("DO $$ BEGIN FOR i IN 1..%d LOOP %s; IF i %% %d = 0 THEN COMMIT; END IF; END LOOP; END $$", n, insert, max(s.together, 1)),
		"RESET synchronous_commit",
		"ANALYZE",
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("insert %d events: %w", n, err)
		}
	}
	return nil
}

// await waits until n events have arrived. It gives up when the process ends, or nothing more arrives for a while.
func (s *stage) await(ctx context.Context, p *process, n int) (state, error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var last state
	moved := time.Now()
	for {
		now, err := s.receiver.state(ctx)
		switch {
		case err != nil:
			return now, err
		case now.events >= n:
			return now, nil
		case now.events > last.events:
			last, moved = now, time.Now()
		case time.Since(moved) > patience:
			return now, fmt.Errorf("%s delivered %d of %d events, and no more for %s\n%s", p.name, now.events, n, patience, p.stderr.String())
		}
		select {
		case <-tick.C:
		case <-p.ended:
			return now, fmt.Errorf("%s has delivered %d of %d events", p.name, now.events, n) // stop tells how it ended
		case <-ctx.Done():
			return now, ctx.Err()
		}
	}
}

// service is a contender that is a process: the relay and its alternatives.
type service struct {
	*stage

	// row is the INSERT of one event of a backlog, add that of n events of a steady load.
	row string
	add func(ctx context.Context, tx pgx.Tx, n int) (ids []string, err error)
	// outcomes counts the durable outcomes: nobody may be fast by forgetting them.
	outcomes string
	launch   func(ctx context.Context) (*process, error)
}

func (s *service) fill(ctx context.Context, n int) error { return s.stage.fill(ctx, n, s.row) }

func (s *service) start(ctx context.Context) (*process, error) { return s.launch(ctx) }

func (s *service) insert(ctx context.Context, tx pgx.Tx, n int) ([]string, error) {
	return s.add(ctx, tx, n)
}

func (s *service) drain(ctx context.Context, n int) (drained, error) {
	p, err := s.launch(ctx)
	if err != nil {
		return drained{}, err
	}
	d, err := s.finish(ctx, p, n)
	if err := errors.Join(err, p.stop()); err != nil {
		return d, err
	}
	return d, s.recorded(ctx, n)
}

// finish waits for the end of a drain.
func (s *stage) finish(ctx context.Context, p *process, n int) (drained, error) {
	now, err := s.await(ctx, p, n)
	return drained{took: now.span, cpu: p.cpu()}, err
}

// recorded makes sure that every event has its outcome, after the process has ended in order.
func (s *service) recorded(ctx context.Context, n int) error {
	var got int
	if err := s.pool.QueryRow(ctx, s.outcomes).Scan(&got); err != nil {
		return fmt.Errorf("count outcomes: %w", err)
	}
	if got != n {
		return fmt.Errorf("%d outcomes are recorded for %d events", got, n)
	}
	return nil
}
