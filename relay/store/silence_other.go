//go:build !linux

package store

import "syscall"

// boundSilence leaves it to the system, which gives up after a quarter of an hour or so.
func boundSilence(string, string, syscall.RawConn) error { return nil }
