//go:build linux && (amd64 || arm64) && !race

package delivery

import (
	"syscall"
	"unsafe"
)

// These calls never wait: the sockets of the net package do not block. So the scheduler is not told of them, which makes all the difference where processors
// are few. Of a thread that it knows to be in a system call, and that the receiver or the server has taken off its processor there, it gives the work to
// another thread after 20 µs; and as long as there is something to give, its monitor wakes every 20 µs to look for more.
//
// The race detector takes what is sent over a socket for an order between the two sides, but only where it sees the calls: with it, those of syscall_unix.go
// are used.

func sendNow(fd uintptr, p []byte) (int, error) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_WRITE, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p))) //nolint:gosec // as of syscall.Write
	return result(n, errno)
}

func receiveNow(fd uintptr, p []byte) (int, error) {
	n, _, errno := syscall.RawSyscall(syscall.SYS_READ, fd, uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p))) //nolint:gosec // as of syscall.Read
	return result(n, errno)
}

// peekNow takes nothing of what has come in: syscall.EAGAIN says that nothing has.
func peekNow(fd uintptr) error {
	var one [1]byte
	_, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(unsafe.Pointer(&one[0])), 1, syscall.MSG_PEEK|syscall.MSG_DONTWAIT, 0, 0) //nolint:gosec // as of syscall.Recvfrom
	_, err := result(0, errno)
	return err
}

func result(n uintptr, errno syscall.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
