//go:build unix && !aix

package delivery

import (
	"errors"
	"net"
	"syscall"
)

const canLook = true

// look is what alive needs, made once for each connection.
type look struct {
	raw   syscall.RawConn
	quiet bool
	peek  func(fd uintptr) bool
}

func (l *look) prepare(conn net.Conn) {
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
	l.raw, l.peek = raw, func(fd uintptr) bool {
		var one [1]byte
		_, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		l.quiet = errors.Is(err, syscall.EAGAIN)
		return true
	}
}

// alive tells whether the receiver has neither closed an idle connection nor sent something that nobody asked for. The connection's deadline must not
// have passed.
func (l *look) alive() bool {
	l.quiet = false
	return l.raw != nil && l.raw.Read(l.peek) == nil && l.quiet
}
