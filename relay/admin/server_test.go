package admin_test

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/relay/admin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type health struct{ ready atomic.Bool }

func (h *health) Ready() (bool, string) {
	if h.ready.Load() {
		return true, "leader"
	}
	return false, "waiting for the slot"
}

func start(t *testing.T, h admin.Health) *admin.Server {
	t.Helper()
	registry := prometheus.NewRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "outbox_relay_test_total", Help: "A test."})
	registry.MustRegister(counter)
	s, err := admin.Listen(t.Context(), "127.0.0.1:0", admin.Options{Health: h, Registry: registry, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	run(t, s)
	return s
}

func run(t *testing.T, s *admin.Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		assert.NoError(t, <-done)
	})
}

func ask(t *testing.T, s *admin.Server, method, path string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.Addr()+path, http.NoBody)
	require.NoError(t, err)
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	require.NoError(t, err)
	defer func() { assert.NoError(t, resp.Body.Close()) }()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(body)
}

func TestPages(t *testing.T) {
	t.Parallel()
	h := new(health)
	s := start(t, h)

	status, body := ask(t, s, http.MethodGet, "/livez")
	assert.Equal(t, http.StatusOK, status)
	assert.Equal(t, "ok\n", body)

	status, body = ask(t, s, http.MethodGet, "/readyz")
	assert.Equal(t, http.StatusServiceUnavailable, status)
	assert.Equal(t, "waiting for the slot\n", body)
	h.ready.Store(true)
	status, body = ask(t, s, http.MethodGet, "/readyz")
	assert.Equal(t, http.StatusOK, status)
	assert.Equal(t, "leader\n", body)

	status, body = ask(t, s, http.MethodGet, "/metrics")
	assert.Equal(t, http.StatusOK, status)
	assert.Contains(t, body, "outbox_relay_test_total 0")

	status, _ = ask(t, s, http.MethodPost, "/livez")
	assert.Equal(t, http.StatusMethodNotAllowed, status)
	status, _ = ask(t, s, http.MethodGet, "/")
	assert.Equal(t, http.StatusNotFound, status)
}

func TestTakenPortIsKnownAtOnce(t *testing.T) {
	t.Parallel()
	s := start(t, new(health))
	_, err := admin.Listen(t.Context(), s.Addr(), admin.Options{Health: new(health), Registry: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler)})
	assert.ErrorContains(t, err, "serve health and metrics on "+s.Addr())
}

func TestProfilerStandsApart(t *testing.T) {
	t.Parallel()
	profiler, err := admin.ListenProfiler(t.Context(), "127.0.0.1:0", slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	run(t, profiler)
	for path, want := range map[string]int{
		"/debug/pprof/": http.StatusOK, "/debug/pprof/heap": http.StatusOK, "/debug/pprof/goroutine?debug=1": http.StatusOK, "/debug/pprof/profile?seconds=1": http.StatusOK,
		"/debug/pprof/cmdline": http.StatusNotFound, "/metrics": http.StatusNotFound, "/readyz": http.StatusNotFound,
	} {
		status, body := ask(t, profiler, http.MethodGet, path)
		assert.Equal(t, want, status, path)
		assert.NotEmpty(t, body, path)
	}
	pages := start(t, new(health))
	status, _ := ask(t, pages, http.MethodGet, "/debug/pprof/heap")
	assert.Equal(t, http.StatusNotFound, status, "the port that scrapers come to")
	_, err = admin.ListenProfiler(t.Context(), profiler.Addr(), slog.New(slog.DiscardHandler))
	assert.ErrorContains(t, err, "serve the profiler on "+profiler.Addr())
}
