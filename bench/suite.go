package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"time"
)

// options say what to measure.
type options struct {
	events int           // of a drain
	rounds int           // of the drain; none if zero
	rate   float64       // of the steady load, in events a second
	steady time.Duration // length of the steady load; none if zero
	only   *regexp.Regexp
}

// measured is one drain.
type measured struct {
	Contender string  `json:"contender"`
	Round     int     `json:"round"`
	Events    int     `json:"events"`
	Rate      float64 `json:"rate"`           // events a second
	CPU       float64 `json:"cpu_s_per_1000"` // zero where it is not known
}

// results are the raw numbers, in the order in which they were measured.
type results struct {
	Drain  []measured `json:"drain"`
	Steady []steadied `json:"steady"`
}

// runSuite measures. What could be measured is in the results even if there is an error; a contender that has not delivered everything is one.
func runSuite(ctx context.Context, o options, progress io.Writer) (r results, err error) {
	dir, err := os.MkdirTemp("", "outbox-relay-bench-")
	if err != nil {
		return r, fmt.Errorf("make folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var list []candidate
	for _, c := range candidates() {
		if o.only == nil || o.only.MatchString(c.name) {
			list = append(list, c)
		}
	}
	if len(list) == 0 {
		return r, fmt.Errorf("no contender matches %q", o.only)
	}
	fmt.Fprintln(progress, "building the relay")
	binary, err := buildRelay(ctx, dir)
	if err != nil {
		return r, err
	}
	var faults []error
	for round := range o.rounds {
		for i := range list {
			c := list[(i+round)%len(list)] // each comes after each other one
			m := measured{Contender: c.name, Round: round + 1, Events: o.events}
			err := onStage(ctx, binary, dir, c, func(_ *stage, in contender) error { return m.drain(ctx, in) })
			if ctx.Err() != nil {
				return r, ctx.Err()
			}
			if err != nil {
				faults = append(faults, fmt.Errorf("drain, round %d: %s: %w", m.Round, c.name, err))
				fmt.Fprintln(progress, faults[len(faults)-1])
				continue
			}
			fmt.Fprintf(progress, "drain, round %d of %d: %-8s %8.0f events/s\n", m.Round, o.rounds, c.name, m.Rate)
			r.Drain = append(r.Drain, m)
		}
	}
	if o.steady > 0 {
		faults = append(faults, steadySuite(ctx, o, list, binary, dir, &r, progress))
	}
	return r, errors.Join(faults...)
}

// steadySuite measures the steady load of those that can deliver one.
func steadySuite(ctx context.Context, o options, list []candidate, binary, dir string, r *results, progress io.Writer) error {
	var faults []error
	for _, c := range list {
		m := steadied{Contender: c.name}
		err := onStage(ctx, binary, dir, c, func(s *stage, in contender) (err error) {
			if d, ok := in.(deliverer); ok {
				m, err = runSteady(ctx, s, d, o)
			}
			return err
		})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("steady load: %s: %w", c.name, err))
			fmt.Fprintln(progress, faults[len(faults)-1])
			continue
		}
		if m.Events == 0 {
			continue
		}
		m.Contender = c.name
		fmt.Fprintf(progress, "steady load: %-8s p50 %.1f ms, p99 %.1f ms at %.0f events/s\n", c.name, m.P50, m.P99, m.Rate)
		r.Steady = append(r.Steady, m)
	}
	return errors.Join(faults...)
}

// onStage sets up a stage for one run of one contender and takes it down again.
func onStage(ctx context.Context, binary, dir string, c candidate, run func(*stage, contender) error) (err error) {
	s, err := newStage(ctx, binary, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }() //nolint:contextcheck // it ends in order even if ctx is done
	in, err := c.enter(ctx, s)
	if err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return run(s, in)
}

func (m *measured) drain(ctx context.Context, in contender) error {
	if err := in.fill(ctx, m.Events); err != nil {
		return err
	}
	d, err := in.drain(ctx, m.Events)
	if err != nil {
		return err
	}
	if d.took <= 0 {
		return fmt.Errorf("%d events took no time", m.Events)
	}
	m.Rate, m.CPU = float64(m.Events)/d.took.Seconds(), per1000(d.cpu, m.Events)
	return nil
}
