package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// several writes the configuration of one process for the databases of these sites.
func several(t *testing.T, settings string, sites map[string]*site) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "relays.yaml")
	text := "network: {allow: [127.0.0.0/8]}\nserver: {listen: '127.0.0.1:0'}\nlog: {format: json}\n" + settings + "databases:\n"
	for name, s := range sites {
		text += fmt.Sprintf("  - {name: %s, url: %q, slot: %s}\n", name, s.dsn, s.slot)
	}
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	return file
}

var attempted = regexp.MustCompile(`(?m)^outbox_relay_attempts_total\{class="success"\} (\d+)$`)

var served = regexp.MustCompile(`"address":"([^"]+)"`)

// page gets a page of a relay, as soon as it says where they are.
func (p *relayProcess) page(ctx context.Context, t *testing.T, s *site, path string) (int, string) {
	t.Helper()
	var address []string
	s.receiver.await(ctx, t, "the address of the pages", func() bool {
		address = served.FindStringSubmatch(p.said(t))
		return address != nil
	})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address[1]+path, http.NoBody)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer func() { assert.NoError(t, resp.Body.Close()) }()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(body)
}

// awaitReady waits for a line of /readyz for each database, and for the status.
func (p *relayProcess) awaitReady(ctx context.Context, t *testing.T, s *site, status int, lines ...string) {
	t.Helper()
	var got int
	var text string
	s.receiver.await(ctx, t, strings.Join(lines, ", "), func() bool {
		got, text = p.page(ctx, t, s, "/readyz")
		for _, line := range lines {
			if !regexp.MustCompile("(?m)^" + line).MatchString(text) {
				return false
			}
		}
		return got == status
	})
	assert.Equal(t, len(lines), strings.Count(text, "\n"), text)
}

// route makes an endpoint for everything a site inserts.
func (s *site) route(t *testing.T) (endpoint outbox.UUID) {
	t.Helper()
	endpoint = s.endpoint(t, "acme", 5)
	s.subscribe(t, "acme", endpoint, "order.created", "{}")
	return endpoint
}

func secondServer(t *testing.T) *pgtest.Server {
	t.Helper()
	server, err := pgtest.Start(t.Context(), pgtest.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	return server
}

// TestSeveralDatabases: one process relays for two databases of a server and one of another; a second one stands by for all of them, takes some over, and
// when the first is killed the rest.
func TestSeveralDatabases(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	sites := map[string]*site{
		"orders": newSite(t, "", always(http.StatusOK), "acme"), "billing-eu": newSite(t, "", always(http.StatusOK), "acme"),
		"far": newSiteOn(t, secondServer(t).URL("postgres"), "", always(http.StatusOK), "acme"),
	}
	one := sites["orders"]
	endpoints, sent := make(map[string]outbox.UUID), 0
	for name, s := range sites {
		endpoints[name] = s.route(t)
	}
	sendAll := func(n int) {
		t.Helper()
		sent += n
		for _, s := range sites {
			s.insertMany(t, "acme", "order.created", n)
		}
		for name, s := range sites {
			s.receiver.await(ctx, t, "the events of "+name, func() bool { return s.arrivedAt(endpoints[name]) == sent })
		}
	}
	config := several(t, "", sites)
	first := startRelay(t, config)
	first.awaitReady(ctx, t, one, http.StatusOK, "orders: leading", "billing-eu: leading", "far: leading")
	second := startRelay(t, config)
	second.awaitReady(ctx, t, one, http.StatusOK, "orders: standing by", "billing-eu: standing by", "far: standing by")
	sendAll(300)

	_, metrics := first.page(ctx, t, one, "/metrics")
	for _, line := range []string{
		`outbox_relay_leader{database="orders"} 1`, `outbox_relay_leader{database="far"} 1`, `outbox_relay_events_total{database="billing-eu",matched="true"} 300`,
		`outbox_relay_window_limit_deliveries{database="far"} 3333`,
	} {
		assert.Contains(t, metrics, line+"\n")
	}
	// What was deferred the second one may have claimed; and an attempt ends a moment after its arrival.
	one.receiver.await(ctx, t, "the count of all attempts, by process", func() bool {
		successes := 0
		for _, p := range []*relayProcess{first, second} {
			_, metrics := p.page(ctx, t, one, "/metrics")
			n, err := strconv.Atoi(attempted.FindStringSubmatch(metrics)[1])
			require.NoError(t, err)
			successes += n
		}
		return successes >= 900
	})
	assert.Contains(t, first.said(t), `"msg":"leading","database":"billing-eu"`)

	// Whoever is faster has it; sooner or later that is the second one. A stream of the first is ended once it leads: before it says so, a stream may be the second's.
	ended := 0
	one.receiver.await(ctx, t, "the second relay to take a database over", func() bool {
		if led := strings.Count(first.said(t), `"msg":"leading","database":"far"`); led > ended {
			ended = led
			s := sites["far"]
			s.exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", s.slot)
		}
		_, text := second.page(ctx, t, one, "/readyz")
		return strings.Contains(text, "far: leading")
	})
	sendAll(100)
	first.kill(t)
	began := time.Now()
	sendAll(100)
	t.Logf("events of all databases had arrived %v after the kill", time.Since(began).Round(time.Millisecond))
	second.awaitReady(ctx, t, one, http.StatusOK, "orders: leading", "billing-eu: leading", "far: leading")
	for name, s := range sites {
		s.receiver.await(ctx, t, "the record of "+name, func() bool { return s.recorded(t, []string{"acme"}) == sent })
		require.Empty(t, s.receiver.bad)
	}
	// The other commands, on all of them in turn and on one.
	var o outcome
	one.receiver.await(ctx, t, "an audit of all databases", func() bool {
		o = invoke(t, nil, "audit", "--config", config)
		return o.code == exitOK // nothing has been handled before the first checkpoint
	})
	for name := range sites {
		assert.Regexp(t, `(?s)database `+name+`\nTENANT .*\nnothing is missing in what was looked at\n`, o.out)
	}
	o = invoke(t, nil, "audit", "-o", "json", "--config", config)
	assert.Contains(t, o.out, `"database": "far"`)
	assert.NotContains(t, o.out, "database far")
	o = invoke(t, nil, "check", "--config", config)
	assert.Equal(t, exitOK, o.code, "%s%s", o.out, o.err)
	assert.Contains(t, o.out, "database billing-eu\nok    database: PostgreSQL")
	assert.Contains(t, o.out, "databases.far.url may stream")
	o = invoke(t, nil, "deliveries", "list", "-t", "acme", "--database", "far", "--config", config)
	assert.Equal(t, exitOK, o.code, o.err)
	_, exit := second.stop(t)
	require.NoError(t, exit)
}

// The same database under two names of its server is found by check.
func TestCheckFindsADatabaseThatIsThereTwice(t *testing.T) {
	t.Parallel()
	d := installed(t)
	s := &site{dsn: d.url, slot: d.name}
	twin := &site{dsn: strings.Replace(d.url, "@127.0.0.1:", "@localhost:", 1), slot: d.name}
	o := invoke(t, nil, "check", "--config", several(t, "", map[string]*site{"one": s, "two": twin}))
	assert.Equal(t, exitFailure, o.code)
	require.Len(t, failures(o), 1, o.out)
	assert.Regexp(t, `: the same as that of (one|two) → drop one of the two entries`, failures(o)[0])
}

// TestDatabaseDown: a server that is stopped, and one that is not there at the start, take nothing from the databases of the other, and come back by
// themselves.
func TestDatabaseDown(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	server := secondServer(t)
	near := newSite(t, "", always(http.StatusOK), "acme")
	far := newSiteOn(t, server.URL("postgres"), "", always(http.StatusOK), "acme")
	nearEP, farEP := near.route(t), far.route(t)
	config := several(t, "", map[string]*site{"near": near, "far": far})
	p := startRelay(t, config)
	p.awaitReady(ctx, t, near, http.StatusOK, "near: leading", "far: leading")
	sent := 0
	nearGoesOn := func() {
		t.Helper()
		sent += 50
		near.insertMany(t, "acme", "order.created", 50)
		near.receiver.await(ctx, t, "events of the other database", func() bool { return near.arrivedAt(nearEP) == sent })
	}
	nearGoesOn()
	require.NoError(t, server.Stop(ctx, "fast"))
	nearGoesOn()
	p.awaitReady(ctx, t, near, http.StatusServiceUnavailable, "near: leading", "far: no stream: .*")
	nearGoesOn()
	require.NoError(t, server.Restart(ctx))
	far.pool.Reset()
	far.insertMany(t, "acme", "order.created", 10)
	far.receiver.await(ctx, t, "its own events", func() bool { return far.arrivedAt(farEP) == 10 })
	p.awaitReady(ctx, t, near, http.StatusOK, "near: leading", "far: leading")
	_, exit := p.stop(t)
	require.NoError(t, exit)

	require.NoError(t, server.Stop(ctx, "fast"))
	p = startRelay(t, config)
	p.awaitReady(ctx, t, near, http.StatusServiceUnavailable, "near: leading", "far: no stream: .*connect")
	nearGoesOn()
	require.NoError(t, server.Restart(ctx))
	far.pool.Reset()
	far.insertMany(t, "acme", "order.created", 10)
	far.receiver.await(ctx, t, "its own events after a late start", func() bool { return far.arrivedAt(farEP) == 20 })
	p.awaitReady(ctx, t, near, http.StatusOK, "near: leading", "far: leading")
	_, exit = p.stop(t)
	require.NoError(t, exit)
}

// TestDatabaseToMend: what ends the relay of a single database, only keeps one of several from working until somebody mends it: no migration yet, a role
// that may not come in, a copy of somebody's database, from whose queue nothing is sent meanwhile.
func TestDatabaseToMend(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var healthy atomic.Bool
	answer := func(outbox.UUID, string) int {
		if healthy.Load() {
			return http.StatusOK
		}
		return http.StatusServiceUnavailable
	}
	near, copied := newSite(t, "", always(http.StatusOK), "acme"), newSite(t, "breaker: {failures: 1000}\n", answer, "acme")
	nearEP, copiedEP := near.route(t), copied.route(t)
	original := startRelay(t, copied.config)
	copied.leading(ctx, t)
	copied.insertMany(t, "acme", "order.created", 5)
	queued := func() (n int) {
		require.NoError(t, copied.pool.QueryRow(ctx, "SELECT count(*) FROM outbox_relay.retry_queue").Scan(&n))
		return n
	}
	copied.receiver.await(ctx, t, "deliveries that wait", func() bool { return queued() == 5 })
	_, exit := original.stop(t)
	require.NoError(t, exit)
	healthy.Store(true)
	copied.exec(t, "UPDATE outbox_relay.progress SET instance_id = 'original'")
	copied.exec(t, "UPDATE outbox_relay.retry_queue SET due_at = now(), leased_by = NULL")
	attempts := copied.receiver.count()

	fresh := &site{dsn: pgtest.Database(t), slot: "e2e_" + strings.ReplaceAll(outbox.NewUUID().String(), "-", "")}
	barred := &site{dsn: strings.Replace(pgtest.Database(t), "postgres://postgres@", "postgres://nobody_here@", 1), slot: fresh.slot + "_2"}
	config := several(t, "database: {instance_id: copy}\n", map[string]*site{"near": near, "copied": copied, "fresh": fresh, "barred": barred})
	p := startRelay(t, config)
	p.awaitReady(ctx, t, near, http.StatusServiceUnavailable, "near: leading", "copied: no stream: .*belongs to another instance",
		"fresh: no stream: .*does not exist", "barred: no stream: .*role .* does not exist")
	near.insertMany(t, "acme", "order.created", 50)
	near.receiver.await(ctx, t, "events of the database that works", func() bool { return near.arrivedAt(nearEP) == 50 })
	copied.receiver.await(ctx, t, "a claim that was refused", func() bool {
		return regexp.MustCompile(`"msg":"claiming due deliveries does not succeed, trying again","database":"copied",.*another instance`).MatchString(p.said(t))
	})
	assert.Contains(t, p.said(t), `"hint":"run: outbox-relay migrate`)
	assert.Equal(t, attempts, copied.receiver.count(), "a copy has called somebody")
	assert.Equal(t, 5, queued())

	copied.exec(t, "UPDATE outbox_relay.progress SET instance_id = ''")
	o := invoke(t, nil, "migrate", "--config", config, "--database", "fresh")
	require.Equal(t, exitOK, o.code, o.err)
	copied.receiver.await(ctx, t, "the queue of what is no copy any more", func() bool { return copied.arrivedAt(copiedEP) == 5 })
	p.awaitReady(ctx, t, near, http.StatusServiceUnavailable, "near: leading", "copied: leading", "fresh: leading", "barred: no stream: .*")
	_, exit = p.stop(t)
	require.NoError(t, exit)
}
