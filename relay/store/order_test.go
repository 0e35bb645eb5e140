package store_test

import (
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// backlog records n deliveries of one key as the stream defers them: the first is due, the others wait behind it.
func (b *bundle) backlog(endpoint, key outbox.UUID, n int) []*store.Delivery {
	b.t.Helper()
	return b.backlogOf("a", endpoint, key, n)
}

func (b *bundle) backlogOf(tenant string, endpoint, key outbox.UUID, n int) []*store.Delivery {
	b.t.Helper()
	list := make([]*store.Delivery, n)
	outcomes := make([]store.Outcome, n)
	for i := range list {
		list[i] = deliver(tenant, endpoint)
		list[i].Order = store.Place{Key: key, LSN: pglogrepl.LSN(1000 + i/2), N: int32(i % 2)}
		outcomes[i] = deferred(list[i], 0)
		outcomes[i].Park = i > 0
	}
	rand.Shuffle(n, func(i, j int) { outcomes[i], outcomes[j] = outcomes[j], outcomes[i] })
	b.record(outcomes...)
	return list
}

func (b *bundle) claimRun(owner outbox.UUID, run int) (ids []outbox.UUID) {
	b.t.Helper()
	claimed, _, err := b.store.Claim(b.t.Context(), owner, store.ClaimOptions{N: 10, Run: run, Lease: time.Hour})
	require.NoError(b.t, err)
	for i := range claimed {
		ids = append(ids, claimed[i].ID)
	}
	return ids
}

// TestClaimRun has the head of a key bring those behind it along, up to what somebody else holds, and nobody else get any of the key.
func TestClaimRun(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	other, e := outbox.NewUUID(), b.endpoint("a")
	list := b.backlog(e, outbox.NewUUID(), 6)
	ids := make([]outbox.UUID, len(list))
	for i, d := range list {
		ids[i], d.Queued = d.ID, true
	}
	require.Equal(t, ids[:3], b.claimRun(b.owner, 3))
	require.Empty(t, b.claimRun(other, 3), "their head is somebody's")
	b.exec(`UPDATE outbox_relay.retry_queue SET due_at = now() WHERE delivery_id = $1`, ids[4])
	require.Empty(t, b.claimRun(other, 3), "due by mistake, but no head")

	b.record(succeeded(list[0]), failed(list[1], store.Retrying), func() store.Outcome {
		o := deferred(list[2], 0)
		o.Park = true
		return o
	}())
	require.Empty(t, b.claimRun(other, 3), "the head is not due for an hour")
	b.exec(`UPDATE outbox_relay.retry_queue SET due_at = now() WHERE delivery_id = $1`, ids[1])
	b.exec(`UPDATE outbox_relay.retry_queue SET due_at = now() + interval '1 hour', leased_by = $2 WHERE delivery_id = $1`, ids[3], other)
	require.Equal(t, ids[1:3], b.claimRun(b.owner, 6), "what another holds ends the run")
	b.exec(`UPDATE outbox_relay.retry_queue SET due_at = now() - interval '1 second' WHERE delivery_id = $1`, ids[3])
	b.record(succeeded(list[1]), failed(list[2], store.Failed))
	b.exec(`UPDATE outbox_relay.tenants SET backfill = 'missed', backfill_place = '0/3E9'`)
	require.Equal(t, ids[3:4], b.claimRun(b.owner, 6), "a dead letter lets those behind it go on, but what the tenant has missed comes in front of the others")
	b.exec(`UPDATE outbox_relay.tenants SET backfill_done_at = now()`)
	b.record(succeeded(list[3]))
	require.Equal(t, ids[4:], b.claimRun(b.owner, 6))
}

// TestTenantsShareNoOrder: a tenant that was made as a copy of another has endpoints and aggregates of the same ids. Neither waits for the other, nor is it
// kept out by what the other's receiver can take.
func TestTenantsShareNoOrder(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	e, key, other := b.endpoint("a"), outbox.NewUUID(), outbox.NewUUID()
	b.exec("INSERT INTO b.webhook_endpoints SELECT * FROM a.webhook_endpoints")
	before, after := b.backlogOf("a", e, key, 4), b.backlogOf("b", e, key, 4)
	claim := func(o store.ClaimOptions) (ids []outbox.UUID) {
		o.Run, o.Lease = 2, time.Hour
		claimed, _, err := b.store.Claim(t.Context(), other, o)
		require.NoError(t, err)
		for i := range claimed {
			ids = append(ids, claimed[i].ID)
		}
		return ids
	}
	require.Equal(t, []outbox.UUID{after[0].ID, after[1].ID}, claim(store.ClaimOptions{N: 10, Caps: map[store.Endpoint]int{{Tenant: "a", ID: e}: 0}}))
	require.Equal(t, []outbox.UUID{before[0].ID, before[1].ID}, claim(store.ClaimOptions{N: 10}))

	for _, d := range [][]*store.Delivery{after, before} {
		d[0].Queued, d[1].Queued = true, true
		b.record(succeeded(d[0]), succeeded(d[1]))
		require.Equal(t, []outbox.UUID{d[2].ID, d[3].ID}, claim(store.ClaimOptions{N: 10}), "while the other's are in flight, or gone")
	}
	tx, err := b.admin.Begin(t.Context()) // somebody who controls the other one keeps its order locked
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "SELECT outbox_relay.lock_order('a', ARRAY[$1::uuid])", e)
	require.NoError(t, err)
	for _, d := range after[2:] {
		d.Queued = true
		b.record(succeeded(d))
	}
	require.NoError(t, tx.Rollback(t.Context()))
	still, err := b.store.StillBlocked(t.Context(), []store.OrderedKey{{Tenant: "a", Endpoint: e, Key: key}, {Tenant: "b", Endpoint: e, Key: key}})
	require.NoError(t, err)
	require.Equal(t, []bool{true, false}, still)
}

// TestBlocked: an endpoint's keys are told apart up to a number of them, whatever the number of their rows, and it is no more than a name beyond.
func TestBlocked(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	few, many, other := b.endpoint("a"), b.endpoint("a"), b.endpoint("b")
	keys := make([]outbox.UUID, 3)
	var all []store.OrderedKey
	for i := range keys {
		keys[i] = outbox.NewUUID()
		b.backlog(many, keys[i], 5)
		all = append(all, store.OrderedKey{Tenant: "a", Endpoint: many, Key: keys[i]})
	}
	b.backlog(few, keys[0], 2)
	b.record(deferred(deliver("a", few), 0)) // without an order
	b.backlogOf("b", other, keys[0], 1)
	of := store.OrderedKey{Tenant: "a", Endpoint: few, Key: keys[0]}

	endpoints, err := b.store.OrderedEndpoints(t.Context(), []string{"a", "c"})
	require.NoError(t, err)
	require.ElementsMatch(t, []store.Endpoint{{Tenant: "a", ID: few}, {Tenant: "a", ID: many}}, endpoints)
	for most, want := range map[int][]store.OrderedKey{3: append(all, of), 2: {of}, 0: nil} {
		got, more, err := b.store.Blocked(t.Context(), append(endpoints, store.Endpoint{Tenant: "c", ID: few}), most)
		require.NoError(t, err)
		require.ElementsMatch(t, want, got, "%d at most", most)
		switch most {
		case 3:
			require.Empty(t, more)
		case 2:
			require.Equal(t, []store.Endpoint{{Tenant: "a", ID: many}}, more)
		default:
			require.ElementsMatch(t, endpoints, more)
		}
	}
	none := of
	none.Key = outbox.NewUUID()
	for _, test := range []struct {
		tenants string // what is written of them
		want    []bool
	}{
		{"state = state", []bool{true, false}},
		{"backfill = 'missed' WHERE schema = 'b'", []bool{true, false}},
		{"backfill = 'missed'", []bool{true, true}},
		{"backfill_done_at = now()", []bool{true, false}},
	} {
		b.exec("UPDATE outbox_relay.tenants SET " + test.tenants)
		still, err := b.store.StillBlocked(t.Context(), []store.OrderedKey{of, none})
		require.NoError(t, err)
		require.Equal(t, test.want, still, test.tenants)
	}
}

// TestANewHeadWaitsForOneInFlight: what an audit or a recovery queues before a delivery that another replica is sending is not sent at the same time, and is due
// when that one has ended, however.
func TestANewHeadWaitsForOneInFlight(t *testing.T) {
	t.Parallel()
	for name, outcome := range map[string]func(*store.Delivery) store.Outcome{
		"succeeds": succeeded,
		"fails":    func(d *store.Delivery) store.Outcome { return failed(d, store.Retrying) },
		"put back": func(d *store.Delivery) store.Outcome { return deferred(d, time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, "a")
			e, key, other := b.endpoint("a"), outbox.NewUUID(), outbox.NewUUID()
			p, err := b.store.Lead(t.Context(), store.LeadOptions{})
			require.NoError(t, err)
			inFlight := b.backlog(e, key, 1)[0]
			require.Equal(t, []outbox.UUID{inFlight.ID}, b.claimRun(b.owner, 5))
			earlier := deliver("a", e)
			earlier.Order = store.Place{Key: key}
			require.NoError(t, b.store.Queue(t.Context(), p.Epoch, []store.Outcome{deferred(earlier, 0)}))
			require.Empty(t, b.claimRun(other, 5))
			require.Equal(t, 1, b.count("outbox_relay.retry_queue WHERE delivery_id = $1 AND due_at < now() + interval '2 h'", inFlight.ID), "its lease runs out as before")

			inFlight.Queued = true
			b.record(outcome(inFlight))
			require.Equal(t, []outbox.UUID{earlier.ID}, b.claimRun(other, 1))
		})
	}
}

// TestNothingOvertakesWhatASuspensionLost: once a tenant is suspended, what the stream has of an order becomes no row, for something before it may be lost; it comes
// again with the rest when the tenant is resumed.
func TestNothingOvertakesWhatASuspensionLost(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e, key := b.endpoint("a"), outbox.NewUUID()
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	at := func(lsn pglogrepl.LSN, key outbox.UUID) *store.Delivery {
		d := deliver("a", e)
		d.Order = store.Place{Key: key, LSN: lsn, N: min(int32(lsn), 1)} // an audit's has none
		return d
	}
	rows := func() int { return b.count("a.webhook_deliveries") }
	blocked := func() bool {
		still, err := b.store.StillBlocked(t.Context(), []store.OrderedKey{{Tenant: "a", Endpoint: e, Key: key}})
		require.NoError(t, err)
		return still[0]
	}
	require.False(t, blocked())
	require.NoError(t, b.store.Suspend(t.Context(), p.Epoch, "a", "lost"))
	require.True(t, blocked(), "it may have rows when the tenant is resumed")
	b.record(deferred(at(100, key), 0), failed(at(100, key), store.Retrying))
	require.Zero(t, rows())
	b.record(store.Outcome{Delivery: at(100, key), Status: store.Leased, Due: time.Hour})
	require.Equal(t, 1, rows(), "what is in flight has a row")
	b.exec("DELETE FROM a.webhook_deliveries")
	b.record(failed(at(100, key), store.Failed), succeeded(at(101, key)), deferred(at(100, outbox.UUID{}), 0), deferred(at(0, key), 0))
	require.Equal(t, 4, rows(), "what has ended, what has no order, and what an audit found is kept")

	state, err := b.store.Unsuspend(t.Context(), "a")
	require.NoError(t, err)
	require.Equal(t, store.StateActive, state)
	place := get[pglogrepl.LSN](b, "SELECT backfill_place FROM outbox_relay.tenants WHERE schema = 'a'")
	b.record(deferred(at(place-1, key), 0))
	require.Equal(t, 4, rows(), "what it missed is still being queued")
	b.record(deferred(at(place, key), 0), deferred(at(place+1, key), 0))
	require.Equal(t, 6, rows())
	b.exec("UPDATE outbox_relay.tenants SET moved_from = 'other', moved_lsn = '0/1'")
	b.record(deferred(at(place-1, key), 0))
	require.Equal(t, 7, rows(), "the slot that it was moved from brings what is before its place")
	b.exec("UPDATE outbox_relay.tenants SET moved_from = NULL, moved_lsn = NULL")
	b.exec("UPDATE outbox_relay.tenants SET backfill_done_at = now()")
	b.record(deferred(at(place-1, key), 0))
	require.Equal(t, 8, rows())

	// What was being queued when it was suspended comes first, at a place of its own, and is not what was lost.
	b.exec("SELECT outbox_relay.add_tenant('a', since => now() - interval '1 day')")
	require.NoError(t, b.store.Suspend(t.Context(), p.Epoch, "a", "lost"))
	_, err = b.store.Unsuspend(t.Context(), "a")
	require.NoError(t, err)
	place = get[pglogrepl.LSN](b, "SELECT backfill_place FROM outbox_relay.tenants WHERE schema = 'a' AND coalesce(backfill_border_place, '0/0') < backfill_place - 1")
	b.record(deferred(at(place-1, key), 0))
	require.Equal(t, 8, rows())
	early := at(place-1, key)
	early.Order.N = 0
	b.record(deferred(early, 0), deferred(at(place, key), 0))
	require.Equal(t, 10, rows())
}

// TestOrderAmongReplicas has several replicas work one queue with failures, deferrals and skipped heads. Whoever claims a run of a key has the
// key to itself until the run has ended, and deliveries of a key end in their order.
func TestOrderAmongReplicas(t *testing.T) {
	t.Parallel()
	const keys, each, replicas = 6, 40, 4
	b := setup(t, "a")
	place := make(map[outbox.UUID]store.Place)
	for range keys {
		for _, d := range b.backlog(b.endpoint("a"), outbox.NewUUID(), each) {
			place[d.ID] = d.Order
		}
	}
	var (
		group  sync.WaitGroup
		mu     sync.Mutex
		holder = make(map[outbox.UUID]outbox.UUID) // of a key
		ended  = make(map[outbox.UUID]store.Place) // the last one of a key
		n      int
	)
	end := func(d outbox.UUID) { // mu is held
		at := place[d]
		last := ended[at.Key]
		assert.True(t, at.LSN > last.LSN || at.LSN == last.LSN && at.N > last.N, "%v after %v", at, last)
		ended[at.Key] = at
		n++
	}
	for range replicas {
		owner, db := outbox.NewUUID(), b.open()
		group.Go(func() {
			for !t.Failed() {
				claimed, _, err := db.Claim(t.Context(), owner, store.ClaimOptions{N: 3, Run: 5, Lease: time.Hour})
				if !assert.NoError(t, err) {
					return
				}
				mu.Lock()
				over := n == keys*each
				for i := range claimed {
					by, held := holder[claimed[i].Order.Key]
					assert.True(t, !held || by == owner, "two replicas have the same key")
					holder[claimed[i].Order.Key] = owner
				}
				mu.Unlock()
				if over {
					return
				}
				for key, run := range runs(claimed) {
					outcomes := attemptRun(run)
					mu.Lock() // what ends, ends before anybody else can see that it has
					for i := range outcomes {
						if outcomes[i].Status == store.Success || outcomes[i].Status == store.Failed {
							end(outcomes[i].Delivery.ID)
						}
					}
					delete(holder, key)
					mu.Unlock()
					broken, err := db.Record(t.Context(), owner, nil, outcomes)
					if !assert.NoError(t, err) || !assert.Empty(t, broken) {
						return
					}
				}
			}
		})
	}
	group.Go(func() { // an operator skips heads that wait
		for !t.Failed() {
			mu.Lock()
			over := n == keys*each
			if !over {
				var id *outbox.UUID
				assert.NoError(t, b.admin.QueryRow(t.Context(), `SELECT (SELECT q.delivery_id FROM outbox_relay.retry_queue q WHERE leased_by IS NULL AND NOT EXISTS
					(SELECT FROM outbox_relay.retry_queue h WHERE (h.endpoint_id, h.order_key) = (q.endpoint_id, q.order_key)
						AND (h.order_lsn, h.order_n) < (q.order_lsn, q.order_n)) ORDER BY random() LIMIT 1)`).Scan(&id))
				skipped := false
				if id != nil {
					err := b.admin.QueryRow(t.Context(), `SELECT outbox_relay.skip('a', $1)`, *id).Scan(&skipped)
					if inFlight := (*pgconn.PgError)(nil); !errors.As(err, &inFlight) || inFlight.Code != "OR002" { // claimed meanwhile
						assert.NoError(t, err)
					}
				}
				if skipped {
					end(*id)
				}
			}
			mu.Unlock()
			if over {
				return
			}
			<-time.After(10 * time.Millisecond)
		}
	})
	group.Wait()
	require.Equal(t, keys*each, n)
	require.Zero(t, b.count("outbox_relay.retry_queue"))
}

// runs sorts what was claimed by keys.
func runs(claimed []store.Claimed) map[outbox.UUID][]store.Claimed {
	by := make(map[outbox.UUID][]store.Claimed)
	for _, c := range claimed {
		by[c.Order.Key] = append(by[c.Order.Key], c)
	}
	return by
}

// attemptRun makes up outcomes of a run: some succeed, one may fail or be given up, and what is behind a failure is parked.
func attemptRun(run []store.Claimed) []store.Outcome {
	var outcomes []store.Outcome
	for i := range run {
		d := &run[i].Delivery
		switch n := rand.IntN(10); {
		case len(outcomes) < i || n == 0:
		case n == 1:
			outcomes = append(outcomes, failed(d, store.Failed))
			continue
		case n == 2:
			o := failed(d, store.Retrying)
			o.Due = 0
			outcomes = append(outcomes, o)
		default:
			outcomes = append(outcomes, succeeded(d))
			continue
		}
		first := len(outcomes)
		for k := first; k < len(run); k++ {
			o := deferred(&run[k].Delivery, 0)
			o.Park = k > i
			outcomes = append(outcomes, o)
		}
		break
	}
	return outcomes
}

// TestClaimReadsLittle looks at the plan of a claim from a queue of 200,000 rows, of which nearly all wait: it must not read them all.
func TestClaimReadsLittle(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
		SELECT gen_random_uuid(), 'a', $1, CASE WHEN i % 1000 = 0 THEN now() WHEN i % 2 = 0 THEN now() + interval '1 hour' ELSE 'infinity' END,
			CASE WHEN i % 2 = 1 THEN $1::uuid END, CASE WHEN i % 2 = 1 THEN '0/1'::pg_lsn END, CASE WHEN i % 2 = 1 THEN i END
		FROM generate_series(1, 200000) i`, e)
	b.exec("ANALYZE outbox_relay.retry_queue")
	assert.Less(t, b.readByClaim(), 5000)
}

// readByClaim has one batch claimed, of deliveries that are gone and so leave the queue at once, and counts the rows of the queue that were read for it.
func (b *bundle) readByClaim() int {
	b.t.Helper()
	queued := b.count("outbox_relay.retry_queue")
	n := b.readBy(func(db *store.Store) {
		_, _, err := db.Claim(b.t.Context(), b.owner, store.ClaimOptions{N: 100, Run: 10, Lease: time.Hour})
		require.NoError(b.t, err)
	})
	require.Equal(b.t, queued-100, b.count("outbox_relay.retry_queue"), "a whole batch was claimed")
	return n
}

// readBy counts the rows of the queue that are read for something, on one connection. There must be some.
func (b *bundle) readBy(do func(*store.Store)) int {
	b.t.Helper()
	read := func() int {
		return get[int](b, `SELECT coalesce(sum(seq_tup_read + idx_tup_fetch), 0)::int FROM pg_stat_all_tables WHERE schemaname = 'outbox_relay' AND relname = 'retry_queue'`)
	}
	b.forget(read)
	db, err := store.New(b.t.Context(), store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(b.t, err)
	do(db)
	db.Close() // its statistics are complete when its connection has ended
	require.Eventually(b.t, func() bool { return read() > 0 }, time.Minute, 10*time.Millisecond)
	return read()
}

// forget has the server forget what was done to the tables till now, of which count reads some figure.
func (b *bundle) forget(count func() int) {
	b.t.Helper()
	b.admin.Reset() // a connection tells what it did once in a while, the rest only when it ends
	require.Eventually(b.t, func() bool {
		return b.count("pg_stat_activity WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()") == 0
	}, time.Minute, 10*time.Millisecond)
	b.exec("SELECT pg_stat_reset()")
	require.Eventually(b.t, func() bool { return count() == 0 }, time.Minute, 10*time.Millisecond)
}

// TestClaimReadsLittleOfALateOutage: the server counted the queue when nothing was due, as before an outage, and would look for each row among all that is due by
// now.
func TestClaimReadsLittleOfALateOutage(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec("ALTER TABLE outbox_relay.retry_queue SET (autovacuum_enabled = false)")
	rows := func(at string, n int) {
		b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at)
			SELECT gen_random_uuid(), 'a', $1, now() + `+at+` FROM generate_series(1, $2) i`, e, n)
	}
	rows("(1 + random()) * interval '6 hours'", 100_000)
	b.exec("ANALYZE outbox_relay.retry_queue")
	rows("interval '0 s'", 30_000)
	assert.Less(t, b.readByClaim(), 5000)
}

// TestOrderReadsLittleOfALateOutage: the server counted the queue when each endpoint had one row, and none perhaps a key, as before an outage of one that keeps an
// order. It would take the rows of an endpoint for as few as those of a key.
func TestOrderReadsLittleOfALateOutage(t *testing.T) {
	t.Parallel()
	for counted, key := range map[string]string{"one row of each": "gen_random_uuid()", "none with a key": "NULL"} {
		b := setup(t, "a")
		e := b.endpoint("a")
		b.exec("ALTER TABLE outbox_relay.retry_queue SET (autovacuum_enabled = false)")
		b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
			SELECT gen_random_uuid(), 'a', gen_random_uuid(), now() + interval '1 hour', ` + key + `, '0/1', i FROM generate_series(1, 1000) i`)
		b.exec("ANALYZE outbox_relay.retry_queue")
		b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
			SELECT gen_random_uuid(), 'a', $1, CASE WHEN i < 500 THEN now() ELSE 'infinity' END, md5((i % 500)::text)::uuid, '0/1', i FROM generate_series(0, 49999) i`, e)
		keys := make([]store.OrderedKey, 20) // one is there
		list := make([]*store.Delivery, 20)
		deferrals, successes := make([]store.Outcome, len(list)), make([]store.Outcome, len(list))
		for i := range list {
			keys[i] = store.OrderedKey{Tenant: "a", Endpoint: e, Key: outbox.NewUUID()}
			list[i] = deliver("a", e)
			list[i].Order = store.Place{Key: get[outbox.UUID](b, "SELECT md5($1::int4::text)::uuid", i), LSN: 2}
			deferrals[i], successes[i] = deferred(list[i], 0), succeeded(list[i])
		}
		keys[0].Key = list[0].Order.Key
		record := func(outcomes []store.Outcome) func(*store.Store) {
			return func(db *store.Store) {
				broken, err := db.Record(t.Context(), b.owner, nil, outcomes)
				require.NoError(t, err)
				require.Empty(t, broken)
				for i := range list {
					list[i].Queued = true
				}
			}
		}
		for _, step := range []struct {
			name string
			do   func(*store.Store)
		}{
			{"StillBlocked", func(db *store.Store) {
				still, err := db.StillBlocked(t.Context(), keys)
				require.NoError(t, err)
				require.Equal(t, append([]bool{true}, make([]bool, len(keys)-1)...), still)
			}},
			{"Blocked", func(db *store.Store) {
				keys, _, err := db.Blocked(t.Context(), []store.Endpoint{{Tenant: "a", ID: e}}, 1000)
				require.NoError(t, err)
				require.Len(t, keys, 500)
			}},
			{"park", record(deferrals)},
			{"wake_next", record(successes)},
			{"enqueue", func(db *store.Store) {
				_, err := db.Recording().Exec(t.Context(), "SELECT outbox_relay.enqueue('a', gen_random_uuid(), $1, now(), k, '0/3', 0) FROM unnest($2::uuid[]) k",
					e, []outbox.UUID{list[0].Order.Key, list[1].Order.Key, outbox.NewUUID()})
				require.NoError(t, err)
			}},
			{"Claim", func(db *store.Store) {
				_, _, err := db.Claim(t.Context(), b.owner, store.ClaimOptions{N: 10, Run: 2, Lease: time.Hour})
				require.NoError(t, err)
			}},
		} {
			assert.Less(t, b.readBy(step.do), 5000, "%s, counted %s", step.name, counted)
		}
	}
}

// TestClaimPassesOverWhatWaits: where the longest due are of an endpoint that can take no more, others are looked through, but not those of which nothing is due.
// What is read of an index and not returned shows in its pages only.
func TestClaimPassesOverWhatWaits(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	full, waits, due := b.endpoint("a"), b.endpoint("a"), b.endpoint("a")
	b.exec("ALTER TABLE outbox_relay.retry_queue SET (autovacuum_enabled = false)")
	const rows = `INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT gen_random_uuid(), 'a', $1, now() + (1 + random()) * $2::interval FROM generate_series(1, $3) i`
	b.exec(rows, waits, "1 hour", 100_000)
	b.exec(rows, full, "-1 hour", 2000)
	b.exec(rows, due, "-1 minute", 100)
	b.exec("VACUUM ANALYZE outbox_relay.retry_queue")
	pages := func() int {
		return get[int](b, `SELECT coalesce(sum(idx_blks_read + idx_blks_hit), 0)::int FROM pg_statio_all_indexes WHERE indexrelname = 'retry_queue_lane_idx'`)
	}
	b.forget(pages)
	db, err := store.New(t.Context(), store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	claimed, _, err := db.Claim(t.Context(), b.owner, store.ClaimOptions{N: 10, Run: 1, Lease: time.Hour, Caps: map[store.Endpoint]int{{Tenant: "a", ID: full}: 0}})
	require.NoError(t, err)
	db.Close() // its statistics are complete when its connection has ended
	require.Eventually(t, func() bool { return pages() > 0 }, time.Minute, 10*time.Millisecond)
	assert.Empty(t, claimed, "there are no such deliveries")
	assert.Less(t, pages(), 200)
	assert.Equal(t, 90, b.count("outbox_relay.retry_queue WHERE endpoint_id = '"+due.String()+"'"), "ten were claimed, and so taken out")
}
