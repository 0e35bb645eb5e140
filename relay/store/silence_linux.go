package store

import (
	"strings"
	"syscall"
)

const tcpUserTimeout = 0x12 // TCP_USER_TIMEOUT, which package syscall leaves out

// boundSilence is a net.Dialer.Control. Keepalives, which are on without it, only cover a connection on which nothing is under way: what was sent and is not
// acknowledged is sent again for a quarter of an hour.
func boundSilence(network, _ string, conn syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var err error
	if failed := conn.Control(func(fd uintptr) {
		err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(silence.Milliseconds()))
	}); failed != nil {
		return failed
	}
	return err
}
