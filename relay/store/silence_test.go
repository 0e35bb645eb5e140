package store_test

import (
	"context"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// way leads to the server. Once frozen, it keeps what is sent on the connections there are, without a word; new ones it takes.
type way struct {
	mu    sync.Mutex
	ends  []net.Conn
	until chan struct{} // closed to freeze what there is
}

func (b *bundle) way() (w *way, url string) {
	b.t.Helper()
	l, err := new(net.ListenConfig).Listen(b.t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(b.t, err)
	w = &way{until: make(chan struct{})}
	server := b.admin.Config().ConnConfig
	target := net.JoinHostPort(server.Host, strconv.Itoa(int(server.Port)))
	url = strings.Replace(b.url, target, l.Addr().String(), 1)
	require.NotEqual(b.t, b.url, url)
	var group sync.WaitGroup
	pass := func(to, from net.Conn, frozen <-chan struct{}) {
		buf := make([]byte, 1<<16)
		for {
			n, err := from.Read(buf)
			select {
			case <-frozen:
				_, _ = io.Copy(io.Discard, from) // until the end of the test
				return
			default:
			}
			if err == nil {
				_, err = to.Write(buf[:n])
			}
			if err != nil {
				_, _ = to.Close(), from.Close()
				return
			}
		}
	}
	group.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := new(net.Dialer).Dial("tcp", target)
			if err != nil {
				_ = near.Close()
				continue
			}
			w.mu.Lock()
			w.ends = append(w.ends, near, far)
			frozen := w.until
			w.mu.Unlock()
			group.Go(func() { pass(far, near, frozen) })
			group.Go(func() { pass(near, far, frozen) })
		}
	})
	b.t.Cleanup(func() {
		_ = l.Close()
		w.mu.Lock()
		for _, c := range w.ends {
			_ = c.Close()
		}
		w.mu.Unlock()
		group.Wait()
	})
	return w, url
}

func (w *way) freeze() {
	w.mu.Lock()
	defer w.mu.Unlock()
	close(w.until)
	w.until = make(chan struct{})
}

// TestSilentConnection: a connection that has been idle and leads nowhere any more costs a look, not the work of all who have no bound of their own.
func TestSilentConnection(t *testing.T) {
	t.Parallel()
	b := setup(t)
	w, url := b.way()
	s, err := store.New(t.Context(), store.Config{URL: url, Slot: b.slot, ConnectTimeout: 5 * time.Second, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(s.Close)
	_, err = s.SlotState(t.Context())
	require.NoError(t, err)
	<-time.After(1100 * time.Millisecond) // the pool trusts one that was idle for less than a second
	w.freeze()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	state, err := s.SlotState(ctx)
	require.NoError(t, err)
	assert.True(t, state.Known)
}

// TestCloseBesideSilence: a statement that gets no answer does not keep the relay from ending.
func TestCloseBesideSilence(t *testing.T) {
	t.Parallel()
	b := setup(t)
	w, url := b.way()
	s, err := store.New(t.Context(), store.Config{URL: url, Slot: b.slot, ConnectTimeout: 5 * time.Second, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	t.Cleanup(func() { cancel(); asking.Wait() })
	w.freeze()
	asking.Go(func() { _, _ = s.SlotState(ctx) })
	require.Eventually(t, func() bool { return s.Pool().Acquired > 0 }, 30*time.Second, time.Millisecond)
	closed := make(chan struct{})
	asking.Go(func() { s.Close(); close(closed) })
	select {
	case <-closed:
	case <-time.After(30 * time.Second):
		t.Error("the store waits for an answer that will not come")
	}
}
