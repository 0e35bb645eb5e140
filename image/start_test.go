package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestStart: the binary of the image, on a database that is migrated, leads within a moment. The log says within which; the bound leaves room for a machine
// that has other things to do.
func TestStart(t *testing.T) {
	t.Parallel()
	binary, dsn := hostBinary(t), pgtest.Database(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	env := []string{"OUTBOX_RELAY_DATABASE_URL=" + dsn, "OUTBOX_RELAY_DATABASE_SLOT=image_start"}
	migrate := exec.CommandContext(ctx, binary, "migrate")
	migrate.Env = env
	out, err := migrate.CombinedOutput()
	require.NoError(t, err, string(out))

	free, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	listen := free.Addr().String()
	require.NoError(t, free.Close())
	cmd := exec.CommandContext(ctx, binary, "run", "--patient", "--listen", listen)
	cmd.Env = env
	began := time.Now()
	require.NoError(t, cmd.Start())
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ready(ctx, t, "http://"+listen+"/readyz") {
		select {
		case <-tick.C:
		case <-ctx.Done():
			require.NoError(t, ctx.Err())
		}
	}
	took := time.Since(began)
	t.Logf("ready after %v", took)
	assert.Less(t, took, 5*time.Second)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	assert.NoError(t, cmd.Wait(), "it was told to end, and did so cleanly")
}

func ready(ctx context.Context, t *testing.T, url string) bool {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false // it does not listen yet
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	require.NoError(t, resp.Body.Close())
	return resp.StatusCode == http.StatusOK
}
