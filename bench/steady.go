package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

// writersOf is the number of connections that commit a steady load of so many transactions a second: each has 4 ms for one.
func writersOf(rate float64) int { return max(4, int(rate/250)) }

// steadied is the result of one steady load.
type steadied struct {
	Contender  string  `json:"contender"`
	Round      int     `json:"round"`
	Events     int     `json:"events"`
	Rate       float64 `json:"rate"` // of the commits, in events a second; less than was asked for if the database is too slow
	P50        float64 `json:"p50_ms"`
	P90        float64 `json:"p90_ms"`
	P99        float64 `json:"p99_ms"`
	Max        float64 `json:"max_ms"`
	CPU        float64 `json:"cpu_s_per_1000"`
	Duplicates int     `json:"duplicates"`
}

// runSteady has one contender deliver a steady load and measures the time from each COMMIT to its receipt.
func runSteady(ctx context.Context, s *stage, d deliverer, o options) (r steadied, err error) {
	p, err := d.start(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	// The first event tells that the contender is up, and that what is built at the first use is there.
	if _, err := commit(ctx, s, d, time.Now(), time.Now().Add(time.Nanosecond), time.Hour, 1); err != nil {
		return r, err
	}
	if _, err := s.await(ctx, p, 1); err != nil {
		return r, err
	}
	cpu := p.cpu()
	committed, took, err := s.load(ctx, d, o)
	if err != nil {
		return r, err
	}
	now, err := s.await(ctx, p, len(committed)+1)
	if err != nil {
		return r, err
	}
	cpu = p.cpu() - cpu
	arrived, err := s.receiver.arrived(ctx)
	if err != nil {
		return r, err
	}
	delays := make([]time.Duration, 0, len(committed))
	for id, at := range committed {
		got, ok := arrived[id]
		if !ok {
			return r, fmt.Errorf("event %s has not arrived", id)
		}
		delays = append(delays, got.Sub(at))
	}
	slices.Sort(delays)
	return steadied{
		Events: len(delays), Rate: float64(len(delays)) / took.Seconds(), Duplicates: now.requests - now.events,
		P50: quantile(delays, 0.5), P90: quantile(delays, 0.9), P99: quantile(delays, 0.99), Max: quantile(delays, 1),
		CPU: per1000(cpu, len(delays)),
	}, nil
}

// load commits events at a rate, from several connections in turn, and returns when the COMMIT of each returned.
func (s *stage) load(ctx context.Context, d deliverer, o options) (map[string]time.Time, time.Duration, error) {
	commits := o.rate / float64(o.each)
	n := writersOf(commits)
	parts := make([]map[string]time.Time, n)
	gap := time.Duration(float64(time.Second) / commits)
	began := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for i := range n {
		group.Go(func() (err error) {
			parts[i], err = commit(ctx, s, d, began.Add(time.Duration(i)*gap), began.Add(o.steady), time.Duration(n)*gap, o.each)
			return err
		})
	}
	err := group.Wait()
	took := time.Since(began)
	all := make(map[string]time.Time)
	for _, part := range parts {
		maps.Copy(all, part)
	}
	return all, took, err
}

// commit commits each events in one transaction every gap from one time to another. Where a commit takes longer than that, the next follows at
// once until it has caught up.
func commit(ctx context.Context, s *stage, d deliverer, from, to time.Time, gap time.Duration, each int) (committed map[string]time.Time, err error) {
	conn, err := pgx.Connect(ctx, s.dsn)
	if err != nil {
		return nil, fmt.Errorf("connect writer: %w", err)
	}
	defer func() { err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) }()
	committed = make(map[string]time.Time)
	timer := time.NewTimer(time.Until(from))
	defer timer.Stop()
	for at := from; at.Before(to); at = at.Add(gap) {
		timer.Reset(time.Until(at))
		select {
		case <-timer.C:
		case <-ctx.Done():
			return committed, ctx.Err()
		}
		var ids []string
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) (err error) {
			ids, err = d.insert(ctx, tx, each)
			return err
		})
		if err != nil {
			return committed, fmt.Errorf("insert event: %w", err)
		}
		now := time.Now()
		for _, id := range ids {
			committed[id] = now
		}
	}
	return committed, nil
}

// quantile is that of a sorted list, in milliseconds.
func quantile(list []time.Duration, q float64) float64 {
	if len(list) == 0 {
		return 0
	}
	return float64(list[int(q*float64(len(list)-1))].Microseconds()) / 1000
}

// per1000 is the time on a processor for 1,000 events, in seconds.
func per1000(cpu time.Duration, events int) float64 {
	if events == 0 {
		return 0
	}
	return cpu.Seconds() * 1000 / float64(events)
}
