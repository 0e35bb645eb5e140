package store_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func (b *bundle) claim(owner outbox.UUID, n int, lease time.Duration, busy ...outbox.UUID) []store.Claimed {
	b.t.Helper()
	o := store.ClaimOptions{N: n, Lease: lease, Run: 100, Caps: make(map[store.Endpoint]int)}
	for _, id := range busy {
		o.Caps[store.Endpoint{Tenant: "a", ID: id}] = 0
	}
	claimed, _, err := b.store.Claim(b.t.Context(), owner, o)
	require.NoError(b.t, err)
	return claimed
}

func TestClaim(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	ea, eb := b.endpoint("a"), b.endpoint("b")
	b.exec(`UPDATE a.webhook_endpoints SET secondary_secret_token = 'old', secondary_secret_expires_at = 'infinity', custom_headers = '{"X-A": "1"}',
		max_retry_attempts = 0, rate_limit_per_second = 2.5, max_concurrency = 7, context_id = id`)
	assert.Empty(t, b.claim(b.owner, 10, time.Hour))

	first, second, later := deliver("a", ea), deliver("b", eb), deliver("a", ea)
	b.record(deferred(first, -2*time.Second), deferred(second, -time.Second), deferred(later, time.Hour))
	claimed := b.claim(b.owner, 1, time.Hour)
	require.Len(t, claimed, 1)
	want := *first
	want.Queued = true
	assert.Equal(t, want.Message, claimed[0].Message)
	want.Message, claimed[0].Message = nil, nil
	assert.Equal(t, want, claimed[0].Delivery)
	e := claimed[0].Endpoint
	assert.JSONEq(t, `{"X-A": "1"}`, string(e.CustomHeaders))
	e.CustomHeaders = nil
	assert.Equal(t, ea, e.ID)
	assert.Equal(t, ea, e.ContextID)
	assert.Equal(t, "https://example.com/hook", e.URL)
	assert.Equal(t, []string{"POST", "secret", "old", "X-Webhook-Signature", "standard", "none"},
		[]string{e.Method, e.SecretToken, e.SecondarySecret, e.SignatureHeader, e.PayloadFormat, e.Order})
	assert.Equal(t, []int32{30, 0, 5, 7}, []int32{e.TimeoutSeconds, e.MaxRetryAttempts, e.BackoffSeconds, e.MaxConcurrency})
	assert.Equal(t, []float64{2, 2.5}, []float64{e.BackoffMultiplier, e.RatePerSecond})
	assert.Equal(t, []bool{false, true, true, false}, []bool{e.FollowRedirects, e.VerifySSL, e.Active, e.Verified})
	assert.Equal(t, 9999, e.SecondarySecretExpires.Year())

	claimed = b.claim(b.owner, 10, time.Hour)
	require.Len(t, claimed, 1)
	assert.Equal(t, second.ID, claimed[0].ID)
	assert.Equal(t, 3, b.count("outbox_relay.retry_queue"))
}

func TestClaimLeases(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	other := outbox.NewUUID()
	d := deliver("a", e)
	b.record(deferred(d, 0))
	ids := []outbox.UUID{d.ID}

	require.Len(t, b.claim(b.owner, 1, 0), 1)
	require.Len(t, b.claim(other, 1, time.Hour), 1, "a lease that has run out")
	require.Empty(t, b.claim(b.owner, 1, time.Hour))
	renewed, err := b.store.Renew(t.Context(), b.owner, ids, -time.Second)
	require.NoError(t, err)
	require.Empty(t, renewed)
	require.Empty(t, b.claim(b.owner, 1, time.Hour), "does not renew what is another's")

	renewed, err = b.store.Renew(t.Context(), other, ids, 3*time.Hour)
	require.NoError(t, err)
	require.Equal(t, ids, renewed)
	assert.InDelta(t, 3*3600, get[int](b, "SELECT extract(epoch FROM due_at - now())::int FROM outbox_relay.retry_queue"), 60)
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "SELECT FROM outbox_relay.retry_queue FOR UPDATE")
	require.NoError(t, err)
	soon, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	renewed, err = b.store.Renew(soon, other, ids, 3*time.Hour)
	require.NoError(t, tx.Rollback(t.Context()))
	require.NoError(t, err)
	require.Empty(t, renewed, "what is being recorded is not waited for")
	_, err = b.store.Renew(t.Context(), other, ids, -time.Second)
	require.NoError(t, err)
	assert.Empty(t, b.claim(b.owner, 1, time.Hour, outbox.NewUUID(), e), "a busy endpoint")
	claimed := b.claim(b.owner, 1, time.Hour, outbox.NewUUID())
	require.Len(t, claimed, 1)
	b.record(succeeded(&claimed[0].Delivery))
	assert.Zero(t, get[int](b, "SELECT count(*)::int FROM outbox_relay.retry_queue"))
}

// Two replicas that claim at the same time share the queue out without waiting for each other.
func TestClaimSkipsLocked(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	outcomes := make([]store.Outcome, 500)
	for i := range outcomes {
		outcomes[i] = deferred(deliver("a", e), 0)
	}
	b.record(outcomes...)

	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }() // or the pool waits for it for ever
	_, err = tx.Exec(t.Context(), "SELECT FROM outbox_relay.retry_queue ORDER BY due_at, delivery_id LIMIT 100 FOR UPDATE")
	require.NoError(t, err)
	require.Len(t, b.claim(b.owner, 300, 0), 300)
	require.NoError(t, tx.Rollback(t.Context()))

	var (
		group sync.WaitGroup
		mu    sync.Mutex
		seen  = make(map[outbox.UUID]int)
	)
	for range 2 {
		owner := outbox.NewUUID()
		group.Go(func() {
			for empty := 0; empty < 3; {
				claimed, _, err := b.store.Claim(t.Context(), owner, store.ClaimOptions{N: 20, Lease: time.Hour})
				if !assert.NoError(t, err) {
					return
				}
				if len(claimed) == 0 {
					empty++
				}
				mu.Lock()
				for i := range claimed {
					seen[claimed[i].ID]++
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	assert.Len(t, seen, len(outcomes))
	for id, n := range seen {
		assert.Equal(t, 1, n, id)
	}
}

// TestClaimsInTurn: claims of one slot go one after the other, but none waits for ever for one that is stuck.
func TestClaimsInTurn(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.record(deferred(deliver("a", e), 0), deferred(deliver("a", e), 0), deferred(deliver("a", e), 0))
	stuck, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = stuck.Rollback(context.WithoutCancel(t.Context())) }()
	const lock = "SELECT pg_advisory_xact_lock(hashtextextended($1, 8245937120485516403))"
	_, err = stuck.Exec(t.Context(), lock, b.slot)
	require.NoError(t, err)
	claimed := make(chan int, 1)
	go func() { claimed <- len(b.claim(b.owner, 1, time.Hour)) }()
	for waiting := 0; waiting == 0 && !b.store.Crowded(); { // where the machine stands still, it has waited as long as it may before anybody looks
		require.NoError(t, b.admin.QueryRow(t.Context(), `SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
			WHERE d.datname = current_database() AND l.locktype = 'advisory' AND NOT l.granted`).Scan(&waiting))
		require.True(t, len(claimed) == 0 || b.store.Crowded(), "it did not wait for its turn")
	}
	heal, locked, err := b.store.LockHeal(t.Context())
	require.NoError(t, err)
	require.True(t, locked, "a heal waits for no claim")
	heal.Unlock(t.Context())
	require.NoError(t, stuck.Rollback(t.Context()))
	assert.Equal(t, 1, <-claimed)

	stuck, err = b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = stuck.Exec(t.Context(), lock, b.slot)
	require.NoError(t, err)
	assert.Len(t, b.claim(b.owner, 1, time.Hour), 1)
	assert.True(t, b.store.Crowded())
	const claims = 30
	began := time.Now()
	for i := range claims {
		assert.Len(t, b.claim(b.owner, 1, time.Hour), max(1-i, 0))
	}
	assert.Less(t, time.Since(began), claims*time.Second, "what is stuck is waited for once, a second")
}

// TestClaimBoundsBodies: what a claim reads is bounded whether bodies are kept or made of their events, with many tenants as well, and each gets its turn.
func TestClaimBoundsBodies(t *testing.T) {
	t.Parallel()
	const size, many = 100_000, 10
	b := setup(t, "a")
	a := b.endpoint("a")
	big := func(tenant string, endpoint outbox.UUID) store.Outcome {
		d := deliver(tenant, endpoint)
		d.Message.Body = []byte(`{"data":"` + strings.Repeat("x", size) + `"}`)
		return deferred(d, 0)
	}
	claim := func(bytes int64) (ids []outbox.UUID) {
		t.Helper()
		claimed, _, err := b.store.Claim(t.Context(), outbox.NewUUID(), store.ClaimOptions{N: 100, Lease: time.Hour, Bytes: bytes})
		require.NoError(t, err)
		for i := range claimed {
			ids = append(ids, claimed[i].ID)
		}
		return ids
	}
	for range many {
		b.record(big("a", a))
	}
	b.exec(`INSERT INTO a.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
		SELECT d.webhook_event_id, 'order.created', gen_random_uuid(), 'order', d.request_body::jsonb FROM a.webhook_deliveries d`)
	b.exec("UPDATE a.webhook_deliveries SET request_body = NULL")
	assert.Len(t, claim(3*size+size/2), 3, "bodies that are made of their events")
	assert.Len(t, claim(1), 1, "one is read in any case")

	b.exec("TRUNCATE outbox_relay.retry_queue, a.webhook_deliveries CASCADE")
	for i := range many {
		tenant := fmt.Sprintf("tenant_%d", i)
		b.addTenant(tenant)
		b.record(big(tenant, b.endpoint(tenant)))
	}
	seen := make(map[outbox.UUID]struct{})
	for len(seen) < many {
		ids := claim(3 * size)
		require.NotEmpty(t, ids)
		require.LessOrEqual(t, len(ids), 4)
		for _, id := range ids {
			seen[id] = struct{}{}
		}
	}
}

// TestStandingFollowsWhatHasChanged: endpoints are as they are now, and a delivery that is not to be attempted any more is left out.
func TestStandingFollowsWhatHasChanged(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	d := b.claimOne("a", b.endpoint("a"))
	other := b.claimOne("a", b.endpoint("a"))
	standing := func(owner outbox.UUID) map[outbox.UUID]delivery.EndpointRow {
		found, err := b.store.Standing(t.Context(), owner, "a", []outbox.UUID{d.ID, other.ID})
		require.NoError(t, err)
		return found
	}
	b.exec("UPDATE a.webhook_endpoints SET endpoint_url = 'https://example.com/moved' WHERE id = $1", d.EndpointID)
	found := standing(b.owner)
	require.Len(t, found, 2)
	assert.Equal(t, "https://example.com/moved", found[d.ID].URL)
	assert.Equal(t, "https://example.com/hook", found[other.ID].URL)
	assert.Empty(t, standing(outbox.NewUUID()), "somebody else's")
	b.exec("UPDATE outbox_relay.tenants SET state = 'paused'")
	assert.Empty(t, standing(b.owner), "the tenant takes no deliveries")
	b.exec("UPDATE outbox_relay.tenants SET state = 'active'")
	b.exec("DELETE FROM a.webhook_endpoints WHERE id = $1", d.EndpointID)
	found = standing(b.owner)
	assert.Len(t, found, 1)
	assert.Contains(t, found, other.ID)
	b.exec("DROP TABLE a.webhook_endpoints CASCADE")
	_, err := b.store.Standing(t.Context(), b.owner, "a", []outbox.UUID{d.ID})
	require.ErrorAs(t, err, new(*store.TenantError))
}

// TestClaimPastABacklog: the longest due are of endpoints that can take no more now, or few. What else is due is claimed all the same, and once there is
// nothing of it, nobody is told to look again.
func TestClaimPastABacklog(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	full, few, free, other := b.endpoint("a"), b.endpoint("a"), b.endpoint("a"), b.endpoint("b")
	var outcomes []store.Outcome
	add := func(tenant string, endpoint outbox.UUID, n int, ago time.Duration) {
		for range n {
			outcomes = append(outcomes, deferred(deliver(tenant, endpoint), -ago))
		}
	}
	const n = 10
	add("a", full, 5*n, time.Hour)
	add("a", few, 5*n, time.Minute)
	add("a", free, 3, time.Second)
	add("b", other, 3, time.Second)
	b.record(outcomes...)
	o := store.ClaimOptions{N: n, Lease: time.Hour, Caps: map[store.Endpoint]int{{Tenant: "a", ID: full}: 0, {Tenant: "a", ID: few}: 2}}
	claim := func() (map[outbox.UUID]int, bool) {
		claimed, more, err := b.store.Claim(t.Context(), b.owner, o)
		require.NoError(t, err)
		of := make(map[outbox.UUID]int)
		for i := range claimed {
			of[claimed[i].EndpointID]++
		}
		return of, more
	}
	of, more := claim()
	assert.Equal(t, map[outbox.UUID]int{few: 2, free: 3, other: 3}, of)
	assert.False(t, more)
	o.Tenants = []string{"b"}
	of, more = claim()
	assert.Empty(t, of)
	assert.False(t, more)
	for range 5 {
		b.record(deferred(deliver("b", b.endpoint("b")), 0))
	}
	o.N = 1
	of, _ = claim()
	assert.Len(t, of, 1, "more endpoints than a look has rows")
	o = store.ClaimOptions{N: n, Lease: time.Hour}
	of, more = claim()
	assert.Equal(t, map[outbox.UUID]int{full: n}, of, "the longest due, where nothing keeps them out")
	assert.True(t, more)
}

// What cannot be attempted leaves the queue, and nothing of it stops what can.
func TestClaimSortsOut(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "broken", "dropped", "paused", "removed", "tableless")
	var outcomes []store.Outcome
	var fine []outbox.UUID
	one := func(tenant string) *store.Delivery {
		d := deliver(tenant, b.endpoint(tenant))
		outcomes = append(outcomes, deferred(d, 0))
		return d
	}
	for range 3 {
		fine = append(fine, one("a").ID)
	}
	deleted, bodyless, done, unreadable := one("a"), one("a"), one("a"), one("a")
	broken, paused, removed, tableless := one("broken"), one("paused"), one("removed"), one("tableless")
	one("dropped")
	b.record(outcomes...)
	b.exec("DELETE FROM a.webhook_deliveries WHERE id = $1", deleted.ID)
	b.exec("UPDATE a.webhook_deliveries SET request_body = NULL WHERE id = $1", bodyless.ID)
	b.exec("UPDATE a.webhook_deliveries SET delivery_status = 'cancelled' WHERE id = $1", done.ID)
	b.exec(`UPDATE a.webhook_deliveries SET request_headers = '{"content-type": 5}' WHERE id = $1`, unreadable.ID)
	b.exec("REVOKE SELECT ON broken.webhook_endpoints FROM outbox_relay_runner")
	b.exec("DROP SCHEMA dropped CASCADE")
	b.exec("DROP TABLE tableless.webhook_endpoints CASCADE")
	b.exec("SELECT outbox_relay.pause_tenant('paused')")
	b.exec("DELETE FROM outbox_relay.tenants WHERE schema = 'removed'")

	var log bytes.Buffer
	s, err := store.New(t.Context(), store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	defer s.Close()
	claimed, _, err := s.Claim(t.Context(), b.owner, store.ClaimOptions{N: 100, Lease: time.Hour})
	require.NoError(t, err)
	var got []outbox.UUID
	for i := range claimed {
		got = append(got, claimed[i].ID)
	}
	assert.ElementsMatch(t, fine, got)

	assert.Equal(t, 6, b.count("outbox_relay.retry_queue"))
	assert.Equal(t, "-|infinity", b.row("leased_by, due_at", "outbox_relay.retry_queue WHERE delivery_id = $1", paused.ID), "until it is resumed")
	for _, d := range []*store.Delivery{broken, tableless} {
		assert.Equal(t, "-|true", b.row("leased_by, due_at BETWEEN now() + '50 s' AND now() + '1 min'", "outbox_relay.retry_queue WHERE delivery_id = $1", d.ID))
		assert.Equal(t, "pending", b.row("delivery_status", d.Tenant+".webhook_deliveries WHERE id = $1", d.ID))
	}
	for _, test := range []struct {
		d    *store.Delivery
		want string
	}{
		{bodyless, "cancelled|the request body and the event are gone|true|-"},
		{done, "cancelled|window|false|true"},
		{removed, "cancelled|the tenant is not registered any more|true|-"},
	} {
		assert.Equal(t, test.want, b.row("delivery_status, error_message, completed_at IS NOT NULL, next_retry_at IS NOT NULL OR NULL",
			test.d.Tenant+".webhook_deliveries WHERE id = $1", test.d.ID))
	}
	assert.Equal(t, "cancelled", b.row("delivery_status", "a.webhook_deliveries WHERE id = $1", unreadable.ID))
	assert.Contains(t, log.String(), "tenant=broken")
	assert.Contains(t, log.String(), `reason="the tenant's schema is gone"`)
	assert.NotContains(t, log.String(), "tenant=paused")
}

// TestClaimWithoutAnEndpoint: an endpoint that nobody sees may be of a transaction that the log has brought all the same. Its deliveries wait for the end of that; those of
// one that was deleted are cancelled.
func TestClaimWithoutAnEndpoint(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	claim := func() []store.Claimed {
		b.exec("UPDATE outbox_relay.retry_queue SET due_at = now()")
		claimed, _, err := b.store.Claim(t.Context(), b.owner, store.ClaimOptions{N: 100, Lease: time.Hour})
		require.NoError(t, err)
		return claimed
	}
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }() // or the pool could not be closed
	var e outbox.UUID
	require.NoError(t, tx.QueryRow(t.Context(), `INSERT INTO a.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id)
		VALUES ('e', 'https://example.com/hook', 'secret', gen_random_uuid()) RETURNING id`).Scan(&e))
	d := deliver("a", e)
	b.record(deferred(d, 0))
	assert.Empty(t, claim())
	assert.Equal(t, "-|true", b.row("leased_by, due_at BETWEEN now() + '50 s' AND now() + '1 min'", "outbox_relay.retry_queue"))
	assert.Equal(t, "pending", b.row("delivery_status", "a.webhook_deliveries"))
	require.NoError(t, tx.Commit(t.Context()))
	claimed := claim()
	require.Len(t, claimed, 1)
	b.record(succeeded(&claimed[0].Delivery))

	b.exec("DELETE FROM a.webhook_endpoints")
	late := deliver("a", e)
	b.record(deferred(late, 0))
	require.Eventually(t, func() bool { // transactions of others on this server may be older than the row
		assert.Empty(t, claim())
		return b.count("outbox_relay.retry_queue") == 0
	}, time.Minute, 50*time.Millisecond)
	assert.Equal(t, "cancelled|the endpoint is gone|true|-", b.row("delivery_status, error_message, completed_at IS NOT NULL, next_retry_at", "a.webhook_deliveries WHERE id = $1", late.ID))

	open, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	defer func() { _ = open.Rollback(context.WithoutCancel(t.Context())) }()
	_, err = open.Exec(t.Context(), "SELECT pg_current_xact_id()")
	require.NoError(t, err)
	b.record(deferred(deliver("a", e), 0))
	b.exec("UPDATE a.webhook_deliveries SET created_at = now() - interval '2 days' WHERE delivery_status = 'pending'")
	assert.Empty(t, claim())
	assert.Zero(t, b.count("outbox_relay.retry_queue"), "of one that waits for long no transaction makes another endpoint")
}

// TestLockHealIsKept: the server takes the lock from a relay that says nothing any more, and only from such a one.
func TestLockHealIsKept(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	lock, locked, err := b.store.LockHeal(t.Context())
	require.NoError(t, err)
	require.True(t, locked)
	defer lock.Unlock(t.Context())
	patience, err := lock.Patience(t.Context(), "")
	require.NoError(t, err)
	assert.Equal(t, "1min", patience)
	since := func() time.Time { // the server counts from here
		return get[time.Time](b, "SELECT state_change FROM pg_stat_activity WHERE pid = $1 AND state = 'idle in transaction'", lock.PID())
	}
	other := b.open()
	for range 3 {
		before := since()
		require.NoError(t, lock.Keep(t.Context()))
		require.True(t, since().After(before))
		_, locked, err = other.LockHeal(t.Context())
		require.NoError(t, err)
		require.False(t, locked)
	}
	_, err = lock.Patience(t.Context(), "100ms")
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		again, locked, err := other.LockHeal(t.Context())
		require.NoError(t, err)
		if locked {
			again.Unlock(t.Context())
		}
		return locked
	}, time.Minute, 50*time.Millisecond)
	require.Error(t, lock.Keep(t.Context()))
	making, err := b.store.Making(t.Context())
	require.NoError(t, err)
	assert.Nil(t, making, "nobody heals")
}

// TestLockHealLeavesAConnection: who heals looks at the database meanwhile, with the fewest connections there may be.
func TestLockHealLeavesAConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	db, err := store.New(t.Context(), store.Config{URL: b.url, Slot: b.slot, MaxConns: 2, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(db.Close)
	lock, locked, err := db.LockHeal(t.Context())
	require.NoError(t, err)
	require.True(t, locked)
	defer lock.Unlock(t.Context())
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err = db.Publications(ctx)
	require.NoError(t, err)
}
