package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// faultSettings make everything small and fast, so that a run of a few seconds meets every bound.
func faultSettings(window int) string {
	return fmt.Sprintf(`window: {deliveries: %d, hold: 300ms}
delivery: {workers: %d, endpoint_concurrency: 8, default_timeout: 2s}
record: {batch: %d}
queue: {poll: 50ms, lease: 3s, batch: 50}
retry: {schedule: [100ms]}
breaker: {failures: 30, open_for: 300ms}
shutdown: {drain: 3s}
`, window, min(window, 128), min(window, 50))
}

// window is how many deliveries a relay has in memory, and held how many that are at most without the reserve: a quarter for what is deferred, and two claims.
const (
	window = 200
	held   = window + window/4 + 2*50
)

// A violation is an invariant of the fault plan that did not hold.
type violation struct{ rule, text string }

// faultResult is what a run has shown.
type faultResult struct {
	scenario                      string
	seed                          uint64
	failed                        []uint64 // seeds, in a sum
	faults, events, pairs         int
	unclear                       int // commits that had to be asked about
	lost, ghosts, phantoms        int // phantoms: delivered, then lost with a primary
	duplicates, allowed, inverted int
	samples, ahead                int // of the confirmed position; ahead of an outcome
	recoveries, takeovers         []time.Duration
	walPeak, rssPeak              int64
	took                          time.Duration
	violations                    []violation
}

// interruption is a moment at which deliveries were repeatable: those that had begun to arrive, and were not recorded.
type interruption struct {
	moment   int
	recorded map[pair]bool
}

// A faultRun is one scenario with one seed.
type faultRun struct {
	t      *testing.T
	sc     *scenario
	rnd    *rand.Rand
	ctx    context.Context //nolint:containedctx // of the whole run; what belongs to it ends with it
	server *pgtest.Server  // the run's own; nil: it has a database of the shared one
	disk   *smallDisk      // of the server; nil: it has room
	*site
	pool     *pgxpool.Pool
	o        *oracle
	front    *front
	tenants  []string
	bug      failpoint.Bug
	relays   []*relayProcess // all that were started
	writers  *errgroup.Group
	stop     chan struct{}
	began    time.Time // after the set-up
	other    *failoverSite
	complete bool // all has arrived, or was waited for in vain
	told     bool // writers have been told to stop

	mu            sync.Mutex
	result        faultResult
	interruptions []interruption
	since         time.Time // the end of the last fault
	recovered     time.Time // the first delivery of an event begun after that
	audited       bool      // the audit has found what the log did not bring
	unsampled     bool      // the positions mean nothing any more
	slack         int       // repeated deliveries that no interruption accounts for
}

// abortRun ends a run from within.
type abortRun struct{}

// runFault plays one scenario. Its result says what was violated; what could not even be set up fails the test.
func runFault(t *testing.T, sc *scenario, seed uint64, bug failpoint.Bug, patience time.Duration) *faultResult {
	t.Helper()
	began := time.Now()
	r := &faultRun{t: t, sc: sc, rnd: rand.New(rand.NewPCG(seed, 1)), bug: bug, tenants: []string{"tenant_one", "tenant_two"}, stop: make(chan struct{})}
	r.result = faultResult{scenario: sc.name, seed: seed}
	ctx, cancel := context.WithTimeout(t.Context(), patience+time.Minute) // the set-up has a minute of its own
	defer cancel()
	r.ctx = ctx
	r.setUp(seed)
	r.began = time.Now()
	t.Logf("set up in %v", r.began.Sub(began).Round(time.Millisecond))
	ctx, cancelRun := context.WithTimeout(ctx, patience)
	defer cancelRun()
	r.ctx = ctx
	sampling, stopSampling := context.WithCancel(ctx)
	sampled := make(chan struct{})
	go func() {
		defer close(sampled)
		r.sample(sampling)
	}()
	r.play()
	stopSampling()
	<-sampled
	r.close()
	r.judge()
	r.result.took = time.Since(began)
	return &r.result
}

func (r *faultRun) setUp(seed uint64) {
	t := r.t
	t.Helper()
	var dsn string
	if r.sc.server != nil {
		config := map[string]string{"synchronous_commit": "on", "max_connections": "60", "shared_buffers": "16MB", "max_wal_senders": "10", "max_replication_slots": "10"}
		maps.Copy(config, r.sc.server)
		options := pgtest.Options{Config: config}
		if r.sc.disk > 0 {
			r.disk = mountDisk(t, r.sc.disk)
			options.Data = r.disk.data
		}
		server, err := pgtest.Start(r.ctx, options)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, server.Close()) })
		r.server, dsn = server, server.URL("postgres")
	} else {
		dsn = pgtest.Database(t)
	}
	r.site = newSiteOn(t, dsn, faultSettings(cmp.Or(r.sc.window, window))+r.sc.settings, always(200), r.tenants...)
	cfg, err := pgxpool.ParseConfig(dsn)
	require.NoError(t, err)
	cfg.MaxConns = 16
	r.pool, err = pgxpool.NewWithConfig(r.ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(r.pool.Close)
	if r.server == nil {
		r.asRunner(t)
	}
	r.o = newOracle()
	r.front = newFront(t, &r.receiver.secrets, seed)
	r.front.accepted = r.noteAccepted
	r.receiver.URL = r.front.server.URL
	r.subscribeAll()
	if r.sc.prepare != nil {
		r.sc.prepare(r)
	}
}

// subscribeAll makes the endpoints of a run: without an order, with one by aggregate, with one of all events.
func (r *faultRun) subscribeAll() {
	add := func(tenant, pattern, filter, order string, matches func(kind string, amount int) bool) {
		id := r.endpoint(r.t, tenant, 10)
		r.subscribe(r.t, tenant, id, pattern, filter)
		if order != "" {
			r.exec(r.t, `UPDATE `+pgx.Identifier{tenant, "webhook_endpoints"}.Sanitize()+` SET delivery_order = $2 WHERE id = $1`, id, order)
			r.o.ordered[id] = order == "strict"
		}
		r.o.addRule(tenant, id, matches)
	}
	for _, tenant := range r.tenants {
		add(tenant, "order.**", `{"amount": {"$gte": 20}}`, "", func(kind string, amount int) bool { return strings.HasPrefix(kind, "order.") && amount >= 20 })
		add(tenant, "order.*", "{}", "aggregate", func(kind string, _ int) bool { return kind == "order.created" || kind == "order.paid" })
	}
	add(r.tenants[0], strictKind, "{}", "strict", func(kind string, _ int) bool { return kind == strictKind })
}

// play runs the scenario with writers at work, and then waits for all that it led to.
func (r *faultRun) play() {
	group, ctx := errgroup.WithContext(r.ctx)
	r.writers = group
	defer func() {
		r.stopWriters()
		_ = group.Wait() // a fault of theirs has been noted
		if p := recover(); p != nil {
			if _, ours := p.(abortRun); !ours {
				panic(p)
			}
		}
	}()
	for i := range 3 {
		w := newFaultWriter(r.o, r.pool, r.result.seed, i, r.tenants)
		if i == 2 {
			w.open, w.size = time.Duration(50+r.rnd.IntN(400))*time.Millisecond, 2 // transactions that outlast the others
		}
		if r.sc.writer != nil {
			r.sc.writer(r, w)
		}
		group.Go(func() error { return r.write(ctx, w) })
	}
	r.sc.run(r)
	r.t.Logf("played in %v", time.Since(r.began).Round(time.Millisecond))
	r.stopWriters()
	_ = group.Wait()
	if r.sc.promotes {
		r.revoke()
	}
	r.await("all pairs", func() bool { return r.allArrived() })
	r.await("an empty retry queue", func() bool {
		var n int
		return r.pool.QueryRow(r.ctx, `SELECT count(*) FROM outbox_relay.retry_queue WHERE endpoint_id <> ALL($1)`, slices.Collect(maps.Keys(r.o.ignored))).Scan(&n) == nil && n == 0
	})
	r.await("the record of all pairs", func() bool {
		found, err := r.successes()
		return err == nil && r.o.all(found)
	})
	r.complete = true
	r.t.Logf("caught up in %v", time.Since(r.began).Round(time.Millisecond))
}

func (r *faultRun) allArrived() bool {
	r.front.mu.Lock()
	defer r.front.mu.Unlock()
	return len(r.front.seen) >= r.o.due() && r.o.all(r.front.seen)
}

func (r *faultRun) write(ctx context.Context, w *faultWriter) error {
	err := w.run(ctx, r.stop)
	if err != nil {
		r.violate("harness", "writer %d: %v", w.number, err)
	}
	return err
}

func (r *faultRun) stopWriters() {
	if !r.told {
		r.told = true
		close(r.stop)
	}
}

// violate notes that an invariant did not hold.
func (r *faultRun) violate(rule, format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.result.violations) < 10 {
		r.result.violations = append(r.result.violations, violation{rule, fmt.Sprintf(format, args...)})
	}
}

func (r *faultRun) violated() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.result.violations) > 0
}

// await waits until the condition holds. It ends the run once an invariant is violated, or its time is over.
func (r *faultRun) await(what string, condition func() bool) {
	for !condition() {
		if r.violated() {
			panic(abortRun{})
		}
		select {
		case <-r.front.grown:
		case <-time.After(20 * time.Millisecond): // the condition may depend on the database as well
		case <-r.ctx.Done():
			r.complete = true
			r.violate("I1", "gave up waiting for %s: %d of %d pairs", what, r.front.pairs(), r.o.due())
			panic(abortRun{})
		}
	}
}

// more waits for n more deliveries.
func (r *faultRun) more(n int) {
	enough := r.front.pairs() + n
	r.await(fmt.Sprintf("%d more deliveries", n), func() bool { return r.front.pairs() >= enough })
}

// event ids as a parameter.
func uuids(list map[pair]*entry) []outbox.UUID {
	ids := make([]outbox.UUID, 0, len(list))
	for p := range list {
		ids = append(ids, p.event)
	}
	return ids
}
