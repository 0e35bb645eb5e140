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
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// doorkeeper is a receiver of many paths that is asked before it is delivered to.
type doorkeeper struct {
	*httptest.Server
	site   *site
	verify *standardwebhooks.Webhook
	secret string

	mu     sync.Mutex
	moods  map[string]string // by path: agrees unless told otherwise
	asked  map[string]int
	got    map[string][]string // types of the events taken
	faults []string
}

// What a path does. All but down take deliveries.
const (
	deaf  = "deaf"  // does not understand that it is asked
	shut  = "shut"  // answers 404
	down  = "down"  // answers 503, but agrees
	hangs = "hangs" // does not answer when it is asked
)

func newDoorkeeper(t *testing.T, s *site) *doorkeeper {
	t.Helper()
	key := []byte("the secret of a doorkeeper")
	verify, err := standardwebhooks.NewWebhookRaw(key)
	require.NoError(t, err)
	d := &doorkeeper{
		site: s, verify: verify, secret: "whsec_" + base64.StdEncoding.EncodeToString(key),
		moods: make(map[string]string), asked: make(map[string]int), got: make(map[string][]string),
	}
	d.Server = httptest.NewServer(d)
	t.Cleanup(func() {
		d.CloseClientConnections()
		d.Close()
		assert.Empty(t, d.faults)
	})
	return d
}

func (d *doorkeeper) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var event struct {
		Type string
		Data struct{ Challenge string }
	}
	if err == nil {
		err = d.verify.Verify(body, r.Header)
	}
	if err == nil && r.Method != http.MethodHead {
		err = json.Unmarshal(body, &event)
	}
	d.mu.Lock()
	if err != nil {
		d.faults = append(d.faults, err.Error())
	}
	mood := d.moods[r.URL.Path]
	asks := r.Method == http.MethodHead || event.Type == "outbox_relay.endpoint.verify"
	if asks {
		d.asked[r.URL.Path]++
	} else if mood != down {
		d.got[r.URL.Path] = append(d.got[r.URL.Path], event.Type)
	}
	d.mu.Unlock()
	switch {
	case !asks && mood == down:
		w.WriteHeader(http.StatusServiceUnavailable)
	case !asks, mood == deaf:
		w.WriteHeader(http.StatusOK)
	case mood == shut:
		w.WriteHeader(http.StatusNotFound)
	case mood == hangs:
		<-r.Context().Done()
	default:
		_, _ = fmt.Fprintf(w, `{"challenge": %q}`, event.Data.Challenge)
	}
	select {
	case d.site.receiver.grown <- struct{}{}:
	default:
	}
}

func (d *doorkeeper) set(path, mood string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.moods[path] = mood
}

func (d *doorkeeper) wasAsked(path string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asked[path]
}

func (d *doorkeeper) count(path, eventType string) (n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, got := range d.got[path] {
		if got == eventType {
			n++
		}
	}
	return n
}

// endpoint makes one that may be retried every second.
func (d *doorkeeper) endpoint(t *testing.T, tenant, path string) (id outbox.UUID) {
	t.Helper()
	id = outbox.NewUUID()
	d.site.exec(t, `INSERT INTO `+tenant+`.webhook_endpoints (id, name, endpoint_url, secret_token, max_retry_attempts, retry_backoff_seconds, retry_backoff_multiplier,
		timeout_seconds, created_by_user_id) VALUES ($1, 'door', $2, $3, 10, 1, 1.0, 5, $1)`, id, d.URL+path+"?key=s3cret", d.secret)
	return id
}

func (d *doorkeeper) move(t *testing.T, id outbox.UUID, path string) {
	t.Helper()
	d.site.exec(t, `UPDATE acme.webhook_endpoints SET endpoint_url = $2 WHERE id = $1`, id, d.URL+path)
}

func (s *site) isVerified(t *testing.T, id outbox.UUID) (verified bool) {
	t.Helper()
	require.NoError(t, s.pool.QueryRow(t.Context(), `SELECT is_verified FROM acme.webhook_endpoints WHERE id = $1`, id).Scan(&verified))
	return verified
}

// restricted makes the type one that goes to verified endpoints only.
func (s *site) restricted(t *testing.T, eventType string) {
	t.Helper()
	s.exec(t, `UPDATE acme.webhook_event_types SET requires_verification = true WHERE event_type = $1`, eventType)
}

// TestVerificationByChallenge goes through the life of two endpoints, one whose receiver agrees and one whose does not, with the rights of the running role.
func TestVerificationByChallenge(t *testing.T) {
	t.Parallel()
	s := newSite(t, "verification:\n  method: challenge\n  schedule: [1s, 1s]\nqueue:\n  poll: 100ms\nbreaker:\n  failures: 1000\n  failure_ratio: 0\n", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s.asRunner(t)
	d := newDoorkeeper(t, s)
	await := func(what string, condition func() bool) {
		t.Helper()
		s.receiver.await(ctx, t, what, condition)
	}
	d.set("/no", deaf)
	yes, no, news := d.endpoint(t, "acme", "/yes"), d.endpoint(t, "acme", "/no"), d.endpoint(t, "acme", "/news")
	before := d.endpoint(t, "acme", "/before") // somebody has verified it before the relay was told to
	d.set("/before", shut)
	s.exec(t, `UPDATE acme.webhook_endpoints SET is_verified = true WHERE id = $1`, before)
	for _, id := range []outbox.UUID{yes, no, before} {
		s.subscribe(t, "acme", id, "order.created", "{}")
		s.subscribe(t, "acme", id, "card.issued", "{}")
	}
	s.restricted(t, "card.issued")
	s.subscribe(t, "acme", news, "outbox_relay.endpoint.unverified", "{}")
	for path, change := range map[string]string{"/idle": "is_active = false", "/paused": "paused_at = now()"} {
		s.exec(t, `UPDATE acme.webhook_endpoints SET `+change+` WHERE id = $1`, d.endpoint(t, "acme", path))
	}
	p := startRelay(t, s.config)

	// Who agrees is verified, who does not is asked three times, and then it is told.
	await("one verified", func() bool { return s.isVerified(t, yes) })
	var at time.Time
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT verified_at FROM acme.webhook_endpoints WHERE id = $1`, yes).Scan(&at))
	require.WithinDuration(t, time.Now(), at, time.Minute)
	await("the news", func() bool { return d.count("/news", "outbox_relay.endpoint.unverified") == 1 })
	require.False(t, s.isVerified(t, no))
	require.Equal(t, 3, d.wasAsked("/no"))
	require.Equal(t, 1, d.wasAsked("/yes"))
	require.Zero(t, d.wasAsked("/idle")+d.wasAsked("/paused"), "who takes no deliveries")
	s.exec(t, `DELETE FROM acme.webhook_endpoints WHERE NOT is_active OR paused_at IS NOT NULL`)
	out, _, _ := s.desk(t, "endpoints", "show", no.String())
	require.Contains(t, out, "answered 200, but did not send the challenge back; given up after 3 tries")
	require.NotContains(t, out, "s3cret")
	require.NotContains(t, p.said(t), "s3cret")

	// Each gets what it may.
	s.insertMany(t, "acme", "card.issued", 2)
	s.insertMany(t, "acme", "order.created", 1)
	await("what both may have", func() bool { return d.count("/yes", "order.created") == 1 && d.count("/no", "order.created") == 1 })
	await("what one may have", func() bool { return d.count("/yes", "card.issued") == 2 })
	await("what was verified before", func() bool { return d.count("/before", "card.issued") == 2 })
	require.Zero(t, d.wasAsked("/before"))
	require.Zero(t, d.count("/no", "card.issued"))
	var event string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT id::text FROM acme.webhook_events WHERE event_type = 'card.issued' LIMIT 1`).Scan(&event))
	out, _, _ = s.desk(t, "events", "explain", event)
	require.Contains(t, out, "its endpoint is not verified, which events of type card.issued require")

	// By hand: first in vain, then not. What comes from then on is delivered, what was missed by a recovery.
	out, _, code := s.desk(t, "endpoints", "verify", no.String())
	require.Equal(t, 1, code, out)
	require.Contains(t, out, "not verified, status 200")
	require.Contains(t, out, "outbox_relay.endpoint.verify")
	d.set("/no", "")
	var results []struct {
		EndpointID outbox.UUID `json:"endpoint_id"`
		Verified   bool        `json:"verified"`
	}
	s.read(t, &results, "endpoints", "verify", "--all")
	require.Len(t, results, 1)
	require.Equal(t, no, results[0].EndpointID)
	require.True(t, s.isVerified(t, no))
	out, _, _ = s.desk(t, "endpoints", "verify", "--all")
	require.Contains(t, out, "All active endpoints of tenant acme are verified.")
	s.insertMany(t, "acme", "card.issued", 1)
	await("the next one", func() bool { return d.count("/no", "card.issued") == 1 })
	s.command(t, "endpoints", "recover", no.String(), "--since", "1h")
	await("those before", func() bool { return d.count("/no", "card.issued") == 3 })
	require.Equal(t, 3, d.count("/yes", "card.issued"))

	// Another URL is not verified because the last one was: from its very commit on, also for what waits to be sent again.
	d.set("/yes", down)
	s.insertMany(t, "acme", "card.issued", 1)
	await("a retry", func() bool { return s.waits(t, yes, "retrying") == 1 })
	d.set("/moved", shut)
	tx, err := s.pool.Begin(ctx)
	require.NoError(t, err)
	_, err = tx.Exec(ctx, `UPDATE acme.webhook_endpoints SET endpoint_url = $2 WHERE id = $1`, yes, d.URL+"/moved")
	require.NoError(t, err)
	for _, kind := range []string{"card.issued", "order.created"} {
		_, err = outbox.Insert(ctx, tx, "acme", outbox.Event{Type: kind, AggregateID: yes, AggregateType: "order", Data: []byte("{}")})
		require.NoError(t, err)
	}
	require.NoError(t, tx.Commit(ctx))
	await("what it may have there", func() bool { return d.count("/moved", "order.created") == 1 })
	await("its row says so", func() bool { return !s.isVerified(t, yes) && d.wasAsked("/moved") > 0 })
	await("what waits is put off", func() bool { return s.waits(t, yes, "unverified") == 1 })
	await("the news", func() bool { return d.count("/news", "outbox_relay.endpoint.unverified") == 2 })
	require.Zero(t, d.count("/moved", "card.issued"))
	d.move(t, yes, "/better")
	await("verified there", func() bool { return s.isVerified(t, yes) })
	s.insertMany(t, "acme", "card.issued", 1)
	await("deliveries there", func() bool { return d.count("/better", "card.issued") > 0 })

	// A relay that was away finds out the same.
	_, err = p.stop(t)
	require.NoError(t, err)
	d.set("/away", shut)
	d.set("/before/away", shut)
	d.move(t, yes, "/away")
	d.move(t, before, "/before/away")
	s.insertMany(t, "acme", "card.issued", 1)
	s.insertMany(t, "acme", "order.created", 1)
	out, _, _ = s.desk(t, "endpoints", "show", yes.String())
	require.Contains(t, out, "no, only with another URL")
	asked := d.wasAsked("/no")
	startRelay(t, s.config)
	await("what they may have", func() bool {
		return d.count("/away", "order.created") == 1 && d.count("/before/away", "order.created") == 1
	})
	await("their rows say so", func() bool { return !s.isVerified(t, yes) && !s.isVerified(t, before) })
	require.Zero(t, d.count("/away", "card.issued")+d.count("/before/away", "card.issued"))
	require.True(t, s.isVerified(t, no))
	require.Equal(t, asked, d.wasAsked("/no"), "what is verified is not asked again")

	// Taking it back asks for another round.
	s.exec(t, `UPDATE acme.webhook_endpoints SET is_verified = false WHERE id = $1`, no)
	await("asked again", func() bool { return d.wasAsked("/no") == asked+1 && s.isVerified(t, no) })

	// Nothing is kept of an endpoint that is gone.
	s.exec(t, `DELETE FROM acme.webhook_endpoints WHERE id = $1`, yes)
	await("forgotten", func() bool {
		var n int
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.endpoint_verification WHERE endpoint_id = $1`, yes).Scan(&n))
		return n == 0
	})

	// Another URL has tries of its own, however many there were at the last one.
	await("given up", func() bool { return d.wasAsked("/before/away") == 3 })
	d.set("/before/anew", shut)
	d.move(t, before, "/before/anew")
	await("given up there", func() bool { return d.wasAsked("/before/anew") == 3 })
}

// waits counts the deliveries of an endpoint that wait with a status, or for a reason.
func (s *site) waits(t *testing.T, endpoint outbox.UUID, why string) (n int) {
	t.Helper()
	require.NoError(t, s.pool.QueryRow(t.Context(), `SELECT count(*) FROM acme.webhook_deliveries d JOIN outbox_relay.retry_queue q ON q.delivery_id = d.id
		WHERE d.webhook_endpoint_id = $1 AND $2 IN (d.delivery_status, d.error_message)`, endpoint, why).Scan(&n))
	return n
}

// TestVerificationOfManyTenants: one whose receivers all hang does not keep those of the others from being verified, and no more are asked at once than may be.
func TestVerificationOfManyTenants(t *testing.T) {
	t.Parallel()
	s := newSite(t, "verification:\n  method: head\n", always(http.StatusOK), "acme", "sick")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := newDoorkeeper(t, s)
	d.set("/hangs", hangs)
	for range 200 {
		d.endpoint(t, "sick", "/hangs")
	}
	startRelay(t, s.config)
	s.receiver.await(ctx, t, "as many as may", func() bool { return d.wasAsked("/hangs") == 4 })
	began := time.Now()
	var ids []outbox.UUID
	for range 60 {
		ids = append(ids, d.endpoint(t, "acme", "/yes"))
	}
	s.receiver.await(ctx, t, "the others", func() bool {
		return !slices.ContainsFunc(ids, func(id outbox.UUID) bool { return !s.isVerified(t, id) })
	})
	require.Less(t, time.Since(began), 30*time.Second)
	require.Greater(t, time.Since(began), time.Second, "twenty a second")
	require.Equal(t, 60, d.wasAsked("/yes"))
	require.LessOrEqual(t, d.wasAsked("/hangs"), 4*(2+int(time.Since(began)/(5*time.Second))))
}

// TestVerificationPutOff: what the relay has no means to ask is put off, and counts as no try.
func TestVerificationPutOff(t *testing.T) {
	t.Parallel()
	s := newSite(t, "verification:\n  method: head\n", always(http.StatusOK), "acme")
	yaml, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.config, []byte(strings.Replace(string(yaml), "network:", "network:\n  proxy: http://127.0.0.1:1", 1)), 0o600))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := newDoorkeeper(t, s)
	id := d.endpoint(t, "acme", "/yes")
	p := startRelay(t, s.config)
	s.receiver.await(ctx, t, "it is said", func() bool { return strings.Contains(p.said(t), "endpoints cannot be verified now") })
	var tries int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT coalesce(sum(tries), 0) FROM outbox_relay.endpoint_verification WHERE endpoint_id = $1`, id).Scan(&tries))
	require.Zero(t, tries)
}

// TestWithoutVerification: unless it is told to, the relay asks nobody and changes no row, and is_verified means what the application says.
func TestWithoutVerification(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := newDoorkeeper(t, s)
	id := d.endpoint(t, "acme", "/one")
	s.subscribe(t, "acme", id, "card.issued", "{}")
	s.subscribe(t, "acme", id, "order.created", "{}")
	s.restricted(t, "card.issued")
	startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "card.issued", 1)
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "what it may have", func() bool { return d.count("/one", "order.created") == 1 })
	require.Zero(t, d.count("/one", "card.issued"))

	_, said, code := s.desk(t, "endpoints", "verify", id.String())
	require.Equal(t, 2, code)
	require.Contains(t, said, "verification.method is none: say how, --method head or challenge")
	s.command(t, "endpoints", "verify", id.String(), "--method", "head")
	require.True(t, s.isVerified(t, id))
	d.move(t, id, "/two")
	s.insertMany(t, "acme", "card.issued", 1)
	s.receiver.await(ctx, t, "what it may have now, wherever it is", func() bool { return d.count("/two", "card.issued") == 1 })
	s.command(t, "endpoints", "recover", id.String(), "--since", "1h")
	s.receiver.await(ctx, t, "what it missed", func() bool { return d.count("/two", "card.issued") == 2 })
	require.Equal(t, 1, d.wasAsked("/one"))
	require.Zero(t, d.wasAsked("/two"))
}
