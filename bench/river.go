package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
)

const (
	// riverWorkers is above the number of requests that the others have in flight, since a job also holds a worker while it is fetched and completed.
	riverWorkers = 200
	// riverCooldown is the least time between two fetches, and riverPoll the time between two where no notification has come. River's defaults of 100 ms
	// and 1 s would leave the workers idle most of the time.
	riverCooldown = 2 * time.Millisecond
	riverPoll     = 5 * time.Millisecond
	// riverNotify is the least time between two notifications of inserts. Transactions that notify commit one after the other: with one every 2 ms, the
	// writers were slower and all latencies worse, and with one every 50 ms the median was.
	riverNotify = 10 * time.Millisecond
	// riverConns leaves a connection for each fetch, for the batches of completions, and some for River's own upkeep.
	riverConns = 16
)

// webhook is a job: an event on its way to an endpoint.
type webhook struct {
	ID   string          `json:"id"`
	At   time.Time       `json:"timestamp"`
	Data json.RawMessage `json:"data"`
}

// Kind names the job.
func (webhook) Kind() string { return "webhook" }

func newRiver(ctx context.Context, s *stage) (contender, error) {
	driver := riverpgxv5.New(s.pool)
	migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, fmt.Errorf("make River's migrator: %w", err)
	}
	if _, err := migrator.Migrate(ctx, rivermigrate.DirectionUp, nil); err != nil {
		return nil, fmt.Errorf("migrate River: %w", err)
	}
	// A client without queues inserts only. Its cooldown is that of its notifications.
	client, err := river.NewClient(driver, &river.Config{Logger: slog.New(slog.DiscardHandler), FetchCooldown: riverNotify})
	if err != nil {
		return nil, fmt.Errorf("make River's client: %w", err)
	}
	return &service{
		stage: s,
		row: `INSERT INTO river_job (args, kind, max_attempts)
			VALUES (jsonb_build_object('id', ` + idSQL + `, 'timestamp', now(), 'data', ` + dataSQL + `), 'webhook', 25)`,
		add: func(ctx context.Context, tx pgx.Tx, n int) ([]string, error) {
			ids := newIDs(n)
			jobs := make([]river.InsertManyParams, n)
			for i, id := range ids {
				jobs[i].Args = webhook{ID: id, At: time.Now(), Data: data}
			}
			_, err := client.InsertManyFastTx(ctx, tx, jobs)
			return ids, err
		},
		outcomes: "SELECT count(*) FROM river_job WHERE state = 'completed'",
		launch: func(ctx context.Context) (*process, error) {
			return child(ctx, roleRiver, dsnVar+"="+s.dsn, urlVar+"="+s.receiver.url)
		},
	}, nil
}

// workRiver is the role of the child. Jobs that run when ctx is done are finished and completed.
func workRiver(ctx context.Context, dsn, url string) error {
	cfg, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return fmt.Errorf("parse DSN: %w", err)
	}
	cfg.MaxConns = riverConns
	unhurried := context.WithoutCancel(ctx)
	pool, err := pgxpool.NewWithConfig(unhurried, cfg)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer pool.Close()
	s := newSender(url, riverWorkers)
	defer s.close()
	jobs := river.NewWorkers()
	river.AddWorker(jobs, river.WorkFunc(func(ctx context.Context, job *river.Job[webhook]) error {
		_, err := s.post(ctx, job.Args.ID, appendBody(nil, job.Args.ID, job.Args.At, job.Args.Data))
		return err
	}))
	client, err := river.NewClient(riverpgxv5.New(pool), &river.Config{
		FetchCooldown:     riverCooldown,
		FetchPollInterval: riverPoll,
		Logger:            slog.New(slog.DiscardHandler),
		Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: riverWorkers}},
		Workers:           jobs,
	})
	if err != nil {
		return fmt.Errorf("make River's client: %w", err)
	}
	if err := client.Start(unhurried); err != nil {
		return fmt.Errorf("start River's client: %w", err)
	}
	<-ctx.Done()
	if err := client.Stop(unhurried); err != nil {
		return fmt.Errorf("stop River's client: %w", err)
	}
	return nil
}
