package main

import (
	"context"
	"net"
	"net/http"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// conns are the connections that a server has accepted and that are not closed. What a process has sent before it was killed may still be on its way through them.
type conns struct {
	mu   sync.Mutex
	open map[string]bool // by address of the other end; false: closed
}

func (c *conns) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch peer := conn.RemoteAddr().String(); state {
	case http.StateNew:
		if c.open == nil {
			c.open = make(map[string]bool)
		}
		c.open[peer] = true
	case http.StateClosed, http.StateHijacked:
		c.open[peer] = false
	case http.StateActive, http.StateIdle:
	}
}

// settle waits until the receiver is done with all that was sent to it by processes that have ended. No other may be connected to it.
func (r *receiver) settle(ctx context.Context, t testing.TB) {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", r.Listener.Addr().String()) // it is accepted after all that came before
	require.NoError(t, err)
	own := conn.LocalAddr().String()
	require.NoError(t, conn.Close())
	r.await(ctx, t, "the end of what was sent", func() bool {
		r.conns.mu.Lock()
		defer r.conns.mu.Unlock()
		if _, accepted := r.conns.open[own]; !accepted {
			return false
		}
		for _, open := range r.conns.open {
			if open {
				return false
			}
		}
		return true
	})
}
