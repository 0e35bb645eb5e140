package relay_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
)

// heard passes on the messages of a log.
type heard struct {
	slog.Handler

	messages chan string
}

func (h heard) Enabled(context.Context, slog.Level) bool { return true }

func (h heard) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		text += " " + a.Value.String()
		return true
	})
	select {
	case h.messages <- text:
	default:
	}
	return nil
}

func (h heard) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h heard) WithGroup(string) slog.Handler      { return h }

// TestSuspensionThatFails: a tenant whose table is not published is to be suspended, which the database refuses, and somebody mends it meanwhile. What it commits from
// then on is delivered: no part of the relay has it as suspended.
func TestSuspensionThatFails(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	messages := make(chan string, 1000)
	p.run(heard{slog.DiscardHandler, messages}, nil)
	p.events("one", 1)
	require.Eventually(t, func() bool { return p.arrived() == 1 }, time.Minute, 10*time.Millisecond)

	lock, err := p.pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = lock.Rollback(ctx) }()
	_, err = lock.Exec(ctx, `SELECT FROM outbox_relay.tenants WHERE schema = 'one' FOR UPDATE`)
	require.NoError(t, err)
	p.exec(`ALTER PUBLICATION outbox_relay_events DROP TABLE one.webhook_events`)
	require.Eventually(t, func() bool {
		var waits bool
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
			AND query LIKE '%''suspended''%')`).Scan(&waits))
		return waits
	}, time.Minute, 10*time.Millisecond)
	p.exec(`ALTER PUBLICATION outbox_relay_events ADD TABLE one.webhook_events`)
	for failed := false; !failed; {
		select {
		case text := <-messages:
			failed = strings.Contains(text, `suspend tenant "one"`) && strings.Contains(text, "lock timeout")
		case <-ctx.Done():
			require.NoError(t, ctx.Err(), "it is not suspended")
		}
	}
	require.NoError(t, lock.Rollback(ctx))
	p.events("one", 5)
	require.Eventually(t, func() bool { return p.arrived() == 6 }, time.Minute, 10*time.Millisecond)
}

// TestTableReplaced: a tenant's table of events that another one has taken the place of is not published. It is suspended at the next checkpoint, resumed by
// itself, which publishes the new table, and gets what it committed meanwhile.
func TestTableReplaced(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	messages := make(chan string, 1000)
	p.run(heard{slog.DiscardHandler, messages}, nil)
	p.events("one", 1)
	require.Eventually(t, func() bool { return p.arrived() == 1 }, time.Minute, 10*time.Millisecond)

	p.exec(`BEGIN; LOCK TABLE one.webhook_events; ALTER TABLE one.webhook_events RENAME TO webhook_events_old;
		CREATE TABLE one.webhook_events (LIKE one.webhook_events_old INCLUDING DEFAULTS INCLUDING CONSTRAINTS, PRIMARY KEY (id));
		INSERT INTO one.webhook_events SELECT * FROM one.webhook_events_old; COMMIT`)
	p.events("one", 5)
	var told []string
	for len(told) < 3 {
		select {
		case text := <-messages:
			for _, start := range []string{"tenant suspended", "suspended tenant resumed", "backfill done", "healing"} {
				if strings.HasPrefix(text, start) {
					told = append(told, text)
				}
			}
		case <-ctx.Done():
			require.NoError(t, ctx.Err(), "it is not resumed: %s", told)
		}
	}
	require.Equal(t, "tenant suspended one tables are not published: webhook_events "+
		"it is tried again by itself; once mended, this does it at once: outbox-relay tenants resume one", told[0])
	require.Contains(t, told[1], "suspended tenant resumed")
	require.Contains(t, told[2], "backfill done")
	p.events("one", 1)
	require.Eventually(t, func() bool { return p.arrived() == 7 }, time.Minute, 10*time.Millisecond)
}

// TestPauseBesideSuspension: a tenant that an operator has paused is suspended, because its table is locked, and tried again by itself. Its deliveries are held
// back before and after, until the operator resumes it.
func TestPauseBesideSuspension(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	p.run(slog.DiscardHandler, nil)
	state := func() (s string) {
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT concat_ws(': ', state, reason) FROM outbox_relay.tenants`).Scan(&s))
		return s
	}
	held := func() (n int) {
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT count(*) FROM one.webhook_deliveries WHERE delivery_status = 'pending'`).Scan(&n))
		return n
	}
	p.exec(`SELECT outbox_relay.pause_tenant('one', 'it moves')`)
	p.events("one", 3)
	require.Eventually(t, func() bool { return held() == 3 }, time.Minute, 10*time.Millisecond)

	lock, err := p.pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = lock.Rollback(ctx) }()
	_, err = lock.Exec(ctx, `LOCK TABLE one.webhook_deliveries IN ACCESS EXCLUSIVE MODE`)
	require.NoError(t, err)
	p.events("one", 1)
	require.Eventually(t, func() bool { return strings.HasPrefix(state(), "suspended: ") }, time.Minute, 10*time.Millisecond)
	require.NoError(t, lock.Rollback(ctx))
	require.Eventually(t, func() bool { return !strings.HasPrefix(state(), "suspended: ") }, time.Minute, 10*time.Millisecond)
	require.Equal(t, "paused: it moves", state())
	p.events("one", 2)
	require.Eventually(t, func() bool { return held() == 5 }, time.Minute, 10*time.Millisecond)
	require.Zero(t, p.arrived())

	require.NoError(t, schema.ResumeTenant(ctx, p.cfg.Database.URL, "one", nil))
	require.Eventually(t, func() bool { return p.arrived() == 6 }, time.Minute, 10*time.Millisecond)
}

// TestRoutesOfPausedAfterSuspension: what suspends a paused tenant is a change of its routing table that cannot be read. It counts once the suspension is over.
func TestRoutesOfPausedAfterSuspension(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 2)
	p.run(slog.DiscardHandler, nil)
	is := func(want string) func() bool {
		return func() bool {
			var state string
			require.NoError(t, p.pool.QueryRow(ctx, `SELECT state FROM outbox_relay.tenants`).Scan(&state))
			return state == want
		}
	}
	p.exec(`SELECT outbox_relay.pause_tenant('one')`)
	p.exec(`CREATE UNIQUE INDEX key ON one.webhook_subscriptions (endpoint_id)`)
	p.exec(`ALTER TABLE one.webhook_subscriptions REPLICA IDENTITY USING INDEX key`)
	p.exec(`DELETE FROM one.webhook_subscriptions WHERE endpoint_id = (SELECT id FROM one.webhook_endpoints WHERE name = 'e1')`)
	require.Eventually(t, is("suspended"), time.Minute, 10*time.Millisecond)
	p.exec(`ALTER TABLE one.webhook_subscriptions REPLICA IDENTITY DEFAULT`)
	require.Eventually(t, is("paused"), time.Minute, 10*time.Millisecond)
	require.NoError(t, schema.ResumeTenant(ctx, p.cfg.Database.URL, "one", nil))
	p.events("one", 20)
	require.Eventually(t, func() bool { return p.arrived() >= 20 }, time.Minute, 10*time.Millisecond)
	p.mu.Lock()
	defer p.mu.Unlock()
	for delivery := range p.seen {
		require.True(t, strings.HasSuffix(delivery, "/2"), "to an endpoint that has no subscription any more: %s", delivery)
	}
}

// TestSchemaIsGone: a tenant whose schema is dropped has no events any more that could show it, and is told of all the same, once.
func TestSchemaIsGone(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	p.join("two", 1)
	messages := make(chan string, 1000)
	p.run(heard{slog.DiscardHandler, messages}, nil)
	count := func() (n int) {
		for len(messages) > 0 {
			n += strings.Count(<-messages, "the schema of a tenant is gone one ")
		}
		return n
	}
	p.exec(`DROP SCHEMA one CASCADE`)
	require.Eventually(t, func() bool { return count() == 1 }, time.Minute, 10*time.Millisecond)

	lock, err := p.pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = lock.Rollback(ctx) }()
	_, err = lock.Exec(ctx, `LOCK TABLE two.webhook_deliveries IN ACCESS EXCLUSIVE MODE`)
	require.NoError(t, err)
	p.events("two", 1)
	suspended := func() (yes bool) {
		require.NoError(t, p.pool.QueryRow(ctx, `SELECT state = 'suspended' FROM outbox_relay.tenants WHERE schema = 'two'`).Scan(&yes))
		return yes
	}
	require.Eventually(t, suspended, time.Minute, 10*time.Millisecond)
	require.NoError(t, lock.Rollback(ctx))
	require.Eventually(t, func() bool { return !suspended() }, time.Minute, 10*time.Millisecond) // which took more than one look
	require.Zero(t, count(), "it has been said")
}
