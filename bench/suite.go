package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"time"
)

// options say what to measure.
type options struct {
	events       int           // of a drain
	each         int           // events of a transaction
	rounds       int           // of the drain; none if zero
	rate         float64       // of the steady load, in events a second
	steady       time.Duration // length of a steady load; none if zero
	steadyRounds int           // of the steady load
	only         *regexp.Regexp
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
	v := venue{binary: binary, dir: dir, together: o.each, list: list, progress: progress}
	err = v.each(ctx, "drain", o.rounds, func(ctx context.Context, round int, name string, _ *stage, in contender) (string, error) {
		m := measured{Contender: name, Round: round, Events: o.events}
		if err := m.drain(ctx, in); err != nil {
			return "", err
		}
		r.Drain = append(r.Drain, m)
		return fmt.Sprintf("%.0f events/s", m.Rate), nil
	})
	if o.steady == 0 || ctx.Err() != nil {
		return r, err
	}
	v.list = slices.DeleteFunc(v.list, func(c candidate) bool { return !c.steady })
	again := v.each(ctx, "steady load", o.steadyRounds, func(ctx context.Context, round int, name string, s *stage, in contender) (string, error) {
		d, ok := in.(deliverer)
		if !ok {
			return "", errors.New("it cannot deliver a steady load")
		}
		m, err := runSteady(ctx, s, d, o)
		if err != nil {
			return "", err
		}
		m.Contender, m.Round = name, round
		r.Steady = append(r.Steady, m)
		return fmt.Sprintf("p50 %.1f ms, p99 %.1f ms at %.0f events/s", m.P50, m.P99, m.Rate), nil
	})
	return r, errors.Join(err, again)
}

// venue is where rounds are run.
type venue struct {
	binary, dir string // of the relay, and for files
	together    int    // events in a transaction of a backlog, 1 if zero
	list        []candidate
	most        map[string]int // rounds of candidates that do not run in all of them, by name
	progress    io.Writer
}

// performance measures one contender once and says in a few words how it was.
type performance func(ctx context.Context, round int, name string, s *stage, in contender) (string, error)

// each has every contender run once in every round. The order rotates, as each leaves the machine in a state of its own: warm, or with a disk that is
// still writing. A contender that fails is told of and does not keep the others from running.
func (v *venue) each(ctx context.Context, what string, rounds int, run performance) error {
	var faults []error
	for round := 1; round <= rounds; round++ {
		for i := range v.list {
			c := v.list[(i+round-1)%len(v.list)]
			if most, few := v.most[c.name]; few && round > most {
				continue
			}
			var how string
			err := v.onStage(ctx, c, func(s *stage, in contender) (err error) {
				how, err = run(ctx, round, c.name, s, in)
				return err
			})
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				err = fmt.Errorf("%s, round %d: %s: %w", what, round, c.name, err)
				faults = append(faults, err)
				fmt.Fprintln(v.progress, err)
				continue
			}
			fmt.Fprintf(v.progress, "%s, round %d of %d: %-8s %s\n", what, round, rounds, c.name, how)
		}
	}
	return errors.Join(faults...)
}

// onStage sets up a stage for one run of one contender and takes it down again.
func (v *venue) onStage(ctx context.Context, c candidate, run func(*stage, contender) error) (err error) {
	s, err := newStage(ctx, v.binary, v.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.close()) }() //nolint:contextcheck // it ends in order even if ctx is done
	s.together = v.together
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
