package store_test

import (
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestSilenceIsBounded asks the system: to wait for it would take half a minute.
func TestSilenceIsBounded(t *testing.T) {
	t.Parallel()
	conn, err := setup(t).store.Recording().Acquire(t.Context())
	require.NoError(t, err)
	defer conn.Release()
	socket, ok := conn.Conn().PgConn().Conn().(syscall.Conn)
	require.True(t, ok)
	raw, err := socket.SyscallConn()
	require.NoError(t, err)
	var ms int
	var failed error
	require.NoError(t, raw.Control(func(fd uintptr) { ms, failed = syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, 0x12) })) // TCP_USER_TIMEOUT
	require.NoError(t, failed)
	assert.Equal(t, 30_000, ms)
}
