package main

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVar); role != "" { // the suite starts this binary for its processes
		os.Exit(runChild(role))
	}
	os.Exit(m.Run())
}

// TestSuite runs every contender once. That all has arrived, and that every outcome is recorded, is what runSuite asserts by itself; the test makes sure
// that nobody was left out.
func TestSuite(t *testing.T) {
	t.Parallel()
	const events = 500
	r, err := runSuite(t.Context(), options{events: events, rounds: 1, rate: 200, each: 2, steady: time.Second / 2, steadyRounds: 1}, t.Output())
	require.NoError(t, err)

	var drain, steady []string
	for _, m := range r.Drain {
		drain = append(drain, m.Contender)
		assert.Equal(t, events, m.Events, m.Contender)
		assert.Positive(t, m.Rate, m.Contender)
	}
	assert.Equal(t, []string{"post", "decode", "record", "relay", "poller", "river"}, drain)
	for _, m := range r.Steady {
		steady = append(steady, m.Contender)
		assert.InDelta(t, 100, m.Events, 20, m.Contender)
		assert.Less(t, m.P50, m.Max, m.Contender)
	}
	assert.Equal(t, []string{"relay", "poller", "river"}, steady)
}

// TestFaults makes sure that who does not deliver, or forgets what became of the events, is an error, and that the others run all the same.
func TestFaults(t *testing.T) {
	t.Parallel()
	v := venue{dir: t.TempDir(), progress: t.Output(), list: []candidate{
		{name: "dead", enter: func(_ context.Context, s *stage) (contender, error) {
			return &service{stage: s, row: "PERFORM i", launch: func(ctx context.Context) (*process, error) { return child(ctx, "nobody") }}, nil
		}},
		{name: "forgetful", enter: func(ctx context.Context, s *stage) (contender, error) {
			c, err := newPoller(ctx, s)
			if err == nil {
				c.(*service).outcomes = "SELECT 99"
			}
			return c, err
		}},
		{name: "post", enter: newPost},
	}}
	var good []string
	err := v.each(t.Context(), "drain", 1, func(ctx context.Context, _ int, name string, _ *stage, in contender) (string, error) {
		m := measured{Events: 100}
		err := m.drain(ctx, in)
		if err == nil {
			good = append(good, name)
		}
		return "", err
	})
	assert.ErrorContains(t, err, "drain, round 1: dead: nobody has delivered 0 of 100 events\nnobody ended too early: exit status 1\n"+
		roleVar+"=nobody: no such role")
	assert.ErrorContains(t, err, "drain, round 1: forgetful: 99 outcomes are recorded for 100 events")
	assert.Equal(t, []string{"post"}, good)
}

func TestReport(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	require.NoError(t, report(&b, results{
		Drain: []measured{
			{Contender: "post", Round: 1, Events: 9, Rate: 100},
			{Contender: "relay", Round: 1, Events: 9, Rate: 50, CPU: 0.01},
			{Contender: "relay", Round: 2, Events: 9, Rate: 70, CPU: 0.03}, // its post has failed
			{Contender: "post", Round: 3, Events: 9, Rate: 200},
			{Contender: "relay", Round: 3, Events: 9, Rate: 150, CPU: 0.02},
		},
		Steady: []steadied{
			{Contender: "river", Round: 1, Events: 10, Rate: 999.6, P50: 1, P90: 2, P99: 3, Max: 4.125},
			{Contender: "river", Round: 2, Events: 10, Rate: 999.6, P50: 2, P90: 3, P99: 4, Max: 5.125},
		},
	}))
	assert.Contains(t, b.String(), "| post: a bare loop of signed POSTs, no database: the limit | 150 | 100 | 200 | 1.00 | 1.67 | – |\n")
	assert.Contains(t, b.String(), "| relay: outbox-relay, the real binary | 70 | 50 | 150 | 0.62 | 1.00 | 0.020 |\n")
	assert.Contains(t, b.String(), "| river | 1000 | 1.50 | 2.50 | 3.50 | 4.62 | – | 0 |\n")
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"-events 1":            {"-events", "1"},
		"-rate 0":              {"-rate", "0"},
		"-each 0":              {"-each", "0"},
		"-steady-rounds -1":    {"-steady-rounds", "-1"},
		"-only":                {"-only", "("},
		"no contender matches": {"-only", "nobody", "-json", filepath.Join(t.TempDir(), "x.json")},
		"unexpected argument":  {"drain"},
	} {
		assert.ErrorContains(t, run(t.Context(), args, io.Discard, io.Discard), want)
	}
}
