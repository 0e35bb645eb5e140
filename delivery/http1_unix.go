//go:build unix && !aix

package delivery

import (
	"errors"
	"syscall"
)

const canLook = true

// alive tells whether the receiver has neither closed an idle connection nor sent something that nobody asked for. The connection's deadline must not
// have passed.
func (c *http1Conn) alive() bool {
	counted, ok := c.Conn.(*countedConn)
	if !ok {
		return false
	}
	socket, ok := counted.Conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return false
	}
	quiet := false
	err = raw.Read(func(fd uintptr) bool {
		var one [1]byte
		_, _, err := syscall.Recvfrom(int(fd), one[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		quiet = errors.Is(err, syscall.EAGAIN)
		return true
	})
	return err == nil && quiet
}
