//go:build unix && !aix

package delivery

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
)

const canLook = true

// wire makes the system calls of a connection itself: to look at it without taking anything from it, and, where that is cheaper, past the scheduler (see
// sendNow). Its functions are made once for each connection.
type wire struct {
	net.Conn

	raw                 syscall.RawConn // nil: there is none, and the connection is not used again
	buf                 []byte          // what is written, or read into
	n                   int             // how much of it has been
	err                 error           // of the last call
	peek, send, receive func(fd uintptr) (done bool)
}

func (w *wire) prepare(conn net.Conn) {
	w.Conn = conn
	counted, ok := conn.(*countedConn)
	if !ok {
		return
	}
	socket, ok := counted.Conn.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return
	}
	w.raw = raw
	w.peek = func(fd uintptr) bool {
		w.err = peekNow(fd)
		return true
	}
	w.send = func(fd uintptr) bool { // till there is no room: of what room there was before nobody is told
		for w.err = nil; w.n < len(w.buf); {
			n, err := sendNow(fd, w.buf[w.n:])
			switch {
			case errors.Is(err, syscall.EINTR):
			case errors.Is(err, syscall.EAGAIN):
				return false
			case err != nil:
				w.err = err
				return true
			}
			w.n += n
		}
		return true
	}
	w.receive = func(fd uintptr) bool {
		for w.err = syscall.EINTR; errors.Is(w.err, syscall.EINTR); {
			w.n, w.err = receiveNow(fd, w.buf)
		}
		return !errors.Is(w.err, syscall.EAGAIN)
	}
}

// alive tells whether the receiver has neither closed an idle connection nor sent something that nobody asked for. The connection's deadline must not
// have passed.
func (w *wire) alive() bool {
	return w.raw != nil && w.raw.Read(w.peek) == nil && errors.Is(w.err, syscall.EAGAIN)
}

// Write implements io.Writer.
func (w *wire) Write(p []byte) (int, error) {
	if w.raw == nil {
		return w.Conn.Write(p)
	}
	w.buf, w.n = p, 0
	err := w.raw.Write(w.send)
	w.buf = nil
	if err == nil {
		err = os.NewSyscallError("write", w.err)
	}
	return w.n, err
}

// Read implements io.Reader.
func (w *wire) Read(p []byte) (int, error) {
	if w.raw == nil {
		return w.Conn.Read(p)
	}
	w.buf, w.n = p, 0
	err := w.raw.Read(w.receive)
	w.buf = nil
	switch {
	case err != nil:
		return 0, err
	case w.err != nil:
		return 0, os.NewSyscallError("read", w.err)
	case w.n == 0:
		return 0, io.EOF
	}
	return w.n, nil
}

// readNow is Read of what is there. os.ErrDeadlineExceeded: there is nothing.
func (w *wire) readNow(p []byte) (n int, err error) {
	if w.raw == nil {
		return 0, io.ErrNoProgress
	}
	failed := w.raw.Read(func(fd uintptr) bool {
		n, err = receiveNow(fd, p)
		return true
	})
	switch {
	case failed != nil:
		return 0, failed
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.EINTR):
		return 0, os.ErrDeadlineExceeded
	case err == nil && n == 0:
		return 0, io.EOF
	}
	return n, os.NewSyscallError("read", err)
}
