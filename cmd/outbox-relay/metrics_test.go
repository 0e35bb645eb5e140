package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// A moody receiver behaves as the path says: /ok, /fail, /busy, /hang until it is let go.
type moody struct {
	*httptest.Server
	hold atomic.Pointer[chan struct{}]
}

func newMoody(t *testing.T) *moody {
	t.Helper()
	m := &moody{}
	m.keep()
	m.Server = httptest.NewServer(m)
	t.Cleanup(func() {
		m.CloseClientConnections() // of what still hangs
		m.Close()
	})
	return m
}

func (m *moody) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	switch r.URL.Path {
	case "/fail":
		w.WriteHeader(http.StatusInternalServerError)
	case "/busy":
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusTooManyRequests)
	case "/hang":
		select {
		case <-*m.hold.Load():
		case <-r.Context().Done():
		}
	}
}

// keep has requests to /hang hang until letGo, which is called once for each keep.
func (m *moody) keep() {
	hold := make(chan struct{})
	m.hold.Store(&hold)
}

func (m *moody) letGo() { close(*m.hold.Load()) }

// quitter answers the first request of each connection and ends it without a word at the second.
func quitter(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // lives as long as the test
	require.NoError(t, err)
	var server http.Server
	type asked struct{}
	server.ConnContext = func(ctx context.Context, _ net.Conn) context.Context {
		return context.WithValue(ctx, asked{}, new(atomic.Bool))
	}
	server.Handler = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.Context().Value(asked{}).(*atomic.Bool).Swap(true) {
			panic(http.ErrAbortHandler)
		}
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		_ = server.Close()
		<-done
	})
	return "http://" + l.Addr().String()
}

// scraped is what a relay serves, by name.
type scraped map[string]*dto.MetricFamily

func (p *relayProcess) scrape(ctx context.Context, t *testing.T, s *site) scraped {
	t.Helper()
	_, text := p.page(ctx, t, s, "/metrics")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	require.NoError(t, err)
	return families
}

// value sums up the series of a metric that have the labels, as deferred_total{reason="rate"}; of a histogram, how much it has observed. Series that are not there yet are zero.
func (s scraped) value(t *testing.T, series string) (sum float64) {
	t.Helper()
	name, selector, _ := strings.Cut(strings.TrimSuffix(series, "}"), "{")
	f := s["outbox_relay_"+name]
	require.NotNil(t, f, "nothing is called %s", name)
	for _, m := range f.GetMetric() {
		has := make(map[string]bool)
		for _, pair := range m.GetLabel() {
			has[fmt.Sprintf("%s=%q", pair.GetName(), pair.GetValue())] = true
		}
		if selector != "" && slices.ContainsFunc(strings.Split(selector, ","), func(label string) bool { return !has[label] }) {
			continue
		}
		sum += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
	}
	return sum
}

// A town is a site whose receivers are moody, and how it is written to.
type town struct {
	*site
	moody *moody
	ids   map[string]outbox.UUID
	yaml  []byte // the configuration
}

// settle makes an endpoint with an event type of its name.
func (w *town) settle(t *testing.T, name, url, more string) {
	t.Helper()
	if w.ids[name].IsZero() {
		w.ids[name] = outbox.NewUUID()
	}
	w.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, max_retry_attempts, retry_backoff_seconds, is_verified, created_by_user_id)
		VALUES ($1, $2, $3, 'secret', 1, 1, true, $1)`, w.ids[name], name, url)
	if more != "" {
		w.exec(t, `UPDATE acme.webhook_endpoints SET `+more+` WHERE id = $1`, w.ids[name])
	}
	w.subscribe(t, "acme", w.ids[name], name, "{}")
}

// send commits events for an endpoint, each in a transaction of its own.
func (w *town) send(t *testing.T, name string, n int) {
	t.Helper()
	for range n {
		w.insertMany(t, "acme", name, 1)
	}
}

func (w *town) count(ctx context.Context, t *testing.T, sql string, args ...any) (n int) {
	t.Helper()
	require.NoError(t, w.pool.QueryRow(ctx, sql, args...).Scan(&n), sql)
	return n
}

// delivered counts what is recorded as such for an endpoint.
func (w *town) delivered(ctx context.Context, t *testing.T, name string) int {
	t.Helper()
	return w.count(ctx, t, `SELECT count(*) FROM acme.webhook_deliveries WHERE webhook_endpoint_id = $1 AND delivery_status = 'success'`, w.ids[name])
}

// A phase does something to a relay, which moves metrics in a known way.
type phase struct {
	name  string
	do    func()
	moves map[string]move
}

// move tells whether a series has moved, from what it was before the phase.
type move func(before, now float64) bool

func rises(before, now float64) bool { return now > before }
func is(want float64) move           { return func(_, now float64) bool { return now == want } }
func by(n float64) move              { return func(before, now float64) bool { return now-before == n } }
func toZero(_, now float64) bool     { return now == 0 }

// play goes through a phase and waits until everything that it moves has moved.
func (w *town) play(ctx context.Context, t *testing.T, of **relayProcess, ph *phase) {
	t.Helper()
	began := time.Now()
	before := make(map[string]float64)
	if *of != nil {
		for series := range ph.moves {
			before[series] = (*of).scrape(ctx, t, w.site).value(t, series)
		}
	}
	ph.do()
	left := maps.Clone(ph.moves)
	var last map[string]float64
	limited, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for len(left) > 0 {
		now := (*of).scrape(ctx, t, w.site)
		last = make(map[string]float64)
		for series, moved := range left {
			if last[series] = now.value(t, series); moved(before[series], last[series]) {
				delete(left, series)
			}
		}
		select {
		case <-time.After(20 * time.Millisecond): // what passes by fast is to be seen
		case <-limited.Done():
			for series := range left {
				assert.Fail(t, "a metric has not moved", "%s: %s was %v, is %v", ph.name, series, before[series], last[series])
			}
			t.FailNow()
		}
	}
	t.Logf("%s: %d metrics have moved after %v", ph.name, len(ph.moves), time.Since(began).Round(time.Millisecond))
}

// TestEveryMetricMoves plays what happens to relays, and sees every metric of the catalogue move. One that is in no phase fails it.
func TestEveryMetricMoves(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	w := &town{site: newSite(t, movesConfig, always(http.StatusOK), "acme", "quiet"), moody: newMoody(t), ids: make(map[string]outbox.UUID)}
	w.listen(t)
	yaml, err := os.ReadFile(w.config)
	require.NoError(t, err)
	w.yaml = bytes.Replace(yaml, []byte("database:\n"), []byte("database:\n  wal_budget: 1GiB\n  max_connections: 6\n"), 1)
	w.configure(t, "")
	var relay, standby *relayProcess
	phases := w.phases(ctx, t, &relay, &standby)
	families, err := catalogue()
	require.NoError(t, err)
	moves := make(map[string]bool)
	for _, ph := range phases {
		for series := range ph.moves {
			name, _, _ := strings.Cut(series, "{")
			moves["outbox_relay_"+name] = true
		}
	}
	for _, f := range families {
		assert.True(t, moves[f.GetName()], "nothing moves %s", f.GetName())
		delete(moves, f.GetName())
	}
	require.Empty(t, moves, "no such metrics")
	for i := range phases {
		w.play(ctx, t, &relay, &phases[i])
	}

	served := relay.scrape(ctx, t, w.site)
	maps.DeleteFunc(served, func(name string, _ *dto.MetricFamily) bool { return !strings.HasPrefix(name, "outbox_relay_") })
	for _, f := range families {
		assert.Contains(t, served, f.GetName())
		assert.Equal(t, f.GetHelp(), served[f.GetName()].GetHelp())
		delete(served, f.GetName())
	}
	assert.Empty(t, served, "served and not in the catalogue")
	_, text := relay.page(ctx, t, w.site, "/metrics")
	problems, err := promlint.New(strings.NewReader(text)).Lint() // what promtool check metrics does
	require.NoError(t, err)
	assert.Empty(t, problems)
	_, exit := relay.stop(t)
	require.NoError(t, exit)
}
