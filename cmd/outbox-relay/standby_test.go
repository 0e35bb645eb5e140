package main

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// follower is a server that follows another one, of which it was a copy.
func follower(ctx context.Context, t *testing.T, primary *pgtest.Server) *pgtest.Server {
	t.Helper()
	second, err := pgtest.Start(ctx, pgtest.Options{Config: map[string]string{
		"primary_conninfo": fmt.Sprintf("host=127.0.0.1 port=%d user=postgres", primary.Port()), "wal_retrieve_retry_interval": "100ms",
	}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, second.Close()) })
	require.NoError(t, second.Stop(ctx, "immediate"))
	require.NoError(t, primary.Stop(ctx, "fast"))
	script := `set -e; cp -p "$2/postgresql.conf" "$2.conf"; rm -rf "$2"; cp -a "$1" "$2"; mv "$2.conf" "$2/postgresql.conf"; rm -rf "$2/postmaster.pid" "$2"/pg_replslot/*
		cp -p "$2/PG_VERSION" "$2/standby.signal"`
	out, err := exec.CommandContext(ctx, "sh", "-c", script, "sh", filepath.Join(primary.Dir(), "data"), filepath.Join(second.Dir(), "data")).CombinedOutput()
	require.NoError(t, err, string(out))
	require.NoError(t, primary.Restart(ctx))
	require.NoError(t, second.Restart(ctx))
	return second
}

// TestRelayThatReachesAStandby: it says so, and heals nothing there, be it the stream or the pool that leads to one; it waits until that is the primary. With a DSN
// that has both hosts and target_session_attrs it is not led there, and follows a failover by itself.
func TestRelayThatReachesAStandby(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	primary, err := pgtest.Start(ctx, pgtest.Options{Durable: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, primary.Close()) })
	s := newSiteOn(t, primary.URL("postgres"), "", always(http.StatusOK), "acme")
	s.route(t)
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	_, exit := p.stop(t)
	require.NoError(t, exit)
	s.pool.Reset()
	second := follower(ctx, t, primary)

	hosts := fmt.Sprintf("127.0.0.1:%d,127.0.0.1:%d", second.Port(), primary.Port())
	relay := func(url, stream string) *relayProcess {
		return startBinary(t, binary(t), s.config, "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0", "OUTBOX_RELAY_DATABASE_URL="+url, "OUTBOX_RELAY_DATABASE_REPLICATION_URL="+stream)
	}
	const hint = ` lead to the primary: target_session_attrs=read-write picks it from several hosts"`
	const claiming = `"msg":"claiming due deliveries does not succeed, trying again"`
	for what, p := range map[string]*relayProcess{
		`check server: the server is a standby`:   relay("postgres://postgres@"+hosts+"/postgres", ""),
		`the server of database.url is a standby`: relay(second.URL("postgres"), primary.URL("postgres")),
	} {
		p.awaitReady(ctx, t, s, http.StatusServiceUnavailable, `no stream: `+what+`$`)
		s.receiver.await(ctx, t, "another try", func() bool { return strings.Count(p.said(t), `"msg":"the stream has ended, starting again"`) > 1 })
		assert.Contains(t, p.said(t), hint)
		assert.NotContains(t, p.said(t), "healing")
		s.receiver.await(ctx, t, "the claimer", func() bool { return strings.Contains(p.said(t), claiming) })
		assert.Regexp(t, claiming+`.*`+hint, p.said(t), "whichever of the two lines is seen")
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}

	waits := relay(second.URL("postgres"), "")
	waits.awaitReady(ctx, t, s, http.StatusServiceUnavailable, `no stream: `)
	follows := relay("postgres://postgres@"+hosts+"/postgres?target_session_attrs=read-write", "")
	follows.awaitReady(ctx, t, s, http.StatusOK, `leading slot `)
	require.NoError(t, primary.Kill(ctx))
	conn, err := pgx.Connect(ctx, second.URL("postgres"))
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close(context.WithoutCancel(ctx))) }()
	_, err = conn.Exec(ctx, "SELECT pg_promote(true, 30)")
	require.NoError(t, err)
	_, err = conn.Exec(ctx, `INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('order.created', gen_random_uuid(), 'a')`)
	require.NoError(t, err)
	for _, p := range []*relayProcess{waits, follows} {
		p.awaitReady(ctx, t, s, http.StatusOK, `(leading slot|standing by: another relay leads) `)
	}
	s.receiver.await(ctx, t, "the event", func() bool {
		s.receiver.mu.Lock()
		defer s.receiver.mu.Unlock()
		return len(s.receiver.arrivals) > 0
	})
}
