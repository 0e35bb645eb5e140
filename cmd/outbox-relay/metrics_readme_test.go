package main

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestReadmeMetrics: the README has what the command prints. UPDATE=1 writes it there.
func TestReadmeMetrics(t *testing.T) {
	t.Parallel()
	const readme, begin, end = "../../README.md", "<!-- metrics -->\n", "<!-- /metrics -->\n"
	made := invoke(t, nil, "metrics")
	require.Equal(t, exitOK, made.code, made.err)
	text, err := os.ReadFile(readme)
	require.NoError(t, err)
	head, rest, found := strings.Cut(string(text), begin)
	require.True(t, found)
	is, tail, found := strings.Cut(rest, end)
	require.True(t, found)
	if os.Getenv("UPDATE") != "" {
		require.NoError(t, os.WriteFile(readme, []byte(head+begin+"\n"+made.out+"\n"+end+tail), 0o644))
		return
	}
	require.Equal(t, "\n"+made.out+"\n", is, "not up to date: UPDATE=1 go test -run TestReadmeMetrics ./cmd/outbox-relay")
}
