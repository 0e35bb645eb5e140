package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// pair is one delivery as the outside world sees it.
type pair struct{ endpoint, event outbox.UUID }

// arrival is one request at a receiver.
type arrival struct {
	pair
	status int
}

// receiver is a set of endpoints that log every request and check every signature with an implementation that is not ours.
type receiver struct {
	*httptest.Server
	secrets sync.Map // endpoint id in the path → *standardwebhooks.Webhook
	answer  func(endpoint outbox.UUID, attempt string) int

	mu       sync.Mutex
	arrivals []arrival
	seen     map[pair]bool       // answered with 2xx
	accepted map[outbox.UUID]int // how many of these each endpoint has
	bad      []string
	header   http.Header // of the latest request
	body     []byte
	grown    chan struct{}
	conns    conns
}

func newReceiver(t testing.TB, answer func(endpoint outbox.UUID, attempt string) int) *receiver {
	t.Helper()
	r := &receiver{answer: answer, grown: make(chan struct{}, 1), seen: make(map[pair]bool), accepted: make(map[outbox.UUID]int)}
	r.Server = httptest.NewUnstartedServer(r)
	r.Config.ConnState = r.conns.changed
	r.Start()
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	endpoint, idErr := outbox.ParseUUID(strings.TrimPrefix(req.URL.Path, "/"))
	event, eventErr := outbox.ParseUUID(req.Header.Get("webhook-id"))
	verify, known := r.secrets.Load(endpoint)
	var fault string
	switch {
	case err != nil || idErr != nil || eventErr != nil || !known:
		fault = fmt.Sprintf("unusable request %s: %v %v %v", req.URL.Path, err, idErr, eventErr)
	default:
		if err := verify.(*standardwebhooks.Webhook).Verify(body, req.Header); err != nil {
			fault = fmt.Sprintf("signature of %s: %v", event, err)
		}
	}
	status := r.answer(endpoint, req.Header.Get("webhook-attempt"))
	r.mu.Lock()
	if fault != "" {
		r.bad = append(r.bad, fault)
	}
	r.header, r.body = req.Header, body
	p := pair{endpoint, event}
	r.arrivals = append(r.arrivals, arrival{p, status})
	if status < 300 && !r.seen[p] {
		r.seen[p] = true
		r.accepted[endpoint]++
	}
	r.mu.Unlock()
	select {
	case r.grown <- struct{}{}:
	default:
	}
	w.WriteHeader(status)
}

// count returns how many requests have arrived.
func (r *receiver) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.arrivals)
}

// pairs returns how many different deliveries have been answered with 2xx.
func (r *receiver) pairs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.seen)
}

// await waits for the condition to hold, looking whenever a request has arrived.
func (r *receiver) await(ctx context.Context, t testing.TB, what string, condition func() bool) {
	t.Helper()
	for !condition() {
		select {
		case <-r.grown:
		case <-time.After(50 * time.Millisecond): // the condition may depend on the database as well
		case <-ctx.Done():
			require.FailNow(t, "gave up waiting", what)
		}
	}
}

// delivered returns how often each pair was answered with 2xx.
func (r *receiver) delivered() map[pair]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := make(map[pair]int)
	for _, a := range r.arrivals {
		if a.status < 300 {
			got[a.pair]++
		}
	}
	return got
}

// relayProcess is the real binary at work.
type relayProcess struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	exit error         // how; to be read after done
	log  *os.File
}

func startRelay(t testing.TB, config string) *relayProcess {
	t.Helper()
	return startBinary(t, binary(t), config)
}

// startBinary starts one of several builds, with more in its environment.
func startBinary(t testing.TB, path, config string, env ...string) *relayProcess {
	t.Helper()
	return startProcess(t, exec.Command(path, "run", "--config", config), env...) //nolint:noctx // ended by its signals
}

func startProcess(t testing.TB, cmd *exec.Cmd, env ...string) *relayProcess {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "relay-*.log")
	require.NoError(t, err)
	p := &relayProcess{cmd: cmd, done: make(chan struct{}), log: log}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	require.NoError(t, p.cmd.Start())
	go func() {
		defer close(p.done)
		p.exit = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-p.done
		if t.Failed() {
			out, _ := os.ReadFile(log.Name())
			t.Logf("log of the relay:\n%s", tailOf(out, 4000))
		}
	})
	return p
}

func tailOf(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

func (p *relayProcess) kill(t testing.TB) {
	t.Helper()
	require.NoError(t, p.cmd.Process.Kill())
	<-p.done
}

// said is what the relay has logged so far.
func (p *relayProcess) said(t testing.TB) string {
	t.Helper()
	out, err := os.ReadFile(p.log.Name())
	require.NoError(t, err)
	return string(out)
}

// stop sends SIGTERM and returns how the process ended and how long that took.
func (p *relayProcess) stop(t testing.TB) (took time.Duration, exit error) {
	t.Helper()
	began := time.Now()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	<-p.done
	return time.Since(began), p.exit
}

// site is a database with tenants, and a receiver.
type site struct {
	dsn      string
	pool     *pgxpool.Pool
	config   string
	slot     string
	receiver *receiver
}

func newSite(t testing.TB, settings string, answer func(outbox.UUID, string) int, tenants ...string) *site {
	t.Helper()
	return newSiteOn(t, pgtest.Database(t), settings, answer, tenants...)
}

func newSiteOn(t testing.TB, dsn, settings string, answer func(outbox.UUID, string) int, tenants ...string) *site {
	t.Helper()
	s := &site{dsn: dsn, slot: "e2e_" + strings.ReplaceAll(outbox.NewUUID().String(), "-", ""), receiver: newReceiver(t, answer)}
	s.config = filepath.Join(t.TempDir(), "relay.yaml")
	yaml := fmt.Sprintf("database:\n  url: %q\n  slot: %s\nnetwork:\n  allow: [127.0.0.0/8]\nserver:\n  listen: \"\"\n%s", dsn, s.slot, settings)
	require.NoError(t, os.WriteFile(s.config, []byte(yaml), 0o600))
	pool, err := pgxpool.New(t.Context(), dsn)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	s.pool = pool
	s.command(t, "migrate")
	for _, schema := range tenants {
		s.exec(t, "CREATE SCHEMA "+pgx.Identifier{schema}.Sanitize())
		s.command(t, "tenants", "add", schema)
	}
	return s
}

// command runs a command of the binary that must succeed.
func (s *site) command(t testing.TB, args ...string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), binary(t), append(args, "--config", s.config)...).CombinedOutput()
	require.NoError(t, err, "outbox-relay %s:\n%s", strings.Join(args, " "), out)
}

func (s *site) exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	_, err := s.pool.Exec(t.Context(), sql, args...)
	require.NoError(t, err, sql)
}

// endpoint inserts an endpoint that the receiver knows.
func (s *site) endpoint(t testing.TB, schema string, retries int) outbox.UUID {
	t.Helper()
	return s.endpointBy(t, s.pool, schema, retries)
}

// execer is a pool, or a transaction.
type execer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

func (s *site) endpointBy(t testing.TB, by execer, schema string, retries int) outbox.UUID {
	t.Helper()
	id := outbox.NewUUID()
	key := []byte("secret of " + id.String())
	verify, err := standardwebhooks.NewWebhookRaw(key)
	require.NoError(t, err)
	s.receiver.secrets.Store(id, verify)
	_, err = by.Exec(t.Context(), `INSERT INTO `+pgx.Identifier{schema, "webhook_endpoints"}.Sanitize()+`
		(id, name, endpoint_url, secret_token, max_retry_attempts, retry_backoff_seconds, retry_backoff_multiplier, created_by_user_id)
		VALUES ($1, 'e2e', $2, $3, $4, 1, 1.0, $1)`,
		id, s.receiver.URL+"/"+id.String(), "whsec_"+base64.StdEncoding.EncodeToString(key), retries)
	require.NoError(t, err)
	return id
}

func (s *site) subscribe(t testing.TB, schema string, endpoint outbox.UUID, eventType, filter string) {
	t.Helper()
	s.subscribeBy(t, s.pool, schema, endpoint, eventType, filter)
}

func (s *site) subscribeBy(t testing.TB, by execer, schema string, endpoint outbox.UUID, eventType, filter string) {
	t.Helper()
	types := pgx.Identifier{schema, "webhook_event_types"}.Sanitize()
	_, err := by.Exec(t.Context(), `INSERT INTO `+types+` (id, event_type, category, display_name) VALUES ($1, $2, 'e2e', $2) ON CONFLICT (event_type) DO NOTHING`,
		outbox.NewUUID(), eventType)
	require.NoError(t, err)
	_, err = by.Exec(t.Context(), `INSERT INTO `+pgx.Identifier{schema, "webhook_subscriptions"}.Sanitize()+`
		(id, endpoint_id, event_type_id, event_type, event_filters)
		SELECT $1, $2, id, event_type, $4 FROM `+types+` WHERE event_type = $3`, outbox.NewUUID(), endpoint, eventType, filter)
	require.NoError(t, err)
}

// rule is what the test knows of a subscription, without any code of the relay.
type rule struct {
	endpoint outbox.UUID
	matches  func(eventType string, amount int) bool
}

// writer inserts events, some of them in transactions and savepoints that roll back, and notes what was committed.
type writer struct {
	site    *site
	tenants []string
	rules   map[string][]rule
	rnd     *rand.Rand

	mu         *sync.Mutex
	expected   map[pair]string // committed and matching, with the tenant
	rolledBack map[outbox.UUID]bool
}

//nolint:gochecknoglobals // tables of the test
var e2eTypes = []string{"order.created", "order.paid", "order.line.added", "invoice.sent", "user.signed_up"}

func (w *writer) run(ctx context.Context, events int) error {
	for n := 0; n < events; {
		size := 1 + w.rnd.IntN(5)
		if err := w.transaction(ctx, w.tenants[w.rnd.IntN(len(w.tenants))], size); err != nil {
			return err
		}
		n += size
	}
	return nil
}

func (w *writer) transaction(ctx context.Context, schema string, size int) error {
	tx, err := w.site.pool.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }() // after an error, or the pool waits for it
	var committed []outbox.Event
	for range size {
		e := w.event()
		sub := w.rnd.IntN(8) == 0
		target := tx
		if sub {
			if target, err = tx.Begin(ctx); err != nil {
				return err
			}
		}
		if _, err := outbox.Insert(ctx, target, schema, e); err != nil {
			return err
		}
		if sub && w.rnd.IntN(2) == 0 {
			if err := target.Rollback(ctx); err != nil {
				return err
			}
			w.note(e.ID)
			continue
		}
		if sub {
			if err := target.Commit(ctx); err != nil {
				return err
			}
		}
		committed = append(committed, e)
	}
	if w.rnd.IntN(6) == 0 {
		for _, e := range committed {
			w.note(e.ID)
		}
		return tx.Rollback(ctx)
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	w.expect(schema, committed)
	return nil
}

func (w *writer) event() outbox.Event {
	amount := w.rnd.IntN(100)
	return outbox.Event{
		ID: outbox.NewUUID(), Type: e2eTypes[w.rnd.IntN(len(e2eTypes))], AggregateID: outbox.NewUUID(), AggregateType: "order",
		Data: fmt.Appendf(nil, `{"amount": %d, "note": "%s"}`, amount, strings.Repeat("x", w.rnd.IntN(300))),
		// the test's own channel: what the rules look at
		Name: fmt.Sprint(amount),
	}
}

func (w *writer) note(id outbox.UUID) {
	w.mu.Lock()
	w.rolledBack[id] = true
	w.mu.Unlock()
}

func (w *writer) expect(schema string, events []outbox.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range events {
		var amount int
		_, _ = fmt.Sscan(e.Name, &amount)
		for _, r := range w.rules[schema] {
			if r.matches(e.Type, amount) {
				w.expected[pair{r.endpoint, e.ID}] = schema
			}
		}
	}
}

// setUpSubscriptions makes 20 endpoints with 60 subscriptions over the tenants, and says what they mean.
func setUpSubscriptions(t *testing.T, s *site, tenants []string, rnd *rand.Rand) map[string][]rule {
	t.Helper()
	rules := make(map[string][]rule)
	for i := range 20 {
		schema := tenants[i%len(tenants)]
		ep := s.endpoint(t, schema, 10)
		for range 3 {
			least := rnd.IntN(100)
			kind := e2eTypes[rnd.IntN(len(e2eTypes))]
			filter, pattern := fmt.Sprintf(`{"amount": {"$gte": %d}}`, least), kind
			matches := func(eventType string, amount int) bool { return eventType == kind && amount >= least }
			switch rnd.IntN(4) {
			case 0:
				pattern = "order.*"
				matches = func(eventType string, amount int) bool {
					return (eventType == "order.created" || eventType == "order.paid") && amount >= least
				}
			case 1:
				pattern, filter = "order.**", `{"$not": {"amount": {"$lt": 50}}}`
				matches = func(eventType string, amount int) bool { return strings.HasPrefix(eventType, "order.") && amount >= 50 }
			}
			s.subscribe(t, schema, ep, pattern, filter)
			rules[schema] = append(rules[schema], rule{ep, matches})
		}
	}
	return rules
}

// TestNothingLostUnderKills is the promise of the product: whatever is committed and matches arrives and is recorded, nothing of a rollback is sent,
// and a kill repeats at most what was in flight or not recorded, while the relay is killed twenty times.
func TestNothingLostUnderKills(t *testing.T) {
	t.Parallel()
	const events, kills, window, workers, claim = 10_000, 20, 400, 64, 100
	tenants := []string{"tenant_one", "tenant_two", `Tenant "three"`}
	rnd := rand.New(rand.NewPCG(42, 42))
	var flaky sync.Map
	var first atomic.Int32
	s := newSite(t, fmt.Sprintf("delivery:\n  workers: %d\n  endpoint_concurrency: 8\nwindow:\n  deliveries: %d\n  hold: 500ms\nrecord:\n  batch: 100\n"+
		"queue:\n  batch: %d\n  poll: 100ms\n  lease: 5s\nbreaker:\n  failures: 50\n  open_for: 1s\n", workers, window, claim),
		func(endpoint outbox.UUID, attempt string) int {
			// Not every one: fifty failures in a row would open the breaker, whose every probe is a first attempt again.
			if _, bad := flaky.Load(endpoint); bad && attempt == "1" && first.Add(1)%8 != 0 {
				return http.StatusServiceUnavailable
			}
			return http.StatusOK
		}, tenants...)
	rules := setUpSubscriptions(t, s, tenants, rnd)
	flaky.Store(rules[tenants[0]][0].endpoint, true) // seven of eight of its first attempts fail
	expected, rolledBack, mu := make(map[pair]string), make(map[outbox.UUID]bool), new(sync.Mutex)

	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	group, writing := errgroup.WithContext(ctx)
	for i := range 4 {
		w := &writer{
			site: s, tenants: tenants, rules: rules, rnd: rand.New(rand.NewPCG(7, uint64(i))),
			mu: mu, expected: expected, rolledBack: rolledBack,
		}
		group.Go(func() error { return w.run(writing, events/4) })
	}
	repeatable := make(map[pair]int) // how often a kill came between a delivery and its record
	var before map[pair]int          // delivered before the relay of now
	for range kills {
		p := startRelay(t, s.config)
		enough := s.receiver.count() + 100 + rnd.IntN(800)
		patience := time.Now().Add(3 * time.Second) // towards the end there may be too little left to send
		s.receiver.await(ctx, t, "deliveries before a kill", func() bool { return s.receiver.count() >= enough || time.Now().After(patience) })
		p.kill(t)
		s.receiver.settle(ctx, t) // else what it is about to note would be taken for recorded
		unrecorded := s.unrecorded(t, tenants)
		// Of this relay's: what an earlier one had claimed is leased for a while, and a few kills may come within that.
		got, held := s.receiver.delivered(), 0
		for _, p := range unrecorded {
			if got[p] > before[p] {
				held++
			}
		}
		before = got
		require.LessOrEqual(t, held, window+window/4+2*claim, "more was unrecorded than the relay may hold")
		for _, p := range unrecorded {
			repeatable[p]++
		}
	}
	require.NoError(t, group.Wait())
	last := startRelay(t, s.config)
	s.receiver.await(ctx, t, "every committed matching pair", func() bool { return s.receiver.pairs() >= len(expected) })
	s.receiver.await(ctx, t, "an empty retry queue", func() bool {
		var n int
		return s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&n) == nil && n == 0
	})
	_, exit := last.stop(t)
	require.NoError(t, exit)

	require.Empty(t, s.receiver.bad)
	got := s.receiver.delivered()
	duplicates := 0
	for p, n := range got {
		_, due := expected[p]
		require.True(t, due, "sent without a match, or rolled back (%t): %v", rolledBack[p.event], p)
		require.LessOrEqual(t, n-1, repeatable[p], "sent again though no kill came between delivery and record")
		duplicates += n - 1
	}
	for p := range expected {
		require.Positive(t, got[p], "lost: %v", p)
	}
	require.Equal(t, len(expected), s.recorded(t, tenants), "deliveries recorded as a success")
	t.Logf("pairs %d, rolled back events %d, kills %d, duplicates %d", len(expected), len(rolledBack), kills, duplicates)
}

// unrecorded lists what has been delivered but is not recorded as a success, while no relay runs.
func (s *site) unrecorded(t testing.TB, tenants []string) (pairs []pair) {
	t.Helper()
	known := make(map[pair]bool)
	for _, schema := range tenants {
		rows, err := s.pool.Query(t.Context(), `SELECT webhook_endpoint_id, webhook_event_id FROM `+
			pgx.Identifier{schema, "webhook_deliveries"}.Sanitize()+` WHERE relayed AND delivery_status = 'success'`)
		require.NoError(t, err)
		var p pair
		_, err = pgx.ForEachRow(rows, []any{&p.endpoint, &p.event}, func() error {
			known[p] = true
			return nil
		})
		require.NoError(t, err)
	}
	for p := range s.receiver.delivered() {
		if !known[p] {
			pairs = append(pairs, p)
		}
	}
	return pairs
}

// recorded counts the deliveries that the relay has recorded as a success.
func (s *site) recorded(t testing.TB, tenants []string) (n int) {
	t.Helper()
	for _, schema := range tenants {
		var k int
		require.NoError(t, s.pool.QueryRow(t.Context(), `SELECT count(*) FROM `+pgx.Identifier{schema, "webhook_deliveries"}.Sanitize()+
			` WHERE relayed AND delivery_status = 'success'`).Scan(&k))
		n += k
	}
	return n
}
