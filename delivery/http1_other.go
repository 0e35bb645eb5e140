//go:build !unix

package delivery

// alive does not know: a connection that has been idle for a moment is made anew.
func (c *http1Conn) alive() bool { return false }
