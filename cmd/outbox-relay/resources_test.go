package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

var tooMany = regexp.MustCompile(`SQLSTATE 53300`)

// TestFewDescriptors: a relay that may not open enough files for all its receivers at once delivers everything in the end, and no receiver is blamed.
func TestFewDescriptors(t *testing.T) {
	t.Parallel()
	const endpoints, events, limit = 60, 5, 40
	let := make(chan struct{})
	s := newSite(t, "queue:\n  poll: 100ms\n", func(outbox.UUID, string) int {
		<-let // hold the connection until all of them are wanted
		return http.StatusOK
	}, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for range endpoints {
		s.subscribe(t, "acme", s.endpoint(t, "acme", 1), "order.created", "{}")
	}
	limited := filepath.Join(t.TempDir(), "limited")
	require.NoError(t, os.WriteFile(limited, fmt.Appendf(nil, "#!/bin/sh\nulimit -n %d && exec %s \"$@\"\n", limit, binary(t)), 0o700))
	p := startBinary(t, limited, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", events)
	s.receiver.await(ctx, t, "deliveries that found no descriptor", func() bool {
		var n int
		err := s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_deliveries WHERE delivery_status = 'pending' AND error_message = 'local'`).Scan(&n)
		return err == nil && n > 0
	})
	close(let)
	s.receiver.await(ctx, t, "all of them", func() bool { return s.receiver.pairs() == endpoints*events })
	s.receiver.await(ctx, t, "the record of all", func() bool { return s.recorded(t, []string{"acme"}) == endpoints*events })
	_, exit := p.stop(t)
	require.NoError(t, exit)
	var attempts, opened int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM acme.webhook_delivery_attempts), (SELECT count(*) FROM outbox_relay.endpoint_health)`).
		Scan(&attempts, &opened))
	assert.Zero(t, attempts, "failed attempts")
	assert.Zero(t, opened, "endpoints in trouble")
	assert.Empty(t, s.receiver.bad)
}

// TestServerTakesNoConnections: the server is full when the relay has to connect anew. It waits, and loses nothing.
func TestServerTakesNoConnections(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{Config: map[string]string{"max_connections": "20", "superuser_reserved_connections": "3"}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := newSiteOn(t, server.URL("postgres"), "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s.asRunner(t)
	s.exec(t, "CREATE ROLE crowd LOGIN")
	e := s.endpoint(t, "acme", 1)
	s.subscribe(t, "acme", e, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 10)
	s.receiver.await(ctx, t, "the first events", func() bool { return s.receiver.pairs() == 10 })

	// Everybody but superusers is kept out before the relay's connections are ended, and its places are taken.
	crowd, err := pgx.ParseConfig(s.dsn)
	require.NoError(t, err)
	crowd.User = "crowd"
	var taken []*pgx.Conn
	full := func() bool {
		conn, err := pgx.ConnectConfig(ctx, crowd)
		if err == nil {
			taken = append(taken, conn)
		}
		return err != nil
	}
	s.exec(t, `ALTER ROLE runner_`+s.slot+` CONNECTION LIMIT 0`)
	s.exec(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1`, "runner_"+s.slot)
	s.receiver.await(ctx, t, "a server without a place", full)
	s.exec(t, `ALTER ROLE runner_`+s.slot+` CONNECTION LIMIT -1`)
	s.insertMany(t, "acme", "order.created", 10)
	s.receiver.await(ctx, t, "the relay to meet a full server", func() bool { return tooMany.MatchString(p.said(t)) })
	for _, conn := range taken {
		require.NoError(t, conn.Close(ctx))
	}
	s.receiver.await(ctx, t, "the events meanwhile", func() bool { return s.receiver.pairs() == 20 })
	s.receiver.await(ctx, t, "the record of all", func() bool { return s.recorded(t, []string{"acme"}) == 20 })
	_, exit := p.stop(t)
	require.NoError(t, exit)
}

// TestFewMegabytes: bodies of some hundred kilobytes that come faster than their receivers take them occupy what the window grants them, and beside it a
// part that does not grow with their number. All of them arrive, once.
func TestFewMegabytes(t *testing.T) {
	t.Parallel()
	const (
		events, size, bursts = 240, 200_000, 3
		window               = 16 << 20
		deferred, claimed    = window / 4, window / 2 // which come beside it
		// beside is what a relay occupies that is no body which waits: its code, tables and stacks, bodies on their way through (a message of the log, a request,
		// a batch that is written or claimed), and what the collector has not come to.
		beside = 64 << 20
	)
	let := make(chan struct{})
	s := newSite(t, "window: {bytes: 16MiB, hold: 500ms}\nqueue: {poll: 100ms}\n", func(outbox.UUID, string) int {
		<-let
		<-time.After(10 * time.Millisecond)
		return http.StatusOK
	}, "acme")
	open := sync.OnceFunc(func() { close(let) })
	defer open()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for range 2 {
		s.subscribe(t, "acme", s.endpoint(t, "acme", 3), "order.created", "{}")
	}
	p := startBinary(t, binary(t), s.config, "GOMEMLIMIT=48MiB")
	s.leading(ctx, t)
	idle := p.peakMemory(t)
	for range bursts {
		s.exec(t, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
			SELECT gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', jsonb_build_object('note', repeat('x', $2)) FROM generate_series(1, $1)`, events/bursts, size)
	}
	s.receiver.await(ctx, t, "what has no room to be in the queue", func() bool {
		var n int
		return s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&n) == nil && n >= 2*events-(window+claimed)/size
	})
	open()
	s.receiver.await(ctx, t, "all of them", func() bool { return s.receiver.pairs() == 2*events })
	s.receiver.await(ctx, t, "the record of all", func() bool { return s.recorded(t, []string{"acme"}) == 2*events })
	peak := p.peakMemory(t)
	_, exit := p.stop(t)
	require.NoError(t, exit)
	t.Logf("%d MiB of bodies; memory %d MiB at first, %d MiB at most", 2*events*size>>20, idle>>20, peak>>20)
	assert.Less(t, peak, window+deferred+claimed+beside, "peak memory")
	assert.Equal(t, 2*events, s.receiver.count(), "requests")
	assert.Empty(t, s.receiver.bad)
}
