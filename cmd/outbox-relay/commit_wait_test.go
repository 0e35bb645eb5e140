package main

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestCommitsThatWaitForAStandby: while the synchronous standby is away, a relay that begins to lead, one that leads, check and status say what is waited for, with
// no right to see what other roles do; who may see that is told of the relay's commits as well.
func TestCommitsThatWaitForAStandby(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	server, err := pgtest.Start(ctx, pgtest.Options{Durable: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := newSiteOn(t, server.URL("postgres"), "", always(http.StatusOK), "acme")
	s.asRunner(t)
	s.route(t)
	t.Cleanup(func() { // or nothing that follows comes to an end
		_, err := s.pool.Exec(context.Background(), "ALTER SYSTEM RESET synchronous_standby_names")
		require.NoError(t, err)
		_, err = s.pool.Exec(context.Background(), "SELECT pg_reload_conf()")
		require.NoError(t, err)
	})
	standby := func(setting string) {
		s.exec(t, "ALTER SYSTEM "+setting)
		s.exec(t, "SELECT pg_reload_conf()")
		s.receiver.await(ctx, t, setting, func() bool {
			var names string
			require.NoError(t, s.pool.QueryRow(ctx, `SELECT current_setting('synchronous_standby_names')`).Scan(&names))
			return (names != "") == strings.HasPrefix(setting, "SET")
		})
	}
	const waits = `commits wait for a synchronous standby \(synchronous_standby_names = "nosuch"\)`
	const told = `"msg":"commits wait for a synchronous standby"`

	// statuses are those that the relay's role and a superuser are shown. The one that is asked first has had the time to see it.
	statuses := func() (screens []string, reports []json.RawMessage) {
		for _, args := range [][]string{{"status"}, {"status", "--database-url", s.dsn}} {
			out, _, code := s.desk(t, args...)
			assert.Zero(t, code, out)
			screens = append(screens, out)
			var report struct {
				Databases []struct {
					Wait json.RawMessage `json:"commit_wait"`
				}
			}
			s.read(t, &report, args...)
			reports = append(reports, report.Databases[0].Wait)
		}
		return screens, reports
	}
	saysNothing := func() {
		t.Helper()
		screens, reports := statuses()
		for i := range screens {
			assert.NotContains(t, screens[i], "standby")
			assert.JSONEq(t, "null", string(reports[i]))
		}
	}
	const hint = "look after the standby, or take it off the server's synchronous_standby_names; nothing is lost meanwhile, and what is sent may be sent again"
	saysWaits := func() {
		t.Helper()
		screens, reports := statuses()
		for i := range screens {
			assert.Regexp(t, `(?m)^commits +`+strings.TrimPrefix(waits, "commits ")+`\n +`+hint+`$`, screens[i])
			assert.Regexp(t, `^\{\s*"commits": [1-9]\d*,\s*"synchronous_standby_names": "nosuch",\s*"hint": "`+hint+`"\s*\}$`, string(reports[i]))
		}
	}

	out, _, _ := s.desk(t, "check")
	assert.NotContains(t, out, "synchronous standby")
	saysNothing()
	standby("SET synchronous_standby_names = 'nosuch'")
	out, _, _ = s.desk(t, "check")
	assert.Contains(t, out, `warn  synchronous standby: synchronous_standby_names = "nosuch", and none of these is connected → look after the standby`)
	p := startBinary(t, binary(t), s.config, "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0")
	p.awaitReady(ctx, t, s, http.StatusServiceUnavailable, `starting; `+waits+`$`)
	s.receiver.await(ctx, t, "the log", func() bool { return strings.Contains(p.said(t), told) })
	saysWaits()
	standby("RESET synchronous_standby_names")
	p.awaitReady(ctx, t, s, http.StatusOK, `leading slot "\w+"$`)

	standby("SET synchronous_standby_names = 'nosuch'")
	out, _, _ = s.desk(t, "check")
	assert.NotContains(t, out, "synchronous standby", "that one replicates is known, and not whether it is the standby")
	insert := make(chan error, 1)
	go func() {
		_, err := s.pool.Exec(ctx, `INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('order.created', gen_random_uuid(), 'a')`)
		insert <- err
	}()
	p.awaitReady(ctx, t, s, http.StatusOK, `leading slot "\w+"; `+waits+`$`)
	s.receiver.await(ctx, t, "the log", func() bool { return strings.Count(p.said(t), told) == 2 })
	saysWaits()
	out, _, _ = s.desk(t, "check")
	assert.Regexp(t, `(?m)^warn  synchronous standby: `+waits+` → look after the standby`, out)
	standby("RESET synchronous_standby_names")
	require.NoError(t, <-insert)
	p.awaitReady(ctx, t, s, http.StatusOK, `leading slot "\w+"$`)
	assert.Equal(t, 2, strings.Count(p.said(t), told), "once in each wait")
	saysNothing()
	_, exit := p.stop(t)
	require.NoError(t, exit)
}
