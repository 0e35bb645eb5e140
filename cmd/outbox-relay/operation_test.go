package main

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func always(status int) func(outbox.UUID, string) int {
	return func(outbox.UUID, string) int { return status }
}

// insertMany commits n small events in one transaction.
func (s *site) insertMany(t testing.TB, schema, eventType string, n int) {
	t.Helper()
	s.exec(t, `INSERT INTO `+pgx.Identifier{schema, "webhook_events"}.Sanitize()+` (id, event_type, aggregate_id, aggregate_type, event_data)
		SELECT gen_random_uuid(), $1, gen_random_uuid(), 'order', jsonb_build_object('n', n, 'note', repeat('x', 200)) FROM generate_series(1, $2) n`,
		eventType, n)
}

// leading waits until the slot is in use.
func (s *site) leading(ctx context.Context, t testing.TB) {
	t.Helper()
	s.receiver.await(ctx, t, "a leader", func() bool {
		var active bool
		err := s.pool.QueryRow(ctx, `SELECT active FROM pg_replication_slots WHERE slot_name = $1`, s.slot).Scan(&active)
		return err == nil && active
	})
}

// peakMemory is the greatest resident size that the process has had, in bytes.
func (p *relayProcess) peakMemory(t testing.TB) int {
	t.Helper()
	n := peakMemory(p.cmd.Process.Pid)
	require.Positive(t, n)
	return int(n)
}

// TestHugeTransaction: one transaction of half a million events neither fills the memory nor stops the other tenants.
func TestHugeTransaction(t *testing.T) {
	t.Parallel()
	const events, limit = 500_000, 200 << 20
	s := newSite(t, "", always(http.StatusOK), "big", "small")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	big, small := s.endpoint(t, "big", 3), s.endpoint(t, "small", 3)
	s.subscribe(t, "big", big, "order.created", "{}")
	s.subscribe(t, "small", small, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "small", "order.created", 1)
	s.receiver.await(ctx, t, "the small tenant's first event", func() bool { return s.receiver.count() == 1 })

	s.insertMany(t, "big", "order.created", events)
	committed := time.Now()
	var end string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT pg_current_wal_lsn()`).Scan(&end))
	others, wait := 1, time.Duration(0)
	for covered := false; !covered; {
		s.insertMany(t, "small", "order.created", 1)
		began := time.Now()
		others++
		s.receiver.await(ctx, t, "the small tenant's events meanwhile", func() bool { return s.arrivedAt(small) >= others })
		wait = max(wait, time.Since(began))
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT confirmed_flush_lsn >= $1::pg_lsn FROM pg_replication_slots WHERE slot_name = $2`,
			end, s.slot).Scan(&covered))
	}
	took := time.Since(committed)
	delivered := s.arrivedAt(big)
	s.insertMany(t, "small", "order.created", 1)
	s.receiver.await(ctx, t, "an event after it all", func() bool { return s.arrivedAt(small) > others })
	s.receiver.await(ctx, t, "more of the backlog", func() bool { return s.arrivedAt(big) >= min(delivered+10_000, events) })
	peak := p.peakMemory(t)
	_, exit := p.stop(t)
	require.NoError(t, exit)

	var rows int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(DISTINCT webhook_event_id) FROM big.webhook_deliveries WHERE relayed`).Scan(&rows))
	require.Equal(t, events, rows, "events with a delivery, sent or waiting")
	t.Logf("%d events durable after %v, %d of them delivered by then; peak memory %d MiB; %d events of the other tenant meanwhile, the slowest %v",
		events, took.Round(time.Millisecond), delivered, peak>>20, others-1, wait.Round(time.Millisecond))
	require.Less(t, peak, limit, "peak memory")
}

// arrivedAt counts the different events that an endpoint has accepted.
func (s *site) arrivedAt(endpoint outbox.UUID) int {
	s.receiver.mu.Lock()
	defer s.receiver.mu.Unlock()
	return s.receiver.accepted[endpoint]
}

// TestIdlePositionFollows: without events, and with a busy table that is none of ours, the slot lets the WAL go.
func TestIdlePositionFollows(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK), "quiet")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	startRelay(t, s.config)
	s.leading(ctx, t)
	s.exec(t, `CREATE TABLE busy (n int, note text)`)
	for range 3 {
		var written string
		s.exec(t, `INSERT INTO busy SELECT n, repeat('x', 500) FROM generate_series(1, 10000) n`)
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT pg_current_wal_lsn()`).Scan(&written))
		began := time.Now()
		s.receiver.await(ctx, t, "the confirmed LSN", func() bool {
			var follows bool
			err := s.pool.QueryRow(ctx, `SELECT confirmed_flush_lsn >= $1::pg_lsn FROM pg_replication_slots WHERE slot_name = $2`, written, s.slot).Scan(&follows)
			return err == nil && follows
		})
		took := time.Since(began)
		t.Logf("confirmed after %v", took.Round(time.Millisecond))
		require.Less(t, took, 30*time.Second)
	}
}

// TestServerStopsFast: a connected relay does not keep the server from shutting down, and finds back when it has returned.
func TestServerStopsFast(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := newSiteOn(t, server.URL("postgres"), "", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ep := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", ep, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1000)
	s.receiver.await(ctx, t, "the first events", func() bool { return s.arrivedAt(ep) == 1000 })

	began := time.Now()
	require.NoError(t, server.Stop(ctx, "fast"))
	took := time.Since(began)
	t.Logf("pg_ctl stop -m fast took %v", took.Round(time.Millisecond))
	require.Less(t, took, 30*time.Second, "the server would wait for a minute, its wal_sender_timeout")

	require.NoError(t, server.Restart(ctx))
	s.pool.Reset()
	s.insertMany(t, "acme", "order.created", 10)
	s.receiver.await(ctx, t, "the events after the restart", func() bool { return s.arrivedAt(ep) == 1010 })
	_, exit := p.stop(t)
	require.NoError(t, exit)
}

// TestTakeover: of two relays one leads and the other stands by, and takes over soon after the first was killed.
func TestTakeover(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ep := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", ep, "order.created", "{}")
	first := startRelay(t, s.config)
	s.leading(ctx, t)
	second := startRelay(t, s.config)
	s.receiver.await(ctx, t, "the second relay to stand by", func() bool {
		said, err := os.ReadFile(second.log.Name())
		return err == nil && bytes.Contains(said, []byte("standing by"))
	})
	s.insertMany(t, "acme", "order.created", 100)
	s.receiver.await(ctx, t, "the first events", func() bool { return s.recorded(t, []string{"acme"}) == 100 })
	first.kill(t)
	began := time.Now()
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "an event through the second relay", func() bool { return s.arrivedAt(ep) == 101 })
	t.Logf("the first event after the kill arrived after %v", time.Since(began).Round(time.Millisecond))
	_, exit := second.stop(t)
	require.NoError(t, exit)
}

// TestStopUnderLoad: SIGTERM ends the relay within its drain timeout, loses nothing, and what was recorded is not sent again.
func TestStopUnderLoad(t *testing.T) {
	t.Parallel()
	const events = 5000
	var slow atomic.Bool
	s := newSite(t, "shutdown:\n  drain: 3s\nqueue:\n  lease: 3s\n", func(outbox.UUID, string) int {
		if slow.Load() {
			<-time.After(20 * time.Millisecond)
		}
		return http.StatusOK
	}, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	ep := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", ep, "order.created", "{}")
	slow.Store(true)
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", events)
	s.receiver.await(ctx, t, "some of the load", func() bool { return s.arrivedAt(ep) > events/10 })
	took, exit := p.stop(t)
	require.NoError(t, exit)
	require.Less(t, took, 30*time.Second, "drain timeout and some time to record")
	before := s.recorded(t, []string{"acme"})
	require.Less(t, s.arrivedAt(ep), events, "the stop came too late to show anything")
	require.Equal(t, s.arrivedAt(ep), before, "a drained relay has recorded all it has sent")

	slow.Store(false)
	p = startRelay(t, s.config)
	s.receiver.await(ctx, t, "the rest", func() bool { return s.arrivedAt(ep) == events })
	s.receiver.await(ctx, t, "the record of the rest", func() bool { return s.recorded(t, []string{"acme"}) == events })
	for _, n := range s.receiver.delivered() {
		require.Equal(t, 1, n, "sent again though recorded")
	}
	_, exit = p.stop(t)
	require.NoError(t, exit)
	t.Logf("stopped in %v with %d of %d recorded", took.Round(time.Millisecond), before, events)
}

// TestNewEndpointBehindAStandby: an endpoint and its first event are of one commit, which waits for a synchronous standby. The log brings it at once, and nobody
// sees it: the attempt that fails meanwhile is recorded all the same, and made again.
func TestNewEndpointBehindAStandby(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{Durable: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := newSiteOn(t, server.URL("postgres"), "", func(_ outbox.UUID, attempt string) int {
		if attempt == "1" {
			return http.StatusInternalServerError
		}
		return http.StatusOK
	}, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := startRelay(t, s.config)
	s.receiver.await(ctx, t, "a leader", func() bool { return strings.Contains(p.said(t), `"msg":"leading"`) }) // whose first commits are through

	s.exec(t, "CREATE TABLE probe ()")
	s.exec(t, "ALTER SYSTEM SET synchronous_standby_names = 'nosuch'")
	s.exec(t, "SELECT pg_reload_conf()")
	s.receiver.await(ctx, t, "commits to wait", func() bool {
		short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
		defer cancel()
		_, err := s.pool.Exec(short, "INSERT INTO probe DEFAULT VALUES")
		return err != nil
	})
	tx, err := s.pool.Begin(ctx)
	require.NoError(t, err)
	ep := s.endpointBy(t, tx, "acme", 3)
	s.subscribeBy(t, tx, "acme", ep, "order.created", "{}")
	_, err = outbox.Insert(ctx, tx, "acme", outbox.Event{Type: "order.created", AggregateID: ep, AggregateType: "order", Data: []byte("{}")})
	require.NoError(t, err)
	committed := make(chan error, 1)
	go func() { committed <- tx.Commit(ctx) }()
	attempts := func() int {
		s.receiver.mu.Lock()
		defer s.receiver.mu.Unlock()
		return len(s.receiver.arrivals)
	}
	s.receiver.await(ctx, t, "the first attempt", func() bool { return attempts() == 1 })
	s.receiver.await(ctx, t, "its outcome to wait as well", func() bool {
		var n int
		err := s.pool.QueryRow(ctx, `SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'`).Scan(&n)
		return err == nil && n >= 2
	})
	require.Empty(t, committed)
	s.exec(t, "ALTER SYSTEM RESET synchronous_standby_names")
	s.exec(t, "SELECT pg_reload_conf()")
	require.NoError(t, <-committed)
	s.receiver.await(ctx, t, "the second attempt", func() bool { return s.recorded(t, []string{"acme"}) == 1 })
	require.Equal(t, 2, attempts())
	_, exit := p.stop(t)
	require.NoError(t, exit)
}
