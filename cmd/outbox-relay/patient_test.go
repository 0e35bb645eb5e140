package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestPatient: with --patient, a relay starts before its database can be reached, says what is missing, lives on, and leads once that is mended.
func TestPatient(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	d := newDatabase(t)
	free, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	listen := free.Addr().String()
	require.NoError(t, free.Close())

	p := startProcess(t, exec.Command(binary(t), "run", "--patient", "--listen", listen), append(d.env, "OUTBOX_RELAY_DATABASE_CONNECT_TIMEOUT=1s")...) //nolint:noctx // ended by its signals
	page := func(path string) (status int, text string) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+listen+path, http.NoBody)
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err.Error() // it does not listen yet
		}
		defer func() { assert.NoError(t, resp.Body.Close()) }()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(body)
	}
	await := func(status int, part string) {
		t.Helper()
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			got, text := page("/readyz")
			if got == status && strings.Contains(text, part) {
				return
			}
			select {
			case <-tick.C:
			case <-p.done:
				require.Fail(t, "it has ended", p.said(t))
			case <-ctx.Done():
				require.Fail(t, "waited for "+part, "%d %s", got, text)
			}
		}
	}
	await(http.StatusServiceUnavailable, "no stream: ")
	status, _ := page("/livez")
	assert.Equal(t, http.StatusOK, status)
	status, text := page("/metrics")
	assert.Equal(t, http.StatusOK, status)
	assert.Contains(t, text, "outbox_relay_leader 0\n")
	assert.Contains(t, p.said(t), "outbox-relay migrate", "the log has the remedy")

	o := invoke(t, d.env, "migrate")
	require.Equal(t, exitOK, o.code, o.err)
	await(http.StatusOK, "leading")
	_, exit := p.stop(t)
	require.NoError(t, exit)
}
