package main

import (
	"context"
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
	s := &site{receiver: newReceiver(t, always(http.StatusOK))}                                                                                                // nothing is delivered
	p := startProcess(t, exec.Command(binary(t), "run", "--patient", "--listen", "127.0.0.1:0"), append(d.env, "OUTBOX_RELAY_DATABASE_CONNECT_TIMEOUT=1s")...) //nolint:noctx // ended by its signals
	p.awaitReady(ctx, t, s, http.StatusServiceUnavailable, "no stream: ")
	status, _ := p.page(ctx, t, s, "/livez")
	assert.Equal(t, http.StatusOK, status)
	status, text := p.page(ctx, t, s, "/metrics")
	assert.Equal(t, http.StatusOK, status)
	assert.Contains(t, text, "outbox_relay_leader 0\n")
	s.receiver.await(ctx, t, "the remedy in the log", func() bool { return strings.Contains(p.said(t), "outbox-relay migrate") })

	o := invoke(t, d.env, "migrate")
	require.Equal(t, exitOK, o.code, o.err)
	p.awaitReady(ctx, t, s, http.StatusOK, "leading")
	_, exit := p.stop(t)
	require.NoError(t, exit)
}
