package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// orderOracle is a receiver that knows what comes after what. It fails some requests, answers late, and is down at times.
type orderOracle struct {
	mu         sync.Mutex
	rnd        *rand.Rand
	place      map[string]int       // of each event, in the order of the commits
	aggregate  map[string]uuidIndex // and what it belongs to
	accepted   map[string]map[string]bool
	sequence   map[string][]string // by endpoint: what has been accepted, each event once
	inversions []string
	down       time.Time     // until then: a second at most, or a delivery would use up its attempts
	pause      time.Duration // after each transaction, besides a few milliseconds
	changed    chan struct{}
}

type uuidIndex int

func (o *orderOracle) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	endpoint, event := r.URL.Path[1:], r.Header.Get("webhook-id")
	o.mu.Lock()
	o.look(endpoint, event)
	wait := time.Duration(o.rnd.IntN(8)) * time.Millisecond
	refuse := time.Now().Before(o.down) || o.rnd.IntN(12) == 0
	o.mu.Unlock()
	<-time.After(wait)
	if refuse {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	o.mu.Lock()
	if o.accepted[endpoint] == nil {
		o.accepted[endpoint] = make(map[string]bool)
	}
	if !o.accepted[endpoint][event] {
		o.accepted[endpoint][event] = true
		o.sequence[endpoint] = append(o.sequence[endpoint], event)
	}
	o.mu.Unlock()
	select {
	case o.changed <- struct{}{}:
	default:
	}
}

// look notes a request that should not have come yet: an earlier event of the same key has not been accepted.
func (o *orderOracle) look(endpoint, event string) {
	for other, place := range o.place {
		if place >= o.place[event] || o.accepted[endpoint][other] || !strings.HasPrefix(endpoint, "strict") && o.aggregate[other] != o.aggregate[event] {
			continue
		}
		o.inversions = append(o.inversions, fmt.Sprintf("%s: number %d came before number %d was accepted", endpoint, o.place[event], place))
		return
	}
}

func (o *orderOracle) done(endpoints, events int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for _, list := range o.sequence {
		n += len(list)
	}
	return n >= endpoints*events
}

// TestOrderHoldsUnderKills: endpoints that promise an order get their events in it, though the receiver fails and is down at times, two replicas work
// the queue, and both are killed over and over. OUTBOX_RELAY_TEST_SEEDS asks for more than two runs.
func TestOrderHoldsUnderKills(t *testing.T) {
	t.Parallel()
	for seed := range testSeeds(t) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			orderUnderKills(t, uint64(seed))
		})
	}
}

func testSeeds(t *testing.T) (seeds int) {
	t.Helper()
	text := os.Getenv("OUTBOX_RELAY_TEST_SEEDS")
	if text == "" {
		return 2
	}
	seeds, err := strconv.Atoi(text)
	require.NoError(t, err)
	return seeds
}

func orderUnderKills(t *testing.T, seed uint64) {
	const events, aggregates = 200, 8
	rnd := rand.New(rand.NewPCG(seed, 99))
	o := &orderOracle{
		rnd: rand.New(rand.NewPCG(seed, 1)), place: make(map[string]int), aggregate: make(map[string]uuidIndex),
		accepted: make(map[string]map[string]bool), sequence: make(map[string][]string), changed: make(chan struct{}, 1),
	}
	server := httptest.NewServer(o)
	t.Cleanup(server.Close)
	s := newSite(t, "window:\n  hold: 200ms\n  deliveries: 100\ndelivery:\n  workers: 32\n  endpoint_concurrency: 8\nrecord:\n  batch: 50\nqueue:\n  poll: 50ms\n  lease: 1s\n  batch: 50\n"+
		"breaker:\n  failures: 6\n  open_for: 1s\n", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
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
	written := make(chan error, 1)
	writes := rand.New(rand.NewPCG(seed, 2))
	go func() { written <- o.write(ctx, s, writes, ids, events) }()

	var replicas []*relayProcess
	for range 2 {
		replicas = append(replicas, startRelay(t, s.config))
	}
	for range 6 {
		select {
		case <-time.After(time.Duration(200+rnd.IntN(600)) * time.Millisecond):
		case <-ctx.Done():
		}
		victim := rnd.IntN(2)
		replicas[victim].kill(t)
		replicas[victim] = startRelay(t, s.config)
		o.mu.Lock()
		if rnd.IntN(3) == 0 {
			o.down = time.Now().Add(time.Second)
		}
		o.mu.Unlock()
	}
	require.NoError(t, <-written)
	o.finish(ctx, t, len(names), events, replicas)
}

// finish waits until every endpoint has accepted every event, stops the relays, and holds the order against that of the commits.
func (o *orderOracle) finish(ctx context.Context, t *testing.T, endpoints, events int, relays []*relayProcess) {
	t.Helper()
	for !o.done(endpoints, events) {
		select {
		case <-o.changed:
		case <-ctx.Done():
			o.mu.Lock()
			defer o.mu.Unlock()
			for name, list := range o.sequence {
				t.Logf("%s has %d of %d", name, len(list), events)
			}
			require.FailNow(t, "gave up waiting", "inversions: %v", o.inversions)
		}
	}
	for _, p := range relays {
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	require.Empty(t, o.inversions)
}

// write commits events of all aggregates, one transaction after the other.
func (o *orderOracle) write(ctx context.Context, s *site, rnd *rand.Rand, ids []outbox.UUID, events int) error {
	for n := 0; n < events; {
		var batch []outbox.Event
		o.mu.Lock()
		for range min(1+rnd.IntN(4), events-n) {
			i := rnd.IntN(len(ids))
			e := outbox.Event{ID: outbox.NewUUID(), Type: "order.changed", AggregateID: ids[i], AggregateType: "order", Data: fmt.Appendf(nil, `{"n": %d}`, n)}
			o.place[e.ID.String()], o.aggregate[e.ID.String()] = n, uuidIndex(i)
			batch = append(batch, e)
			n++
		}
		o.mu.Unlock()
		tx, err := s.pool.Begin(ctx)
		if err != nil {
			return err
		}
		if _, err := outbox.InsertMany(ctx, tx, "acme", batch); err != nil {
			return err
		}
		if err := tx.Commit(ctx); err != nil {
			return err
		}
		select {
		case <-time.After(o.pause + time.Duration(rnd.IntN(15))*time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
