package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestStatus: a role that may do no more than the relay sees who leads, what fails and what waits, and the process on server.listen is asked.
func TestStatus(t *testing.T) {
	t.Parallel()
	var m moods
	s := newSite(t, "queue:\n  poll: 100ms\nbreaker:\n  failures: 1000\n  failure_ratio: 0\n", m.answer, "acme", "paused")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s.asRunner(t)
	healthy, broken, strict := s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 0), s.endpoint(t, "acme", 10)
	s.subscribe(t, "acme", healthy, "order.created", "{}")
	s.subscribe(t, "acme", broken, "order.created", "{}")
	s.subscribe(t, "acme", strict, "order.changed", "{}")
	s.exec(t, `UPDATE acme.webhook_endpoints SET delivery_order = 'strict', retry_backoff_seconds = 3600 WHERE id = $1`, strict)
	s.exec(t, `UPDATE acme.webhook_endpoints SET name = E'bro\nken', endpoint_url = endpoint_url || '?key=s3cret' WHERE id = $1`, broken)
	m.set(broken, http.StatusBadRequest)
	m.set(strict, http.StatusServiceUnavailable)
	s.command(t, "tenants", "pause", "paused", "--reason", "they move house")

	out, errOut, code := s.desk(t, "status")
	require.Zero(t, code, "%s%s", out, errOut)
	assert.Contains(t, out, "nobody reads it", "nobody has ever led")
	assert.Contains(t, out, "no new delivery within the last minute")

	p := startBinary(t, binary(t), s.config, "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0", "OUTBOX_RELAY_SERVER_PPROF=127.0.0.1:0")
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 10)
	s.insertMany(t, "acme", "order.changed", 3)
	s.receiver.await(ctx, t, "the outcomes, and the health of endpoints", func() bool {
		var letters, queued, failing int
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM acme.webhook_dead_letters), (SELECT count(*) FROM outbox_relay.retry_queue WHERE leased_by IS NULL),
			(SELECT count(*) FROM outbox_relay.endpoint_health)`).Scan(&letters, &queued, &failing))
		return letters == 10 && queued == 3 && failing == 2
	})
	require.Contains(t, p.said(t), "serving the profiler")
	yaml, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.config, []byte(strings.Replace(string(yaml), `listen: ""`, "listen: "+strings.TrimPrefix(addressOf(t, p), "http://"), 1)), 0o600))

	out, errOut, code = s.desk(t, "status")
	require.Zero(t, code, "%s%s", out, errOut)
	for _, line := range []string{
		`relay +leading slot "` + s.slot + `"`, `leader +127\.0\.0\.1 for \S+, epoch 1, role runner_`, `lag +\S+ unconfirmed`, `relays +connections from 127\.0\.0\.1 \(\d+\)`,
		`rate +\S+/s; of the last minute's deliveries \S+ % of those attempted succeeded, 1 retrying, 2 pending, 10 failed`,
		`waiting +3 deliveries, next due in .* 2 parked`, `acme +` + strict.String() + ` +e2e +3 `, `blocked `, `acme +2 behind delivery \S+, attempt 1, http_5xx, due in `,
		`failing +endpoints: 2 failing`, `acme +` + broken.String() + ` +bro ken +failing for`, `dead +10 open dead letters, 10 of the last hour`, `acme +` + broken.String() + ` +bro ken +10 `,
		`tenants +1 active, 1 paused`, `paused +paused since .*: they move house`,
	} {
		assert.Regexp(t, `(?m)^ *`+line, out)
	}
	assert.NotContains(t, out, "\x1b", "no terminal, no control sequences")
	assert.NotContains(t, out, "s3cret")
	assert.NotContains(t, out, "left out")

	var report struct {
		Relay struct {
			Reachable, Ready bool
			Says             []string
		}
		Databases []struct {
			Slots []struct {
				Name   string
				Epoch  int64
				Leader struct{ Address string }
			}
			Queue struct{ Total struct{ N int } } `json:"retry_queue"`
			Flow  struct {
				PerMinute map[string]desk.Count `json:"per_minute"`
			} `json:"deliveries"`
			Endpoints struct {
				Worst []struct {
					ID     outbox.UUID
					Status struct {
						LastError string `json:"last_error"`
					}
				}
			}
			Gaps []any
		}
	}
	s.read(t, &report, "status")
	assert.True(t, report.Relay.Reachable && report.Relay.Ready, "%+v", report.Relay)
	require.Len(t, report.Databases, 1)
	d := report.Databases[0]
	assert.Empty(t, d.Gaps)
	assert.Equal(t, s.slot, d.Slots[0].Name)
	assert.Equal(t, "127.0.0.1", d.Slots[0].Leader.Address)
	assert.Equal(t, 3, d.Queue.Total.N)
	assert.Equal(t, map[string]desk.Count{"success": {N: 10}, "failed": {N: 10}, "retrying": {N: 1}, "pending": {N: 2}}, d.Flow.PerMinute)
	require.Len(t, d.Endpoints.Worst, 2)
	assert.Contains(t, d.Endpoints.Worst[0].Status.LastError, "answered ")

	_, exit := p.stop(t)
	require.NoError(t, exit)
	out, _, code = s.desk(t, "status")
	require.Zero(t, code)
	assert.Contains(t, out, "not reachable from here")
	assert.Contains(t, out, "nobody reads it, last recorded ")
}

// TestStatusSaysWhatWasLookedAt: of a burst the latest deliveries were, and what waits for receivers is not late by the relay's doing.
func TestStatusSaysWhatWasLookedAt(t *testing.T) {
	t.Parallel()
	share := .25
	var v statusView
	v.flow(&desk.Overview{Deliveries: desk.Flow{
		PerSecond: 2500, Looked: desk.Count{N: 20000, More: true}, PerMinute: map[string]desk.Count{"success": {N: 5000, More: true}, "retrying": {N: 15000, More: true}}, Success: &share,
	}})
	v.queue(&desk.Overview{Queue: desk.Queue{Total: desk.Count{N: 31}, Shut: desk.Count{N: 30}}})
	assert.Equal(t, []string{
		"rate       2,500/s; of the latest 20,000 deliveries 25 % of those attempted succeeded, 15,000 retrying",
		"waiting    31 deliveries, 30 due behind open breakers",
	}, v.lines)
}

// A role that may not know where the sessions of others come from sees how many there are.
func TestStatusOfOtherRoles(t *testing.T) {
	t.Parallel()
	var v statusView
	v.connected(&desk.Overview{Relays: []desk.Connected{{Address: "10.0.0.5", Connections: 9}, {Connections: 8}}})
	assert.Equal(t, []string{"relays     connections from 10.0.0.5 (9), other roles (8)"}, v.lines)
}

// TestCommandsOnAStandby: what a standby does not know or cannot do, its primary does.
func TestCommandsOnAStandby(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	server, err := pgtest.Start(ctx, pgtest.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, server.Close()) })
	d := database{url: server.URL("postgres"), name: "postgres"}
	d.env = []string{"OUTBOX_RELAY_DATABASE_URL=" + d.url}
	const endpoint, event = "01890000-0000-7000-8000-000000000001", "01890000-0000-7000-8000-000000000002"
	d.exec(t, "CREATE SCHEMA acme")
	d.succeed(t, "migrate")
	d.succeed(t, "tenants", "add", "acme")
	d.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
		  VALUES ('`+endpoint+`', 'x', 'https://example.com/', 'a-secret-of-16-or-more', gen_random_uuid());
		INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type) VALUES ('`+event+`', 'a.b', gen_random_uuid(), 'a')`)
	d.exec(t, "SELECT pg_drop_replication_slot('outbox_relay')") // a copy of a server has none
	require.NoError(t, server.Stop(ctx, "fast"))
	data := filepath.Join(server.Dir(), "data")
	out, err := exec.CommandContext(ctx, "cp", "-p", filepath.Join(data, "PG_VERSION"), filepath.Join(data, "standby.signal")).CombinedOutput() // -p: the owner, too
	require.NoError(t, err, string(out))
	require.NoError(t, server.Restart(ctx))

	said := d.succeed(t, "status")
	assert.Regexp(t, `(?m)^database +postgres, PostgreSQL \S+, a standby, at `, said)
	assert.Regexp(t, `(?m)^slot +not all is known: this server is a standby: ask the primary`, said)
	assert.NotContains(t, said, "is not there")
	assert.NotContains(t, said, "nobody reads it")
	assert.NotContains(t, said, "connections from nowhere")
	assert.NotRegexp(t, `"(slots|relays|recoveries|worst|blocked)": null`, d.succeed(t, "status", "-o", "json"), "what is not known is an empty list")
	d.succeed(t, "deliveries", "list")
	d.succeed(t, "events", "show", event)
	for _, command := range []string{"events explain " + event, "endpoints list", "endpoints show " + endpoint, "endpoints pause " + endpoint} {
		o := invoke(t, d.env, strings.Fields(command)...)
		assert.Equal(t, exitFailure, o.code, command)
		assert.Contains(t, o.err, "\nhint: this server is a standby: ask the primary (", command)
	}
	o := invoke(t, d.env, "tenants", "pause", "acme")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "hint: This server is a standby: let the DSN lead to the primary")
	o = invoke(t, d.env, "migrate")
	assert.Equal(t, exitFailure, o.code)
	assert.NotContains(t, o.out, "up to date")
	assert.Contains(t, o.err, "check server: the server is a standby")
	assert.Contains(t, o.err, "let the DSN lead to the primary (target_session_attrs=read-write picks it from several hosts)")
	o = invoke(t, d.env, "check")
	assert.Equal(t, exitFailure, o.code)
	assert.Regexp(t, `(?m)^FAIL  database: .*, a standby → let database.url lead to the primary`, o.out)
}

// A database that cannot be looked at is told of, and the others are shown.
func TestStatusOfSeveralDatabases(t *testing.T) {
	t.Parallel()
	one := newDatabase(t)
	one.succeed(t, "migrate")
	file := fileOf(t, "relay.yaml", fmt.Sprintf(`
databases:
  - {name: one, url: %q, slot: %s}
  - {name: away, url: "postgres://u:s3cret@127.0.0.1:1/d", slot: s2}
  - {name: bare, url: %q, slot: s3}
server: {listen: ""}
`, one.url, one.name, pgtest.Database(t)))
	o := invoke(t, nil, "status", "--config", file)
	assert.Equal(t, exitFailure, o.code)
	assert.Regexp(t, `(?m)^database +one: db\S+, PostgreSQL `, o.out)
	assert.Regexp(t, `(?m)^database +away: connect to the database: .*refused`, o.out)
	assert.Regexp(t, `(?m)^database +bare: list tenants: .*outbox-relay migrate`, o.out)
	assert.Contains(t, o.out, "check host, port and sslmode of databases.away.url")
	assert.NotContains(t, o.out+o.err, "s3cret")
	o = invoke(t, nil, "status", "--config", file, "--database", "one")
	assert.Equal(t, exitOK, o.code, o.out)

	o = invoke(t, nil, "status", "--config", file, "-o", "json")
	assert.Equal(t, exitFailure, o.code)
	var report struct {
		Databases []struct{ Name, Error, Database string }
	}
	require.NoError(t, json.Unmarshal([]byte(o.out), &report), o.out)
	require.Len(t, report.Databases, 3)
	assert.Empty(t, report.Databases[0].Error)
	assert.Equal(t, one.name, report.Databases[0].Database)
	assert.Contains(t, report.Databases[1].Error, "connect to the database")
	assert.Contains(t, o.err, "error: database away: ")
}

func TestWatchedStatusEndsWithoutAFault(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.succeed(t, "migrate")
	for output, begins := range map[string]string{"text": "20", "json": `{"at":"20`} {
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), binary(t), "status", "--watch", "--interval", "100ms", "-o", output)
		cmd.Env = append(d.env, "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0")
		var said bytes.Buffer
		cmd.Stderr = &said
		stdout, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		lines, frames := bufio.NewScanner(stdout), 0
		lines.Buffer(nil, 1<<20)
		for frames < 3 && lines.Scan() {
			if strings.HasPrefix(lines.Text(), begins) {
				frames++
			}
			assert.NotContains(t, lines.Text(), "\x1b")
		}
		require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
		for lines.Scan() { // to the end of the process
		}
		require.NoError(t, cmd.Wait(), said.String())
		assert.Empty(t, said.String())
		assert.Equal(t, 3, frames)
	}
}

func TestScreen(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	width, height := 80, 4
	s := &screen{out: &out, size: func() (int, int) { return width, height }}
	at := time.Date(2026, 11, 26, 8, 0, 0, 0, time.UTC)
	take := func() string {
		defer out.Reset()
		return out.String()
	}
	require.NoError(t, s.draw(at, []string{"a", "b"}))
	first := take()
	assert.True(t, strings.HasPrefix(first, enterScreen+clearScreen+topLeft+"outbox-relay status  2026-11-26 08:00:00Z"), "%q", first)
	require.NoError(t, s.draw(at, []string{"a", "b"}))
	second := take()
	assert.NotContains(t, second, clearScreen, "it would flicker")
	assert.True(t, strings.HasSuffix(second, clearLine+"\r\na"+clearLine+"\r\nb"+clearLine+clearBelow), "%q", second)
	require.NoError(t, s.draw(at, []string{"a", "b", "c", "d", "e"}))
	third := take()
	assert.Equal(t, height-1, strings.Count(third, "\n"), "no more than there is room for: %q", third)
	assert.Contains(t, third, "… 3 more lines")
	width = 40
	require.NoError(t, s.draw(at, []string{"a"}))
	assert.Contains(t, take(), clearScreen, "the window has another size")
	s.close()
	assert.Equal(t, leaveScreen+"a\n", take())

	(&screen{out: &out, size: s.size}).close()
	assert.Empty(t, take(), "a screen that was not entered is not left")
}

func TestRelayIsAskedOnThisMachine(t *testing.T) {
	t.Parallel()
	for listen, want := range map[string]string{
		":1": "127.0.0.1:1", "0.0.0.0:1": "127.0.0.1:1", "[::]:1": "[::1]:1", "127.0.0.1:1": "127.0.0.1:1", "": "", "127.0.0.1:0": "",
	} {
		assert.Equal(t, statusRelay{Address: want}, askRelay(t.Context(), listen), listen)
	}
}
