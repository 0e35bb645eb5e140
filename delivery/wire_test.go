//go:build unix && !aix

package delivery

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// wired returns the two ends of a connection, of which the first is a wire.
func wired(t *testing.T) (*wire, *net.TCPConn) {
	t.Helper()
	conn, other := ends(t)
	w := new(wire)
	w.prepare(conn)
	require.NotNil(t, w.raw)
	return w, other
}

func ends(t *testing.T) (*countedConn, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // of this machine
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	conn, err := net.Dial("tcp", l.Addr().String()) //nolint:noctx // as above
	require.NoError(t, err)
	other, err := l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() {
		_ = conn.Close()
		_ = other.Close()
	})
	return &countedConn{Conn: conn, release: func() {}}, other.(*net.TCPConn)
}

// TestWireWaits: what does not fit into the buffers of the sockets is written as they are emptied, and what has not come yet is read when it has.
func TestWireWaits(t *testing.T) {
	t.Parallel()
	w, other := wired(t)
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	got := make(chan []byte)
	go func() {
		b := make([]byte, len(sent))
		_, _ = io.ReadFull(other, b)
		_, _ = other.Write(b[:100])
		got <- b
	}()
	n, err := w.Write(sent)
	require.NoError(t, err)
	require.Equal(t, len(sent), n)
	answer := make([]byte, 100)
	_, err = io.ReadFull(w, answer)
	require.NoError(t, err)
	require.True(t, bytes.Equal(sent, <-got))
	require.Equal(t, sent[:100], answer)
}

// TestWireDeadline: both ways it ends a wait, says what has been written, and leaves the connection as it was.
func TestWireDeadline(t *testing.T) {
	t.Parallel()
	w, other := wired(t)
	one := make([]byte, 1)
	past := make(chan error)
	go func() {
		_, _ = io.ReadFull(other, one) // some of it has been written
		past <- w.SetDeadline(time.Unix(1, 0))
	}()
	big := make([]byte, 64<<20)
	n, err := w.Write(big)
	require.NoError(t, <-past)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.Positive(t, n)
	require.Less(t, n, len(big))
	_, err = w.Read(one)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	var timeout net.Error
	require.ErrorAs(t, err, &timeout)
	assert.True(t, timeout.Timeout())

	require.NoError(t, w.SetDeadline(time.Time{}))
	_, err = io.CopyN(io.Discard, other, int64(n)-1)
	require.NoError(t, err)
	_, err = other.Write([]byte("x"))
	require.NoError(t, err)
	_, err = w.Read(one)
	require.NoError(t, err)
	require.Equal(t, "x", string(one))
}

// TestWireEnds: an end, a reset and a connection that is closed are the errors that net.Conn has for them.
func TestWireEnds(t *testing.T) {
	t.Parallel()
	one := make([]byte, 1)
	w, other := wired(t)
	require.True(t, w.alive())
	require.NoError(t, other.CloseWrite())
	_, err := w.Read(one)
	require.ErrorIs(t, err, io.EOF)
	require.False(t, w.alive())

	w, other = wired(t)
	_, err = w.Write(one)
	require.NoError(t, err)
	require.NoError(t, other.SetLinger(0))
	require.NoError(t, other.Close())
	_, err = w.Read(one)
	require.ErrorIs(t, err, syscall.ECONNRESET)
	_, err = w.Write(one)
	require.ErrorIs(t, err, syscall.EPIPE)

	w, other = wired(t)
	_, err = other.Write(one)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return !w.alive() }, 10*time.Second, time.Millisecond, "an answer that nobody asked for")

	w, _ = wired(t)
	require.NoError(t, w.Close())
	_, err = w.Write(one)
	require.ErrorIs(t, err, net.ErrClosed)
	_, err = w.Read(one)
	require.ErrorIs(t, err, net.ErrClosed)
	require.False(t, w.alive())
}

func TestWireAllocatesNothing(t *testing.T) { //nolint:paralleltest // AllocsPerRun counts the whole process
	w, other := wired(t)
	one := make([]byte, 1)
	echo := make([]byte, 1)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		if !w.alive() {
			t.Error("not alive")
		}
		_, _ = w.Write(one)
		_, _ = io.ReadFull(other, echo)
		_, _ = other.Write(echo)
		_, _ = w.Read(one)
	}))
}

// TestFarewellDoesNotWait: a receiver that reads nothing more does not hold up whoever closes its connection.
func TestFarewellDoesNotWait(t *testing.T) {
	t.Parallel()
	conn, other := ends(t)
	shaken := make(chan error, 1)
	go func() {
		shaken <- tls.Server(other, &tls.Config{Certificates: []tls.Certificate{testCertificate()}}).HandshakeContext(t.Context())
	}()
	c := newHTTP1Conn(conn, 0)
	c.secure = tls.Client(&c.beneath, &tls.Config{InsecureSkipVerify: true})
	require.NoError(t, c.secure.HandshakeContext(t.Context()))
	require.NoError(t, <-shaken)
	for n := 1; n > 0; { // until there is no room
		require.NoError(t, c.SetDeadline(time.Now().Add(100*time.Millisecond)))
		var err error
		n, err = c.Write(make([]byte, 64<<20))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	}
	began := time.Now()
	c.close()
	assert.Less(t, time.Since(began), 3*time.Second, "crypto/tls waits for five")
}
