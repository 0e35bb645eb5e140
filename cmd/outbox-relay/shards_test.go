package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
)

// shard spreads a site over shards.
func (s *site) shard(t *testing.T, shards int) {
	t.Helper()
	text, err := os.ReadFile(s.config)
	require.NoError(t, err)
	old := "  slot: " + s.slot + "\n"
	require.Contains(t, string(text), old)
	require.NoError(t, os.WriteFile(s.config, []byte(strings.Replace(string(text), old, old+fmt.Sprintf("  shards: %d\n", shards), 1)), 0o600))
	s.command(t, "migrate")
}

// moveTo moves a tenant. It returns false while the tenant cannot be moved: an earlier move is not over, or its table is in use.
func (s *site) moveTo(ctx context.Context, t *testing.T, tenant string, shard int) bool {
	t.Helper()
	_, err := s.pool.Exec(ctx, "SELECT outbox_relay.move_tenant($1, $2)", tenant, shard)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && (pg.Code == "55P03" || pg.Code == "40P01" || strings.Contains(pg.Message, "still being queued")) {
		return false
	}
	require.NoError(t, err)
	return true
}

func (s *site) shardOf(ctx context.Context, t *testing.T, tenant string) (shard int) {
	t.Helper()
	require.NoError(t, s.pool.QueryRow(ctx, "SELECT shard FROM outbox_relay.tenants WHERE schema = $1", tenant).Scan(&shard))
	return shard
}

// mover moves tenants back and forth until stop is closed, and counts.
func (s *site) mover(ctx context.Context, t *testing.T, rnd *rand.Rand, tenants []string, stop <-chan struct{}, moves *atomic.Int32) {
	for {
		select {
		case <-stop:
			return
		case <-ctx.Done():
			return
		case <-time.After(time.Duration(rnd.IntN(40)) * time.Millisecond):
		}
		tenant := tenants[rnd.IntN(len(tenants))]
		if s.moveTo(ctx, t, tenant, 1-s.shardOf(ctx, t, tenant)) {
			moves.Add(1)
		}
	}
}

// TestTenantCommandsSayWhatIsWrong: who waits for a lock is told so, and what is refused has its own cause.
func TestTenantCommandsSayWhatIsWrong(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.env = append(d.env, "OUTBOX_RELAY_DATABASE_SHARDS=2")
	d.succeed(t, "migrate")
	suspend := func() { d.exec(t, "UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'a column is gone'") }
	suspend()
	o := invoke(t, d.env, "tenants", "move", "acme", "--shard", "1")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, `error: move tenant "acme" to shard 1: ERROR: tenant "acme" is suspended: a column is gone`)
	assert.NotContains(t, o.err, "cannot be a tenant")
	o = invoke(t, d.env, "tenants", "add", "nosuch")
	assert.Contains(t, o.err, `the schema cannot be a tenant: ERROR: schema "nosuch" does not exist`)

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := pgx.Connect(t.Context(), d.url)
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close(context.WithoutCancel(t.Context()))) }()
	for _, command := range []string{"tenants resume acme", "tenants move acme --shard 1"} {
		writer, err := conn.Begin(t.Context())
		require.NoError(t, err)
		_, err = writer.Exec(t.Context(), "INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('a.b', gen_random_uuid(), 'a')")
		require.NoError(t, err)
		cmd := exec.CommandContext(ctx, binary(t), strings.Fields(command)...)
		cmd.Env = d.env
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		said, err := bufio.NewReader(out).ReadString('\n')
		require.NoError(t, err, command)
		assert.Contains(t, said, ": an open transaction holds the lock, trying again\n", command)
		require.NoError(t, writer.Commit(t.Context()))
		_, err = io.Copy(io.Discard, out)
		require.NoError(t, err)
		require.NoError(t, cmd.Wait(), command)
		d.exec(t, "UPDATE outbox_relay.tenants SET backfill_done_at = now()") // no relay runs that would do it
	}
}

// TestNothingLostWhileTenantsMove: six tenants of two shards are moved back and forth while two replicas relay, of which one is killed now and then. Whatever
// is committed and matches arrives and is recorded, nothing of a rollback is sent, and only kills repeat anything.
func TestNothingLostWhileTenantsMove(t *testing.T) {
	t.Parallel()
	const kills, window, claim = 10, 400, 100
	tenants := []string{"tenant_one", "tenant_two", `Tenant "three"`, "tenant_four", "tenant_five", "tenant_six"}
	rnd := rand.New(rand.NewPCG(11, 42))
	var flaky sync.Map
	s := newSite(t, fmt.Sprintf("delivery:\n  workers: 64\n  endpoint_concurrency: 8\nwindow:\n  deliveries: %d\n  hold: 500ms\nrecord:\n  batch: 100\n"+
		"queue:\n  batch: %d\n  poll: 100ms\n  lease: 3s\nbreaker:\n  failures: 50\n  open_for: 1s\n", window, claim),
		func(endpoint outbox.UUID, attempt string) int {
			if _, bad := flaky.Load(endpoint); bad && attempt == "1" {
				return http.StatusServiceUnavailable
			}
			return http.StatusOK
		}, tenants...)
	s.shard(t, 2)
	for i, tenant := range tenants {
		s.command(t, "tenants", "move", tenant, "--shard", fmt.Sprint(i%2)) // they were all added while there was one shard
	}
	rules := setUpSubscriptions(t, s, tenants, rnd)
	flaky.Store(rules[tenants[0]][0].endpoint, true) // its every first attempt fails
	expected, rolledBack, mu := make(map[pair]string), make(map[outbox.UUID]bool), new(sync.Mutex)

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	group, working := errgroup.WithContext(ctx)
	stop := make(chan struct{})
	for i := range 3 {
		w := &writer{site: s, tenants: tenants, rules: rules, rnd: rand.New(rand.NewPCG(7, uint64(i))), mu: mu, expected: expected, rolledBack: rolledBack}
		group.Go(func() error { return w.pace(working, stop, 8*time.Millisecond) })
	}
	var moves atomic.Int32
	moving := rand.New(rand.NewPCG(3, 3))
	group.Go(func() error {
		s.mover(working, t, moving, tenants, stop, &moves)
		return nil
	})
	replicas := []*relayProcess{startRelay(t, s.config), startRelay(t, s.config)}
	killed := 0
	for killed < kills {
		enough, more := s.receiver.count()+100+rnd.IntN(400), moves.Load()+int32(rnd.IntN(4))
		s.receiver.await(ctx, t, "deliveries and moves before a kill", func() bool { return s.receiver.count() >= enough && moves.Load() >= more })
		victim := rnd.IntN(2)
		replicas[victim].kill(t)
		killed++
		replicas[victim] = startRelay(t, s.config)
	}
	close(stop)
	require.NoError(t, group.Wait())
	s.receiver.await(ctx, t, "every committed matching pair", func() bool { return s.receiver.pairs() >= len(expected) })
	s.receiver.await(ctx, t, "an empty retry queue", func() bool {
		var n int
		return s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&n) == nil && n == 0
	})
	s.receiver.await(ctx, t, "the end of all moves", func() bool {
		var n int
		return s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.tenants WHERE backfill_done_at IS NULL AND backfill IS NOT NULL`).Scan(&n) == nil && n == 0
	})
	for _, p := range replicas {
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}

	require.Empty(t, s.receiver.bad)
	got := s.receiver.delivered()
	duplicates := 0
	for p, n := range got {
		_, due := expected[p]
		require.True(t, due, "sent without a match, or rolled back (%t): %v", rolledBack[p.event], p)
		duplicates += n - 1
	}
	for p := range expected {
		require.Positive(t, got[p], "lost: %v of %s", p, expected[p])
	}
	require.Equal(t, len(expected), s.recorded(t, tenants), "deliveries recorded as a success")
	require.Greater(t, moves.Load(), int32(10), "moves")
	// What a process may hold that nobody has recorded: its share of the window for each shard, and what it had claimed.
	require.LessOrEqual(t, duplicates, kills*2*(window/2+window/8+2*claim), "duplicates")
	t.Logf("pairs %d, rolled back events %d, kills %d, moves %d, duplicates %d", len(expected), len(rolledBack), kills, moves.Load(), duplicates)
}

// pace writes until stop is closed.
func (w *writer) pace(ctx context.Context, stop <-chan struct{}, every time.Duration) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return nil
		case <-tick.C:
		}
		if err := w.run(ctx, 1); err != nil {
			return err
		}
	}
}

// TestMovesAloneRepeatNothing: without a kill, no delivery comes twice however often its tenant is moved.
func TestMovesAloneRepeatNothing(t *testing.T) {
	t.Parallel()
	tenants := []string{"tenant_one", "tenant_two", "tenant_three"}
	rnd := rand.New(rand.NewPCG(12, 42))
	answer := func(outbox.UUID, string) int {
		if rand.IntN(20) == 0 { // long enough for the new leader to be there before the old one knows the outcome
			<-time.After(1900 * time.Millisecond)
		}
		return http.StatusOK
	}
	s := newSite(t, "queue:\n  poll: 100ms\n", answer, tenants...)
	s.shard(t, 2)
	rules := setUpSubscriptions(t, s, tenants, rnd)
	expected, rolledBack, mu := make(map[pair]string), make(map[outbox.UUID]bool), new(sync.Mutex)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	replicas := []*relayProcess{startRelay(t, s.config), startRelay(t, s.config)}
	group, working := errgroup.WithContext(ctx)
	stop := make(chan struct{})
	for i := range 2 {
		w := &writer{site: s, tenants: tenants, rules: rules, rnd: rand.New(rand.NewPCG(8, uint64(i))), mu: mu, expected: expected, rolledBack: rolledBack}
		group.Go(func() error { return w.pace(working, stop, 15*time.Millisecond) })
	}
	var moves atomic.Int32
	group.Go(func() error {
		s.mover(working, t, rnd, tenants, stop, &moves)
		return nil
	})
	s.receiver.await(ctx, t, "deliveries and moves", func() bool { return s.receiver.count() >= 2000 && moves.Load() >= 12 })
	close(stop)
	require.NoError(t, group.Wait())
	s.receiver.await(ctx, t, "the record of all pairs", func() bool { return s.recorded(t, tenants) == len(expected) })
	for _, p := range replicas {
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}
	for p, n := range s.receiver.delivered() {
		_, due := expected[p]
		require.True(t, due, "sent without a match, or rolled back (%t): %v", rolledBack[p.event], p)
		require.Equal(t, 1, n, "sent twice: %v", p)
	}
	t.Logf("pairs %d, moves %d", len(expected), moves.Load())
}

// TestOrderHoldsWhileATenantMoves is TestOrderHoldsUnderKills with a tenant that changes its shard all the time.
func TestOrderHoldsWhileATenantMoves(t *testing.T) {
	t.Parallel()
	for seed := range testSeeds(t) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			orderWhileMoving(t, uint64(seed))
		})
	}
}

func orderWhileMoving(t *testing.T, seed uint64) {
	const events, aggregates = 250, 8
	rnd := rand.New(rand.NewPCG(seed, 98))
	o := &orderOracle{
		rnd: rand.New(rand.NewPCG(seed, 4)), place: make(map[string]int), aggregate: make(map[string]uuidIndex),
		accepted: make(map[string]map[string]bool), sequence: make(map[string][]string), changed: make(chan struct{}, 1), pause: 100 * time.Millisecond,
	}
	server := httptest.NewServer(o)
	t.Cleanup(server.Close)
	s := newSite(t, "window:\n  hold: 200ms\n  deliveries: 100\ndelivery:\n  workers: 32\n  endpoint_concurrency: 8\nrecord:\n  batch: 50\nqueue:\n  poll: 50ms\n  lease: 1s\n  batch: 50\n"+
		"breaker:\n  failures: 6\n  open_for: 1s\n", always(http.StatusOK), "acme")
	s.shard(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	names := []string{"strict", "aggregate1", "aggregate2"}
	for _, name := range names {
		id := s.endpoint(t, "acme", 10)
		s.exec(t, `UPDATE acme.webhook_endpoints SET endpoint_url = $2, delivery_order = $3 WHERE id = $1`, id, server.URL+"/"+name, strings.TrimRight(name, "12"))
		s.subscribe(t, "acme", id, "order.changed", "{}")
	}
	var ids []outbox.UUID
	for range aggregates {
		ids = append(ids, outbox.NewUUID())
	}
	replicas := []*relayProcess{startRelay(t, s.config), startRelay(t, s.config)}
	writes := rand.New(rand.NewPCG(seed, 2))
	moving := rand.New(rand.NewPCG(seed, 5))
	group, working := errgroup.WithContext(ctx)
	stop := make(chan struct{})
	var moves atomic.Int32
	group.Go(func() error { return o.write(working, s, writes, ids, events) })
	var mover sync.WaitGroup
	mover.Go(func() { s.mover(ctx, t, moving, []string{"acme"}, stop, &moves) })
	for i := range 6 {
		select {
		case <-time.After(time.Duration(500+rnd.IntN(2500)) * time.Millisecond):
		case <-ctx.Done():
		}
		if i > 0 { // moves before the first kill
			victim := rnd.IntN(2)
			replicas[victim].kill(t)
			replicas[victim] = startRelay(t, s.config)
		}
		o.mu.Lock()
		if rnd.IntN(3) == 0 {
			o.down = time.Now().Add(time.Second)
		}
		o.mu.Unlock()
	}
	require.NoError(t, group.Wait())
	close(stop)
	mover.Wait()
	o.finish(ctx, t, len(names), events, replicas)
	assert.Positive(t, moves.Load())
	t.Logf("moves %d", moves.Load())
}

// TestMoveWithoutAnybody moves tenants while no relay runs, and what has been committed before and after reaches the receiver once.
func TestMoveWithoutAnybody(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme", "other")
	s.shard(t, 2)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	ep := make(map[string]outbox.UUID)
	for _, tenant := range []string{"acme", "other"} {
		ep[tenant] = s.endpoint(t, tenant, 3)
		s.subscribe(t, tenant, ep[tenant], "order.created", "{}")
	}
	p := startRelay(t, s.config)
	s.receiver.await(ctx, t, "both leaders", func() bool { return strings.Count(p.said(t), `"leading"`) == 2 })
	s.insertMany(t, "acme", "order.created", 20)
	s.receiver.await(ctx, t, "events before", func() bool { return s.recorded(t, []string{"acme"}) == 20 })
	p.kill(t)
	s.insertMany(t, "acme", "order.created", 50)
	s.command(t, "tenants", "move", "acme", "--shard", "1")
	s.insertMany(t, "acme", "order.created", 30)
	s.insertMany(t, "other", "order.created", 10)
	p = startRelay(t, s.config)
	s.receiver.await(ctx, t, "all events", func() bool { return s.arrivedAt(ep["acme"]) == 100 && s.arrivedAt(ep["other"]) == 10 })
	s.receiver.await(ctx, t, "their record", func() bool { return s.recorded(t, []string{"acme", "other"}) == 110 })
	s.receiver.await(ctx, t, "the end of the move", func() (done bool) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT backfill_done_at IS NOT NULL FROM outbox_relay.tenants WHERE schema = 'acme'`).Scan(&done))
		return done
	})
	s.command(t, "check")
	_, exit := p.stop(t)
	require.NoError(t, exit)
	for pair, n := range s.receiver.delivered() {
		assert.Equal(t, 1, n, "sent again: %v", pair)
	}
}

// TestMoveFromALostSlot drops the slot of the shard before just before the tenant is moved away: what it would have brought is queued from the tables.
func TestMoveFromALostSlot(t *testing.T) {
	t.Parallel()
	tenants := []string{"tenant_one", "tenant_two"}
	rnd := rand.New(rand.NewPCG(5, 5))
	s := newSite(t, "queue:\n  poll: 100ms\n  lease: 3s\n", always(http.StatusOK), tenants...)
	s.shard(t, 2)
	s.asRunner(t)
	rules := setUpSubscriptions(t, s, tenants, rnd)
	expected, rolledBack, mu := make(map[pair]string), make(map[outbox.UUID]bool), new(sync.Mutex)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	replicas := []*relayProcess{startRelay(t, s.config), startRelay(t, s.config)}
	group, working := errgroup.WithContext(ctx)
	stop := make(chan struct{})
	w := &writer{site: s, tenants: tenants, rules: rules, rnd: rand.New(rand.NewPCG(8, 1)), mu: mu, expected: expected, rolledBack: rolledBack}
	group.Go(func() error { return w.pace(working, stop, 15*time.Millisecond) })
	last := &writer{site: s, tenants: tenants[:1], rules: rules, rnd: rand.New(rand.NewPCG(8, 2)), mu: mu, expected: expected, rolledBack: rolledBack}
	for range 2 {
		enough := s.receiver.pairs() + 200
		s.receiver.await(ctx, t, "deliveries", func() bool { return s.receiver.pairs() >= enough })
		s.receiver.await(ctx, t, "the end of the slot, and a move", func() bool {
			var slot string
			var shard int
			err := s.pool.QueryRow(ctx, `SELECT p.slot, t.shard FROM outbox_relay.tenants t JOIN outbox_relay.progress p USING (shard)
				WHERE t.schema = $1 AND NOT coalesce(t.backfill IS NOT NULL AND t.backfill_done_at IS NULL, false)`, tenants[0]).Scan(&slot, &shard)
			if errors.Is(err, pgx.ErrNoRows) {
				return false // the move before is not over
			}
			require.NoError(t, err)
			s.exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", slot)
			_, err = s.pool.Exec(ctx, "SELECT pg_drop_replication_slot($1)", slot)
			if err != nil { // a relay was faster
				return false
			}
			require.NoError(t, last.run(ctx, 20)) // what no slot will bring
			return s.moveTo(ctx, t, tenants[0], 1-shard)
		})
	}
	close(stop)
	require.NoError(t, group.Wait())
	s.receiver.await(ctx, t, "all pairs", func() bool { return s.receiver.pairs() >= len(expected) })
	s.receiver.await(ctx, t, "their record", func() bool { return s.recorded(t, tenants) == len(expected) })
	for _, p := range replicas {
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}
	got := s.receiver.delivered()
	for p := range got {
		_, due := expected[p]
		require.True(t, due, "sent without a match, or rolled back (%t): %v", rolledBack[p.event], p)
	}
	for p := range expected {
		require.Positive(t, got[p], "lost: %v", p)
	}
}

// TestShardsAreGivenUp: relays refuse to run with fewer shards than tenants are on, and migrate drops the slots of shards that were left.
func TestShardsAreGivenUp(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK), "acme")
	single, err := os.ReadFile(s.config)
	require.NoError(t, err)
	s.shard(t, 2)
	sharded, err := os.ReadFile(s.config)
	require.NoError(t, err)
	for i := range 2 {
		schema := fmt.Sprintf("new_%d", i)
		s.exec(t, "CREATE SCHEMA "+pgx.Identifier{schema}.Sanitize())
		s.command(t, "tenants", "add", schema)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	assert.Equal(t, 1, s.shardOf(ctx, t, "new_0"), "the shard with the fewest")
	assert.Equal(t, 0, s.shardOf(ctx, t, "new_1"), "the first of several")
	o := invoke(t, nil, "tenants", "list", "--config", s.config)
	assert.Regexp(t, `(?m)^SCHEMA +SHARD +STATE`, o.out)
	assert.Regexp(t, `(?m)^new_0 +1 +active`, o.out)
	assert.Equal(t, exitUsage, invoke(t, nil, "tenants", "move", "new_0", "--shard", "2", "--config", s.config).code)
	assert.Equal(t, exitUsage, invoke(t, nil, "tenants", "move", "new_0", "--config", s.config).code)

	require.NoError(t, os.WriteFile(s.config, single, 0o600))
	o = invoke(t, nil, "run", "--config", s.config)
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "tenants move")
	o = invoke(t, nil, "migrate", "--config", s.config)
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "tenants move")
	o = invoke(t, nil, "check", "--config", s.config)
	assert.Contains(t, o.out, "FAIL  shards: tenant new_0")

	require.NoError(t, os.WriteFile(s.config, sharded, 0o600))
	p := startRelay(t, s.config)
	s.command(t, "tenants", "move", "new_0", "--shard", "0")
	s.receiver.await(ctx, t, "the end of the move", func() (done bool) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT backfill_done_at IS NOT NULL FROM outbox_relay.tenants WHERE schema = 'new_0'`).Scan(&done))
		return done
	})
	require.NoError(t, os.WriteFile(s.config, single, 0o600))
	o = invoke(t, nil, "migrate", "--config", s.config)
	assert.Equal(t, exitFailure, o.code, "a relay still reads the slot")
	_, exit := p.stop(t)
	require.NoError(t, exit)
	s.command(t, "migrate")
	var left int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1 || '_1') + (SELECT count(*) FROM outbox_relay.progress WHERE shard > 0)`, s.slot).Scan(&left))
	assert.Zero(t, left)
}
