package main

import (
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
	r, err := runSuite(t.Context(), options{events: events, rounds: 1, rate: 200, steady: time.Second}, t.Output())
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
		assert.InDelta(t, 200, m.Events, 20, m.Contender)
		assert.Less(t, m.P50, m.Max, m.Contender)
	}
	assert.Equal(t, []string{"relay", "poller", "river"}, steady)
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
		Steady: []steadied{{Contender: "river", Events: 10, Rate: 999.6, P50: 1, P90: 2, P99: 3, Max: 4.125}},
	}))
	assert.Contains(t, b.String(), "| post: a bare loop of signed POSTs, no database: the limit | 150 | 100 | 200 | 1.00 | 1.67 | – |\n")
	assert.Contains(t, b.String(), "| relay: outbox-relay, the real binary | 70 | 50 | 150 | 0.62 | 1.00 | 0.020 |\n")
	assert.Contains(t, b.String(), "| river | 1000 | 1.00 | 2.00 | 3.00 | 4.12 | – | 0 |\n")
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"-events 1":            {"-events", "1"},
		"-rate 0":              {"-rate", "0"},
		"-only":                {"-only", "("},
		"no contender matches": {"-only", "nobody", "-json", filepath.Join(t.TempDir(), "x.json")},
		"unexpected argument":  {"drain"},
	} {
		assert.ErrorContains(t, run(t.Context(), args, io.Discard, io.Discard), want)
	}
}
