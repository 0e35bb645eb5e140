package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestCost runs every set-up once. That the relay has delivered and recorded everything is what measureCosts asserts by itself.
func TestCost(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	require.NoError(t, runCost(t.Context(), []string{"-rounds", "1", "-length", "300ms", "-rate", "200"}, &out, t.Output()))
	rows := strings.Split(strings.TrimSpace(out.String()), "\n")[4:]
	require.Len(t, rows, len(setups), out.String())
	for i, row := range rows {
		assert.Contains(t, row, "| "+setups[i]+" | ")
	}
}

func TestCostRefuses(t *testing.T) {
	t.Parallel()
	for flag, want := range map[string]string{
		"-rounds=0": "-rounds 0: 1 or more", "-length=0s": "-length 0s: more than 0", "-rate=-1": "-rate -1: more than 0", "more": `unexpected argument "more"`,
	} {
		assert.EqualError(t, runCost(t.Context(), []string{flag}, &strings.Builder{}, t.Output()), want)
	}
}

// TestInsertFor: at a rate, each transaction waits for its time.
func TestInsertFor(t *testing.T) {
	t.Parallel()
	s, err := newStage(t.Context(), "", t.TempDir())
	require.NoError(t, err)
	defer func() { assert.NoError(t, s.close()) }() // a cleanup would come after the end of the context
	require.NoError(t, s.found(t.Context()))
	waits, took, err := s.insertFor(t.Context(), 2, 500*time.Millisecond, 100*time.Millisecond)
	require.NoError(t, err)
	assert.Len(t, waits, 10) // two connections, half a gap apart
	assert.Greater(t, took, 400*time.Millisecond)
}
