//go:build !unix || aix

package delivery

import (
	"io"
	"net"
)

// canLook tells whether alive can see what has come in on an idle connection. Where it cannot, net/http does all requests: its own goroutine
// reads idle connections, too.
const canLook = false

type wire struct{ net.Conn }

func (w *wire) prepare(conn net.Conn) { w.Conn = conn }

func (*wire) alive() bool { return false }

func (*wire) readNow([]byte) (int, error) { return 0, io.ErrNoProgress }
