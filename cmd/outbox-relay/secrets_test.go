package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

// witness is a receiver that notes which of two secrets each request is signed with, as the official library sees it.
type witness struct {
	*httptest.Server
	old, fresh *standardwebhooks.Webhook
	flaky      int // every so many'th first attempt is answered with 503

	mu    sync.Mutex
	seen  []signed
	grown chan struct{}
}

// signed is one request.
type signed struct {
	event      string
	at         int64 // webhook-timestamp
	status     int
	old, fresh bool
}

func newWitness(t *testing.T, old string) *witness {
	t.Helper()
	w := &witness{flaky: 10, grown: make(chan struct{}, 1)}
	w.old = official(t, old)
	w.Server = httptest.NewServer(w)
	t.Cleanup(w.Close)
	return w
}

func official(t testing.TB, token string) *standardwebhooks.Webhook {
	t.Helper()
	verify, err := standardwebhooks.NewWebhook(token)
	require.NoError(t, err)
	return verify
}

func (w *witness) ServeHTTP(out http.ResponseWriter, req *http.Request) {
	body, _ := io.ReadAll(req.Body)
	s := signed{event: req.Header.Get("webhook-id"), status: http.StatusOK}
	_, _ = fmt.Sscan(req.Header.Get("webhook-timestamp"), &s.at)
	w.mu.Lock()
	defer w.mu.Unlock()
	s.old = w.old.Verify(body, req.Header) == nil
	s.fresh = w.fresh != nil && w.fresh.Verify(body, req.Header) == nil
	if len(w.seen)%w.flaky == 0 && req.Header.Get("webhook-attempt") == "1" {
		s.status = http.StatusServiceUnavailable
	}
	w.seen = append(w.seen, s)
	out.WriteHeader(s.status)
	select {
	case w.grown <- struct{}{}:
	default:
	}
}

func (w *witness) expect(fresh *standardwebhooks.Webhook) {
	w.mu.Lock()
	w.fresh = fresh
	w.mu.Unlock()
}

func (w *witness) requests() []signed {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]signed(nil), w.seen...)
}

// accepted counts the different events that were taken.
func (w *witness) accepted() int {
	events := make(map[string]bool)
	for _, s := range w.requests() {
		if s.status == http.StatusOK {
			events[s.event] = true
		}
	}
	return len(events)
}

// keepUp commits a few events every 20 ms for each tenant, until it is told to end: then it says how many there are.
func (s *site) keepUp(t *testing.T, tenants ...string) (end func() int) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan int, 1)
	go func() {
		n := 0
		defer func() { done <- n }()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			for _, tenant := range tenants {
				_, err := s.pool.Exec(context.Background(), `INSERT INTO `+pgx.Identifier{tenant, "webhook_events"}.Sanitize()+` (id, event_type, aggregate_id, aggregate_type, event_data)
					SELECT gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', '{}' FROM generate_series(1, 3)`)
				if err != nil {
					t.Errorf("commit events: %v", err)
					return
				}
				n += 3
			}
		}
	}()
	end = sync.OnceValue(func() int {
		close(stop)
		return <-done
	})
	t.Cleanup(func() { end() })
	return end
}

// owner has a command log in as the owner of the tables, whatever role the relay has.
func (s *site) owner(args ...string) []string { return append(args, "--database-url", s.dsn) }

// TestSecretRotatesUnderLoad: while events flow and some of them are retried, an endpoint's secret is sealed and then rotated. Its receiver verifies with the
// old secret, changes over when it likes, and no request fails; the old signature is there exactly as long as was asked for.
func TestSecretRotatesUnderLoad(t *testing.T) {
	t.Parallel()
	const keep = 15 * time.Second
	key := fileOf(t, "key", seal.NewKey())
	s := newSite(t, fmt.Sprintf("queue:\n  poll: 100ms\nbreaker:\n  failures: 1000\n  failure_ratio: 0\nsecrets:\n  keys: ['2026=file:%s']\n", key), always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s.asRunner(t)
	id := s.endpoint(t, "acme", 10)
	var token string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT secret_token FROM acme.webhook_endpoints`).Scan(&token))
	w := newWitness(t, token)
	s.exec(t, `UPDATE acme.webhook_endpoints SET endpoint_url = $1`, w.URL)
	s.subscribe(t, "acme", id, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	end := s.keepUp(t, "acme")
	reach := func(what string, n int) {
		t.Helper()
		s.receiver.await(ctx, t, what, func() bool { return len(w.requests()) >= n })
	}
	reach("requests with a plain secret", 100)

	// The relay's own role may not touch it.
	for _, args := range [][]string{{"secrets", "seal"}, {"endpoints", "rotate-secret", id.String()}} {
		_, said, code := s.desk(t, args...)
		require.Equal(t, exitFailure, code)
		require.Contains(t, said, "hint: the relay's own role may read secrets only")
	}
	out, said, code := s.desk(t, s.owner("secrets", "seal")...)
	require.Zero(t, code, said)
	require.Contains(t, out, "1 secret is sealed with the key 2026")
	stored := func() (primary, secondary string) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT secret_token, coalesce(secondary_secret_token, '') FROM acme.webhook_endpoints`).Scan(&primary, &secondary))
		return primary, secondary
	}
	primary, _ := stored()
	require.Equal(t, "2026", seal.KeyOf(primary))
	reach("requests with a sealed secret", len(w.requests())+100)

	var rotation struct {
		Secret   string    `json:"secret"`
		OldUntil time.Time `json:"old_secret_until"`
		Key      string    `json:"sealed_with"`
	}
	began := time.Now()
	s.read(t, &rotation, s.owner("endpoints", "rotate-secret", id.String(), "--expires", keep.String())...)
	require.Equal(t, "2026", rotation.Key)
	require.WithinRange(t, rotation.OldUntil, began.Add(keep), time.Now().Add(keep))
	primary, secondary := stored()
	require.Equal(t, []string{"2026", "2026"}, []string{seal.KeyOf(primary), seal.KeyOf(secondary)})
	require.NotContains(t, primary+secondary, rotation.Secret)
	w.expect(official(t, rotation.Secret))

	var first signed
	s.receiver.await(ctx, t, "the new signature", func() bool {
		for _, r := range w.requests() {
			if r.fresh {
				first = r
				return true
			}
		}
		return false
	})
	changeover := rotation.OldUntil.Add(-3 * time.Second) // when the receiver begins to verify with the new one, and with nothing else
	s.receiver.await(ctx, t, "the end of the old signature", func() bool {
		seen := w.requests()
		last := seen[len(seen)-1]
		return last.at >= rotation.OldUntil.Unix()+2
	})
	n := end()
	s.receiver.await(ctx, t, "all of it", func() bool { return w.accepted() == n })
	_, exit := p.stop(t)
	require.NoError(t, exit)

	both, over := 0, 0
	for _, r := range w.requests() {
		signedAt, signedBefore := time.Unix(r.at, 0), time.Unix(r.at+1, 0) // the header has whole seconds
		if signedBefore.Before(changeover) {
			require.True(t, r.old, "the receiver still verifies with the old secret: %+v", r)
		}
		if !signedAt.Before(changeover) {
			require.True(t, r.fresh, "the receiver verifies with the new secret: %+v", r)
		}
		if r.at > first.at {
			require.True(t, r.fresh, "the new one signs from its commit on: %+v", r)
		}
		if !signedBefore.After(rotation.OldUntil) {
			require.True(t, r.old, "ended too early: %+v, until %s", r, rotation.OldUntil)
		}
		if !signedAt.Before(rotation.OldUntil) {
			require.False(t, r.old, "signed when its time was over: %+v, until %s", r, rotation.OldUntil)
			over++
		}
		if r.old && r.fresh {
			both++
		}
	}
	t.Logf("%d events, %d requests: %d with both signatures, %d after the old one's end", n, len(w.requests()), both, over)
	require.Positive(t, both)
	require.Positive(t, over)
	require.Less(t, first.at, changeover.Unix(), "the relay took too long to hear of the new secret")
	var letters int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_dead_letters`).Scan(&letters))
	require.Zero(t, letters)
}

// TestKeyRotatesUnderLoad: two relays, one of which always leads, go from plain secrets to a key, and from that to the next one, each restarted for each step.
// Every request verifies.
func TestKeyRotatesUnderLoad(t *testing.T) {
	t.Parallel()
	tenants := []string{"acme", `Tenant "two"`}
	older, newer := "2025=file:"+fileOf(t, "2025", seal.NewKey()), "2026=file:"+fileOf(t, "2026", seal.NewKey())
	s := newSite(t, "queue:\n  poll: 100ms\n  lease: 5s\nbreaker:\n  failures: 1000\n  failure_ratio: 0\n", func(_ outbox.UUID, attempt string) int {
		if attempt == "1" && time.Now().UnixNano()%20 == 0 { // some go through the retry queue
			return http.StatusServiceUnavailable
		}
		return http.StatusOK
	}, tenants...)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	const each = 5
	for _, tenant := range tenants {
		for range each {
			s.subscribe(t, tenant, s.endpoint(t, tenant, 10), "order.created", "{}")
		}
	}
	plain, err := os.ReadFile(s.config)
	require.NoError(t, err)
	configure := func(strict bool, keys ...string) {
		list, err := json.Marshal(keys)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(s.config, fmt.Appendf(slices.Clip(plain), "secrets:\n  keys: %s\n  require_sealed: %t\n", list, strict), 0o600))
	}
	relays := []*relayProcess{startRelay(t, s.config), startRelay(t, s.config)}
	s.leading(ctx, t)
	end := s.keepUp(t, tenants...)
	more := func(what string) {
		t.Helper()
		n := s.receiver.count() + 300
		s.receiver.await(ctx, t, what, func() bool { return s.receiver.count() >= n })
	}
	restart := func(step string) {
		t.Helper()
		for i, p := range relays {
			_, exit := p.stop(t)
			require.NoError(t, exit, step)
			relays[i] = startRelay(t, s.config)
			more(step)
		}
	}
	stored := func(prefix string) {
		t.Helper()
		for _, tenant := range tenants {
			var n int
			require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM `+pgx.Identifier{tenant, "webhook_endpoints"}.Sanitize()+` WHERE starts_with(secret_token, $1)`, prefix).Scan(&n))
			require.Equal(t, each, n, prefix)
		}
	}
	sealed := func(want string) {
		t.Helper()
		out, said, code := s.desk(t, "secrets", "seal")
		require.Zero(t, code, said)
		require.Contains(t, out, want)
		more(want)
	}
	more("plain secrets")
	configure(false, older)
	restart("the first key")
	out, _, code := s.desk(t, "secrets", "seal", "--dry-run", "-t", "acme")
	require.Zero(t, code)
	require.Regexp(t, `acme +5 +0 +0 `, out)
	stored("whsec_")
	sealed("10 secrets are sealed with the key 2025")
	stored(seal.Prefix("2025"))
	configure(true, older, newer)
	restart("the second key is known, plain secrets are not allowed any more")
	configure(true, newer, older)
	restart("the second key seals")
	stored(seal.Prefix("2025"))
	sealed("10 secrets are sealed with the key 2026")
	stored(seal.Prefix("2026"))
	configure(true, newer)
	restart("the first key is gone")

	n := end()
	s.receiver.await(ctx, t, "all of it", func() bool { return s.receiver.pairs() == n*each })
	for _, p := range relays {
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}
	require.Empty(t, s.receiver.bad)
	for _, p := range relays {
		require.NotContains(t, p.said(t), "cannot be used")
	}
	t.Logf("%d events, %d requests", n, s.receiver.count())
}

// A relay that lacks a key leaves that endpoint alone, says why, and goes on with all others; with the key it serves it again.
func TestMissingKeyIsOfOneEndpoint(t *testing.T) {
	t.Parallel()
	one, two := "one=file:"+fileOf(t, "one", seal.NewKey()), "two=file:"+fileOf(t, "two", seal.NewKey())
	s := newSite(t, "", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	plain, err := os.ReadFile(s.config)
	require.NoError(t, err)
	configure := func(keys string) {
		require.NoError(t, os.WriteFile(s.config, fmt.Appendf(slices.Clip(plain), "secrets:\n  keys: [%s]\n", keys), 0o600))
	}
	lost, other, moved := s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 3)
	for _, id := range []outbox.UUID{lost, other, moved} {
		s.subscribe(t, "acme", id, "order.created", "{}")
	}
	configure(one)
	s.command(t, "secrets", "seal")
	s.exec(t, `UPDATE acme.webhook_endpoints SET secret_token = (SELECT o.secret_token FROM acme.webhook_endpoints o WHERE o.id = $2) WHERE id = $1`, moved, lost)
	s.exec(t, `UPDATE acme.webhook_endpoints SET secret_token = 'whsec_' || encode(convert_to('secret of ' || id::text, 'UTF8'), 'base64') WHERE id = $1`, other)
	configure(two)
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "the endpoint with a plain secret", func() bool { return s.arrivedAt(other) == 1 })
	require.Contains(t, p.said(t), "is sealed with the key one, which is not among secrets.keys: add it")
	out, _, _ := s.desk(t, "check")
	require.Contains(t, out, "webhook_endpoints "+lost.String()+": secret_token (hidden): is sealed with the key one, which is not among secrets.keys: add it")
	out, _, code := s.desk(t, "secrets", "seal")
	require.Equal(t, exitFailure, code)
	require.Contains(t, out, "not sealed: tenant acme, endpoint "+lost.String()+": secret_token is sealed with the key one")
	_, exit := p.stop(t)
	require.NoError(t, exit)

	configure(two + ", " + one)
	p = startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "the endpoint whose key is back", func() bool { return s.arrivedAt(lost) == 1 && s.arrivedAt(other) == 2 })
	require.Zero(t, s.arrivedAt(moved), "a secret that was copied from another endpoint does not open")
	require.Contains(t, p.said(t), "is sealed with the key one and cannot be opened")
	s.command(t, "endpoints", "rotate-secret", moved.String(), "--expires", "0s")
	require.Empty(t, s.receiver.bad)
}

func TestRotateSecretCommandLine(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK), "acme")
	id := s.endpoint(t, "acme", 3).String()
	stored := func() (primary string) {
		require.NoError(t, s.pool.QueryRow(t.Context(), `SELECT secret_token FROM acme.webhook_endpoints`).Scan(&primary))
		return primary
	}
	out, said, code := s.desk(t, "endpoints", "rotate-secret", id)
	require.Zero(t, code, said)
	require.Contains(t, out, stored())
	require.Regexp(t, `(?m)^Old secret +signs as well until \S+Z \(in (1d0h|23h59m)\)$`, out)
	require.Contains(t, out, "as it is: secrets.keys has no key to seal it with")
	_, said, code = s.desk(t, "endpoints", "rotate-secret", id)
	require.Equal(t, exitFailure, code)
	require.Contains(t, said, "--yes")

	out, said, code = s.desk(t, "endpoints", "rotate-secret", id, "--yes", "--asymmetric", "--expires", "7d")
	require.Zero(t, code, said)
	require.Contains(t, out, "whpk_")
	require.NotContains(t, out, "whsk_", "nobody but the relay needs it")
	require.True(t, strings.HasPrefix(stored(), "whsk_"))

	token := "whsec_" + base64.StdEncoding.EncodeToString([]byte("from the vault, and secret"))
	cmd, stdout, stderr := s.prepare(t.Context(), t, "endpoints", "rotate-secret", id, "--yes", "--secret-file", "-", "--expires", "0s")
	cmd.Stdin = strings.NewReader(token + "\n")
	require.NoError(t, cmd.Run(), stderr)
	require.Equal(t, token, stored())
	require.NotContains(t, stdout.String(), token, "who brings it knows it")
	require.Regexp(t, `Old secret +signs no more`, stdout.String())

	for args, want := range map[string]string{
		"--asymmetric --secret-file x":                   "say one of the two",
		"--expires soon":                                 "write a number and a unit, such as 90m, 24h or 7d",
		"--expires -1h":                                  "write a number and a unit",
		"--secret-file " + fileOf(t, "empty", "\n"):      "the secret in --secret-file must not be empty",
		"--secret-file " + fileOf(t, "public", "whpk_x"): "is a public key",
	} {
		_, said, code := s.desk(t, append([]string{"endpoints", "rotate-secret", id}, strings.Fields(args)...)...)
		assert.Equal(t, exitUsage, code, args)
		assert.Contains(t, said, want, args)
	}
	require.Equal(t, token, stored())
	_, said, code = s.desk(t, "secrets", "seal")
	require.Equal(t, exitFailure, code)
	require.Contains(t, said, "hint: make one with outbox-relay secrets new-key")
	o := invoke(t, nil, "secrets", "new-key")
	require.Equal(t, exitOK, o.code)
	_, err := seal.ParseKey("k", o.out)
	require.NoError(t, err)
}

// TestSealIsInterruptedWhileItCounts: nothing has been sealed, and it does not say that all is well.
func TestSealIsInterruptedWhileItCounts(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.exec(t, "CREATE SCHEMA acme; CREATE SCHEMA globex")
	d.succeed(t, "migrate")
	d.succeed(t, "tenants", "add", "acme")
	d.succeed(t, "tenants", "add", "globex")
	file := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(file, []byte(seal.NewKey()), 0o600))
	cfg, err := pgx.ParseConfig(d.url)
	require.NoError(t, err)
	ctx, interrupt := context.WithCancel(t.Context())
	cfg.Tracer = &afterQuery{text: "count(*) FILTER", then: interrupt}
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	require.NoError(t, err)
	defer conn.Close(t.Context()) //nolint:errcheck // nothing is lost with it
	c := defaultConfig()
	c.Secrets.Keys = []string{"2026=file:" + file}
	a := app{out: io.Discard, err: io.Discard}
	assert.ErrorIs(t, a.seal(ctx, &inquiry{output: "table"}, conn, &c, false), context.Canceled)
}

// afterQuery calls then once a batch has ended in which a query contains text.
type afterQuery struct {
	text string
	then func()
	seen bool
}

func (a *afterQuery) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (a *afterQuery) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (a *afterQuery) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return ctx
}

func (a *afterQuery) TraceBatchQuery(_ context.Context, _ *pgx.Conn, q pgx.TraceBatchQueryData) {
	a.seen = a.seen || strings.Contains(q.SQL, a.text)
}

func (a *afterQuery) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {
	if a.seen {
		a.then()
	}
}
