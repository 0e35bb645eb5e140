package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestGrowth measures two axes at their first points. That every delivery arrives and is recorded is what each run asserts by itself.
func TestGrowth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw.json")
	var out strings.Builder
	require.NoError(t, run(t.Context(), []string{
		"growth", "-axis", "^(tenants|replicas)$", "-scale", "0.001", "-rounds", "1", "-out", filepath.Join(dir, "plots"), "-json", raw,
	}, &out, t.Output()))

	for _, want := range []string{"tenants: tenants", "\n| 1 | 100 | 1 | ", "\n| 10 | 100 | 1 | ", "replicas: relays", "\n| 2 | 200 | 1 | "} {
		assert.Contains(t, out.String(), want)
	}
	for _, name := range []string{"tenants", "replicas"} {
		svg, err := os.ReadFile(filepath.Join(dir, "plots", name+".svg"))
		require.NoError(t, err)
		assert.Contains(t, string(svg), "µs a delivery")
		assert.Contains(t, string(svg), "</svg>")
	}
	text, err := os.ReadFile(raw)
	require.NoError(t, err)
	var list []grown
	require.NoError(t, json.Unmarshal(text, &list))
	require.Len(t, list, 4)
	for _, g := range list {
		assert.Positive(t, g.Micros, g)
		assert.Positive(t, g.Start, g)
	}
}

func TestGrowthReport(t *testing.T) {
	t.Parallel()
	list := []grown{
		{Axis: "queue", Line: "new events beside them", X: 1000, Round: 1, Deliveries: 9000, Micros: 10, Peak: 30, Slower: 1},
		{Axis: "queue", Line: "new events beside them", X: 1000, Round: 2, Deliveries: 9000, Micros: 20, Peak: 50, Slower: 2},
		{Axis: "queue", Line: "new events beside them", X: 1_000_000, Round: 2, Deliveries: 9000, Micros: 500, CPU: 0.25, Peak: 60, Slower: 3, Start: 4},
	}
	var b strings.Builder
	require.NoError(t, growthReport(&b, list))
	assert.Contains(t, b.String(), "| *new events beside them* | | | | | | | | |\n"+
		"| 1,000 | 9,000 | 2 | 15.0 | 1.00 | – | 40 | 1.50 | 0.00 |\n"+
		"| 1,000,000 | 9,000 | 1 | 500.0 | 25.00 | 0.250 | 60 | 3.00 | 4.00 |\n")
	assert.NotContains(t, b.String(), "due deliveries")
	dir := t.TempDir()
	require.NoError(t, plots(dir, list))
	written, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, written, 1, "what was not measured is not drawn")
}

// TestGrowthLoads: whatever grows, there is something to measure, and each event has a whole number of deliveries.
func TestGrowthLoads(t *testing.T) {
	t.Parallel()
	for _, n := range []int{fewest, 30_000} {
		for _, a := range axes(n) {
			for i := range a.lines {
				l := &a.lines[i]
				for _, x := range l.xs {
					at := l.load(n, x)
					assert.GreaterOrEqual(t, at.deliveries, fewest, "%s %d", a.name, x)
					assert.Zero(t, at.deliveries%at.fanOut(), "%s %d", a.name, x)
				}
				assert.Len(t, l.short(1e-9), 2, a.name)
				assert.Equal(t, l.xs, l.short(1), a.name)
			}
		}
	}
	assert.InDelta(t, 40, linear.at(3, 1, 5, 20, 60), 1e-9)
	assert.InDelta(t, 5, shared.at(4, 1, 4, 20, 60), 1e-9)
	assert.InDelta(t, 20, flat.at(4, 1, 4, 20, 60), 1e-9)
}

func TestGrowthFlags(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"-scale 0":            {"-scale", "0"},
		"-scale 2":            {"-scale", "2"},
		"-rounds 0":           {"-rounds", "0"},
		"-deliveries 1":       {"-deliveries", "1"},
		"-axis":               {"-axis", "("},
		"no axis matches":     {"-axis", "nothing", "-out", t.TempDir()},
		"unexpected argument": {"drain"},
	} {
		assert.ErrorContains(t, run(t.Context(), append([]string{"growth"}, args...), io.Discard, io.Discard), want)
	}
}
