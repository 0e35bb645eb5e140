//go:build !unix || aix

package delivery

// canLook tells whether alive can see what has come in on an idle connection. Where it cannot, net/http does all requests: its own goroutine
// reads idle connections, too.
const canLook = false

// alive does not know.
func (c *http1Conn) alive() bool { return false }
