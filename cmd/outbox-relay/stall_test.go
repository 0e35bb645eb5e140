package main

import (
	"context"
	wire "encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestStalledStream: the server lives, answers and has log to send, but nothing of it arrives any more. The relay finds out, starts the stream again, and
// loses nothing; while there is nothing to send it is left alone for as long.
func TestStalledStream(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{Config: map[string]string{"wal_sender_timeout": "3s"}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := newSiteOn(t, server.URL("postgres"), "", func(outbox.UUID, string) int { return http.StatusOK }, "acme")
	link := newSwallower(t, s.dsn)
	yaml, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.config, []byte(strings.Replace(string(yaml), "  slot:", fmt.Sprintf("  replication_url: %q\n  slot:", link.url), 1)), 0o600))
	e := s.endpoint(t, "acme", 0)
	s.subscribe(t, "acme", e, "order.created", "{}")
	p := startRelay(t, s.config)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	insert := func() {
		_, err := outbox.Insert(ctx, s.pool, "acme", outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order", Data: []byte("{}")})
		require.NoError(t, err)
	}
	insert()
	s.receiver.await(ctx, t, "an event", func() bool { return s.receiver.pairs() == 1 })
	select { // more than twice the time after which a stream has stalled: that this one is idle only time can show
	case <-time.After(8 * time.Second):
	case <-ctx.Done():
	}
	assert.NotContains(t, p.said(t), "the log does not come")

	s.receiver.await(ctx, t, "a keepalive on the way", func() bool { return link.seen.Load() > 0 })
	link.swallow()
	insert()
	s.receiver.await(ctx, t, "an event after the stream has stalled", func() bool { return s.receiver.pairs() == 2 })
	assert.Contains(t, p.said(t), "the server answers, but the log does not come")
	assert.Equal(t, 2, s.receiver.count())
	_, exit := p.stop(t)
	require.NoError(t, exit)
}

// A swallower passes PostgreSQL connections on until it is told to swallow what the server sends on those that are open: from then on it answers for the
// server with keepalives that say that nothing new has come.
type swallower struct {
	url  string
	seen atomic.Uint64 // position of the last keepalive that was passed on

	mu   sync.Mutex
	open []*atomic.Bool // one for each connection: swallow
}

func newSwallower(t *testing.T, dsn string) *swallower {
	t.Helper()
	to, err := url.Parse(dsn)
	require.NoError(t, err)
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &swallower{}
	through := *to
	through.Host, through.RawQuery = l.Addr().String(), "sslmode=disable"
	s.url = through.String()
	var group sync.WaitGroup
	t.Cleanup(group.Wait)
	t.Cleanup(func() { _ = l.Close() })
	group.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			var d net.Dialer
			up, err := d.DialContext(context.WithoutCancel(t.Context()), "tcp", to.Host)
			if err != nil {
				_ = client.Close()
				continue
			}
			quiet := new(atomic.Bool)
			s.mu.Lock()
			s.open = append(s.open, quiet)
			s.mu.Unlock()
			group.Go(func() { // until the relay goes
				_, _ = io.Copy(up, client)
				_ = up.Close()
			})
			group.Go(func() { s.back(client, up, quiet) })
		}
	})
	return s
}

func (s *swallower) swallow() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, quiet := range s.open {
		quiet.Store(true)
	}
}

// back passes the server's messages on, one by one.
func (s *swallower) back(client, up net.Conn, quiet *atomic.Bool) {
	defer func() { _ = client.Close() }()
	for {
		head := make([]byte, 5)
		if _, err := io.ReadFull(up, head); err != nil {
			return
		}
		body := make([]byte, wire.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(up, body); err != nil {
			return
		}
		const copyData, keepalive = 'd', 'k'
		isKeepalive := head[0] == copyData && len(body) == 18 && body[0] == keepalive
		if quiet.Load() {
			if !isKeepalive {
				continue
			}
			wire.BigEndian.PutUint64(body[1:], s.seen.Load()) // nothing new
		} else if isKeepalive {
			s.seen.Store(wire.BigEndian.Uint64(body[1:]))
		}
		if _, err := client.Write(append(head, body...)); err != nil {
			return
		}
	}
}
