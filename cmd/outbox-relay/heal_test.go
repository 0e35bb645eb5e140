package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// calamities are what happens to slots and publications, at night and by hand. Each is done while writers, two relays and a long transaction are at
// work, and the relays are left alone with it.
func calamities() map[string]func(ctx context.Context, t *testing.T, s *site) {
	// free ends whoever streams from the slot until the statements after it, which need it free, succeed.
	free := func(statements ...string) func(ctx context.Context, t *testing.T, s *site) {
		return func(ctx context.Context, t *testing.T, s *site) {
			t.Helper()
			s.receiver.await(ctx, t, strings.Join(statements, "; "), func() bool {
				s.exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", s.slot)
				for i, sql := range statements {
					_, err := s.pool.Exec(ctx, sql, s.slot)
					if i == 0 && err != nil {
						return false
					}
					if err != nil { // a relay may have been faster
						require.ErrorContains(t, err, "already exists")
					}
				}
				return true
			})
		}
	}
	sql := func(statements string) func(ctx context.Context, t *testing.T, s *site) {
		return func(ctx context.Context, t *testing.T, s *site) {
			t.Helper()
			s.receiver.await(ctx, t, statements, func() bool {
				_, err := s.pool.Exec(ctx, statements) // several are one transaction
				var pg *pgconn.PgError
				if errors.As(err, &pg) && pg.Code == "40P01" {
					return false // a deadlock with a writer, or with a relay at work: the operator says it again
				}
				require.NoError(t, err)
				return true
			})
		}
	}
	return map[string]func(ctx context.Context, t *testing.T, s *site){
		"slot dropped":         free("SELECT pg_drop_replication_slot($1)"),
		"slot made anew":       free("SELECT pg_drop_replication_slot($1)", "SELECT pg_create_logical_replication_slot($1, 'pgoutput')"),
		"slot moved":           free("SELECT pg_replication_slot_advance($1, pg_current_wal_lsn())"),
		"publication dropped":  sql("DROP PUBLICATION outbox_relay_events"),
		"registry unpublished": sql("DROP PUBLICATION outbox_relay_registry"),
		"publication made anew": sql(`DROP PUBLICATION outbox_relay_events; CREATE PUBLICATION outbox_relay_events FOR TABLE tenant_one.webhook_events,
			tenant_two.webhook_events WITH (publish = 'insert', publish_via_partition_root = true)`),
		"table swapped": sql(`LOCK TABLE tenant_one.webhook_events; ALTER TABLE tenant_one.webhook_events RENAME TO webhook_events_old;
			CREATE TABLE tenant_one.webhook_events (LIKE tenant_one.webhook_events_old INCLUDING DEFAULTS INCLUDING CONSTRAINTS, PRIMARY KEY (id));
			INSERT INTO tenant_one.webhook_events SELECT * FROM tenant_one.webhook_events_old; DROP TABLE tenant_one.webhook_events_old`),
	}
}

// TestHeals: nothing is lost, and nothing of a rollback sent, whatever happens to slot and publications.
func TestHeals(t *testing.T) {
	t.Parallel()
	for name, calamity := range calamities() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testCalamity(t, pgtest.Database(t), 3, calamity)
		})
	}
}

// TestPublicationMadeAnewIsNoticed: a transaction that is open while a publication is made anew may be left out of the log. The relay need not wait for the
// audit of its next checkpoint to know: the publication is another one. Nor does it matter that its stream breaks at that very moment, or that it is killed
// before it has looked.
func TestPublicationMadeAnewIsNoticed(t *testing.T) {
	t.Parallel()
	for _, publication := range []string{"outbox_relay_events", "outbox_relay_registry"} {
		for _, leader := range []string{"at work", "cut off", "killed"} {
			t.Run(publication+" leader "+leader, func(t *testing.T) {
				t.Parallel()
				testMadeAnew(t, publication, leader)
			})
		}
	}
}

func testMadeAnew(t *testing.T, publication, leader string) {
	t.Helper()
	s := newSite(t, "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme")
	s.asRunner(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.subscribe(t, "acme", s.endpoint(t, "acme", 3), "order.created", "{}")
	p := startRelay(t, s.config)
	s.receiver.await(ctx, t, "a leader", func() bool { return strings.Contains(p.said(t), `"leading"`) })
	tx, err := s.pool.Begin(ctx)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	_, err = outbox.Insert(ctx, tx, "acme", outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order", Data: []byte("{}")})
	require.NoError(t, err)
	tables, with := "acme.webhook_events", "(publish = 'insert', publish_via_partition_root = true)"
	if publication == "outbox_relay_registry" {
		tables, with = "outbox_relay.tenants", "(publish_via_partition_root = true)" // the rest is the relay's to find
	}
	if leader == "killed" {
		p.kill(t)
	}
	s.exec(t, fmt.Sprintf("DROP PUBLICATION %[1]s; CREATE PUBLICATION %[1]s FOR TABLE %[2]s WITH %[3]s", publication, tables, with))
	if leader == "cut off" {
		s.exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", s.slot)
	}
	require.NoError(t, tx.Commit(ctx))
	if leader == "killed" {
		p = startRelay(t, s.config)
	}
	s.receiver.await(ctx, t, "the relay to heal", func() bool { return strings.Contains(p.said(t), `"healed`) })
	s.receiver.await(ctx, t, "the event", func() bool { return s.receiver.pairs() == 1 && s.recorded(t, []string{"acme"}) == 1 })
	s.insertMany(t, "acme", "order.created", 10)
	s.receiver.await(ctx, t, "what comes after it", func() bool { return s.receiver.pairs() == 11 && s.recorded(t, []string{"acme"}) == 11 })
	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.Equal(t, 1, strings.Count(p.said(t), `"healed`))
	for _, said := range []string{"healed", "leading"} { // as pg_replication_slots has it
		require.Regexp(t, `"msg":"`+said+`.*"position":"[0-9A-F]+/[0-9A-F]+"`, p.said(t))
	}
	require.NotContains(t, p.said(t), "suspended")
	require.NotContains(t, p.said(t), "audit:")
	require.Equal(t, 11, s.receiver.count())
}

// TestTableSwappedAndAddedAgain: what was written to a table of events that took the place of another one, before the tenant was added again, is not in the log. It
// is queued whatever else changes with it, and whatever earlier events are asked for.
func TestTableSwappedAndAddedAgain(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ change, flags string }{
		"alone":              {},
		"with an endpoint":   {"UPDATE acme.webhook_endpoints SET timeout_seconds = 20", ""},
		"with later events":  {"UPDATE acme.webhook_endpoints SET timeout_seconds = 20", "--since=2999-01-01T00:00:00Z"},
		"with others unsent": {"UPDATE acme.webhook_events SET processed_at = now()", "--unprocessed"},
	} {
		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s running %t", name, running), func(t *testing.T) {
				t.Parallel()
				testTableSwapped(t, test.change, test.flags, running)
			})
		}
	}
}

func testTableSwapped(t *testing.T, change, flags string, running bool) {
	t.Helper()
	s := newSite(t, "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s.subscribe(t, "acme", s.endpoint(t, "acme", 3), "order.created", "{}")
	p := startRelay(t, s.config)
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "the first", func() bool { return s.recorded(t, []string{"acme"}) == 1 })
	if !running {
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}
	s.exec(t, `ALTER TABLE acme.webhook_events RENAME TO webhook_events_old;
		CREATE TABLE acme.webhook_events (LIKE acme.webhook_events_old INCLUDING DEFAULTS INCLUDING CONSTRAINTS, PRIMARY KEY (id));
		INSERT INTO acme.webhook_events SELECT * FROM acme.webhook_events_old; DROP TABLE acme.webhook_events_old`)
	s.insertMany(t, "acme", "order.created", 5)
	if change != "" {
		s.exec(t, change)
	}
	s.command(t, strings.Fields("tenants add acme "+flags)...)
	s.insertMany(t, "acme", "order.created", 1)
	if !running {
		p = startRelay(t, s.config)
	}
	s.receiver.await(ctx, t, "all", func() bool { return s.receiver.pairs() == 7 && s.recorded(t, []string{"acme"}) == 7 })
	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.Equal(t, 7, s.receiver.count())
	require.NotContains(t, p.said(t), "audit:")
}

// TestHealsInvalidatedSlot has the server give the slot up, since it kept too much of the log while the relays were away.
func TestHealsInvalidatedSlot(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{Config: map[string]string{"max_slot_wal_keep_size": "16MB"}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	testCalamity(t, server.URL("postgres"), 2, func(ctx context.Context, t *testing.T, s *site) {
		s.exec(t, "CREATE TABLE IF NOT EXISTS filler (x text)")
		s.receiver.await(ctx, t, "the slot to be given up", func() bool {
			s.exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", s.slot)
			s.exec(t, "INSERT INTO filler SELECT repeat('x', 500) FROM generate_series(1, 20000)")
			s.exec(t, "SELECT pg_switch_wal()")
			s.exec(t, "CHECKPOINT")
			var usable bool
			require.NoError(t, s.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 AND wal_status <> 'lost')`, s.slot).Scan(&usable))
			return !usable
		})
	})
}

func testCalamity(t *testing.T, dsn string, rounds int, calamity func(ctx context.Context, t *testing.T, s *site)) {
	t.Helper()
	tenants := []string{"tenant_one", "tenant_two"}
	seed := uint64(len(t.Name()))
	rnd := rand.New(rand.NewPCG(seed, seed))
	s := newSiteOn(t, dsn, "queue:\n  poll: 100ms\n  lease: 3s\n", func(outbox.UUID, string) int { return http.StatusOK }, tenants...)
	s.asRunner(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	rules := setUpSubscriptions(t, s, tenants, rnd)
	expected, rolledBack, mu := make(map[pair]string), make(map[outbox.UUID]bool), new(sync.Mutex)
	relays := []*relayProcess{startRelay(t, s.config), startRelay(t, s.config)}
	s.leading(ctx, t)

	stop := make(chan struct{})
	group, writing := errgroup.WithContext(ctx)
	for i := range 3 {
		w := &writer{site: s, tenants: tenants, rules: rules, rnd: rand.New(rand.NewPCG(seed, uint64(i))), mu: mu, expected: expected, rolledBack: rolledBack}
		group.Go(func() error {
			pace := time.NewTicker(10 * time.Millisecond)
			defer pace.Stop()
			for {
				select {
				case <-stop:
					return nil
				case <-pace.C:
				}
				if err := w.run(writing, 1); err != nil {
					return err
				}
			}
		})
	}
	slow := &writer{site: s, tenants: tenants, rules: rules, rnd: rand.New(rand.NewPCG(seed, 99)), mu: mu, expected: expected, rolledBack: rolledBack}
	group.Go(func() error { return slow.hold(writing, stop) })

	due := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(expected)
	}
	catchUp := func(after string) { // with what has been committed by now, and some more
		enough := due() + 100
		s.receiver.await(ctx, t, "deliveries "+after, func() bool { return s.receiver.pairs() >= enough })
	}
	for range rounds {
		catchUp("before a calamity")
		calamity(ctx, t, s)
		if victim := rnd.IntN(3); victim < len(relays) { // or none
			relays[victim].kill(t)
			relays[victim] = startRelay(t, s.config)
		}
	}
	catchUp("after all calamities")
	close(stop)
	require.NoError(t, group.Wait())

	s.receiver.await(ctx, t, fmt.Sprintf("all of %d pairs", len(expected)), func() bool { return s.receiver.pairs() >= len(expected) })
	s.receiver.await(ctx, t, "the record of all pairs", func() bool { return s.recorded(t, tenants) == len(expected) })
	require.Empty(t, s.receiver.bad)
	duplicates := 0
	for p, n := range s.receiver.delivered() {
		_, matches := expected[p]
		require.True(t, matches, "sent without a match, or rolled back (%t): %v", rolledBack[p.event], p)
		duplicates += n - 1
	}
	t.Logf("pairs %d, rolled back events %d, duplicates %d", len(expected), len(rolledBack), duplicates)
	for _, p := range relays {
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}
}

// hold commits or rolls back transactions that stay open for about a second, one after the other.
func (w *writer) hold(ctx context.Context, stop <-chan struct{}) error {
	for {
		done, err := w.holdOne(ctx, stop)
		if done || err != nil {
			return err
		}
	}
}

func (w *writer) holdOne(ctx context.Context, stop <-chan struct{}) (done bool, err error) {
	tx, err := w.site.pool.Begin(ctx)
	if err != nil {
		return true, err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
	e, schema := w.event(), w.tenants[w.rnd.IntN(len(w.tenants))]
	if _, err := outbox.Insert(ctx, tx, schema, e); err != nil {
		return true, err
	}
	select {
	case <-stop:
		done = true
	case <-time.After(time.Second):
	}
	if w.rnd.IntN(3) == 0 {
		w.note(e.ID)
		return done, tx.Rollback(ctx)
	}
	if err = tx.Commit(ctx); err == nil {
		w.expect(schema, []outbox.Event{e})
	}
	return done, err
}
