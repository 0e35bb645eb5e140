package main

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestApart has the server of a stage on one processor, with all the processes that it has and those that it starts.
func TestApart(t *testing.T) {
	t.Setenv(apartVar, "0")
	s, err := newStage(t.Context(), "", t.TempDir())
	require.NoError(t, err)
	defer func() { require.NoError(t, s.close()) }()
	rows, err := s.pool.Query(t.Context(), "SELECT pid FROM pg_stat_activity")
	require.NoError(t, err)
	defer rows.Close()
	n := 0
	for ; rows.Next(); n++ {
		var pid int
		require.NoError(t, rows.Scan(&pid))
		var cpus unix.CPUSet
		require.NoError(t, unix.SchedGetaffinity(pid, &cpus))
		assert.True(t, cpus.IsSet(0) && cpus.Count() == 1, "process %d", pid)
	}
	require.NoError(t, rows.Err())
	assert.Greater(t, n, 3)
}
