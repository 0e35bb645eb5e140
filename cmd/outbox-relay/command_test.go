package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// database is a fresh database with the environment that leads to it. Slots belong to the whole server: each database has its own.
type database struct {
	url, name string
	env       []string
}

func newDatabase(t *testing.T) database {
	t.Helper()
	url := pgtest.Database(t)
	cfg, err := pgx.ParseConfig(url)
	require.NoError(t, err)
	d := database{url: url, name: cfg.Database}
	d.env = []string{"OUTBOX_RELAY_DATABASE_URL=" + url, "OUTBOX_RELAY_DATABASE_SLOT=" + d.name}
	return d
}

func (d database) exec(t *testing.T, sql string) {
	t.Helper()
	execOn(t, d.url, sql)
}

func execOn(t *testing.T, url, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close(context.WithoutCancel(t.Context()))) }()
	_, err = conn.Exec(t.Context(), sql)
	require.NoError(t, err, sql)
}

// succeed runs a command that must end well and returns what it printed.
func (d database) succeed(t *testing.T, args ...string) string {
	t.Helper()
	o := invoke(t, d.env, args...)
	require.Equal(t, exitOK, o.code, "%v\n%s%s", args, o.out, o.err)
	return o.out
}

func TestExitCodesOfWrongCommandLines(t *testing.T) {
	t.Parallel()
	db := "OUTBOX_RELAY_DATABASE_URL=" + dsn
	for name, tc := range map[string]struct {
		env  string
		args string
		code int
		err  string
	}{
		"nothing":           {args: "", code: exitUsage, err: "error: a command is missing: there are"},
		"unknown command":   {args: "migrat", code: exitUsage, err: "Did you mean this?\n\tmigrate"},
		"unknown tenants":   {args: "tenants ad x", code: exitUsage, err: `unknown command "ad" for "outbox-relay tenants"`},
		"unknown flag":      {args: "run --lisen x", code: exitUsage, err: "unknown flag: --lisen\nhint: see outbox-relay run --help"},
		"too many":          {args: "run now", code: exitUsage, err: `unknown command "now"`},
		"no schema":         {args: "tenants add", code: exitUsage, err: "name one schema, not 0"},
		"bad time":          {env: db, args: "tenants add x --since yesterday", code: exitUsage, err: `"yesterday" for "--since" flag: write a time with its zone, such as 20`},
		"both backfills":    {env: db, args: "tenants add x --unprocessed --since 2026-01-01T00:00:00Z", code: exitUsage, err: "exclude each other"},
		"days ago":          {env: "OUTBOX_RELAY_DATABASE_URL=postgres://u@127.0.0.1:1/d", args: "tenants add x --since 2d", code: exitFailure, err: "connection refused"},
		"not reached":       {env: "OUTBOX_RELAY_DATABASE_URL=postgres://u@127.0.0.1:1/d", args: "run --listen=", code: exitFailure, err: "hint: check host, port and sslmode of database.url"},
		"help for nothing":  {args: "help foo", code: exitUsage, err: `unknown command "foo" for "outbox-relay"`},
		"help for no such":  {args: "help tenants foo", code: exitUsage, err: `unknown command "foo" for "outbox-relay tenants"`},
		"unknown shell":     {args: "completion foo", code: exitUsage, err: `unknown command "foo" for "outbox-relay completion": there are bash, fish, powershell, zsh`},
		"no shell":          {args: "completion", code: exitUsage, err: "a command is missing: there are bash, fish"},
		"shell":             {args: "completion bash", code: exitOK},
		"help for help":     {args: "help", code: exitOK},
		"help for one":      {args: "help tenants add", code: exitOK},
		"bad output":        {env: db, args: "tenants list -o xml", code: exitUsage, err: `invalid argument "xml" for "-o, --output" flag: must be table or json`},
		"bad interval":      {env: db, args: "status --watch --interval 1ms", code: exitUsage, err: "--interval 1ms: must be 100ms or more"},
		"no database":       {args: "run", code: exitUsage, err: "database.url: is required: give --database-url, OUTBOX_RELAY_DATABASE_URL or database.url in the file"},
		"no file":           {args: "config --config /nonexistent.yaml", code: exitUsage, err: "no such file"},
		"misspelt variable": {env: "OUTBOX_RELAY_DATABSE_URL=x", args: "check", code: exitUsage, err: "did you mean OUTBOX_RELAY_DATABASE_URL?"},
		"bad level":         {env: db, args: "migrate --log-level loud", code: exitUsage, err: `log.level: "loud": must be debug, info, warn or error`},
		"help":              {args: "tenants add --help", code: exitOK},
		"version":           {args: "version", code: exitOK},
		"--version":         {args: "--version", code: exitOK},
		"config":            {env: db, args: "config", code: exitOK},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := invoke(t, []string{tc.env}, strings.Fields(tc.args)...)
			assert.Equal(t, tc.code, o.code, "%s%s", o.out, o.err)
			if tc.err == "" {
				assert.Empty(t, o.err)
			} else {
				assert.Contains(t, o.err, tc.err)
			}
		})
	}
}

func TestHelpOfEveryCommandHasAnExample(t *testing.T) {
	t.Parallel()
	for _, command := range []string{
		"run", "migrate", "check", "config", "metrics", "tenants add", "tenants list", "tenants remove", "tenants pause", "tenants resume", "status",
	} {
		o := invoke(t, nil, append(strings.Fields(command), "--help")...)
		assert.Contains(t, o.out, "Examples:", command)
		for line := range strings.Lines(o.out) {
			assert.LessOrEqual(t, len(line), 101, "%s: too long for a terminal: %s", command, line)
		}
	}
	root := invoke(t, nil, "--help")
	assert.Contains(t, root.out, "Exit codes: 0 done, 1 failure, 2 usage or configuration.")
}

func TestEnvironmentAloneConfigures(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(file, []byte("delivery: {workers: 100, endpoint_concurrency: 10}\nnetwork: {ports: [443]}\nlog: {level: warn}\n"), 0o600))
	o := invoke(t, []string{
		"OUTBOX_RELAY_DATABASE_URL=postgres://relay:s3cret@localhost/app",
		"OUTBOX_RELAY_DELIVERY_WORKERS=200",
		"OUTBOX_RELAY_DELIVERY_DEFAULT_TIMEOUT=45s",
		"OUTBOX_RELAY_WINDOW_BYTES=128MiB",
		"OUTBOX_RELAY_NETWORK_ALLOW=10.0.0.0/8, fd00::/8",
		"OUTBOX_RELAY_TENANTS_AUTO_ADOPT=tenant_*,admin",
		"OUTBOX_RELAY_RETRY_MULTIPLIER=1.5",
		"OUTBOX_RELAY_DELIVERY_ALLOW_INSECURE_TLS=true",
		"OUTBOX_RELAY_LOG_LEVEL=error",
		"OUTBOX_RELAY_SERVER_LISTEN=", // counts as not set
		"OUTBOX_RELAY_NETWORK_PORTS=",
	}, "config", "--config", file, "--log-level", "debug")
	require.Equal(t, exitOK, o.code, o.err)
	for _, line := range []string{
		"url: postgres://relay:xxxxx@localhost/app", "workers: 200", "endpoint_concurrency: 10", "default_timeout: 45s", "bytes: 128MiB",
		"allow: [10.0.0.0/8, 'fd00::/8']", "ports: [443]", "auto_adopt: [tenant_*, admin]", "multiplier: 1.5", "allow_insecure_tls: true", "level: debug", "listen: 127.0.0.1:9464",
	} {
		assert.Contains(t, o.out, "  "+line+"\n")
	}
	o = invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + dsn, "OUTBOX_RELAY_NETWORK_PORTS=443,"}, "config")
	assert.Equal(t, exitUsage, o.code, o.out)
	assert.Contains(t, o.err, `network.ports: "": is an empty entry of the list: leave it out`)
}

func TestConfigHidesTheUserOfAProxy(t *testing.T) {
	t.Parallel()
	for proxy, want := range map[string]string{
		"http://s3cret@proxy:3128": "http://xxxxx@proxy:3128", "http://user:s3cret@proxy:3128": "http://user:xxxxx@proxy:3128", "http://proxy:3128": "http://proxy:3128",
	} {
		o := invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=postgres://h/x", "OUTBOX_RELAY_NETWORK_PROXY=" + proxy}, "config")
		assert.Equal(t, exitOK, o.code, o.err)
		assert.Contains(t, o.out, "  proxy: "+want+"\n")
	}
}

func TestConfigFileByVariable(t *testing.T) {
	t.Parallel()
	write := func(workers string) string {
		file := filepath.Join(t.TempDir(), "relay.yaml")
		require.NoError(t, os.WriteFile(file, []byte("database: {url: 'postgres://h/x'}\ndelivery: {workers: "+workers+"}\n"), 0o600))
		return file
	}
	env := []string{"OUTBOX_RELAY_CONFIG=" + write("11")}
	o := invoke(t, env, "config")
	require.Equal(t, exitOK, o.code, o.err)
	assert.Contains(t, o.out, "  workers: 11\n")
	o = invoke(t, env, "config", "--config", write("12"))
	assert.Contains(t, o.out, "  workers: 12\n")
}

func TestConfigPrintsAndListsFaults(t *testing.T) {
	t.Parallel()
	o := invoke(t, []string{"OUTBOX_RELAY_DELIVERY_DEFAULT_TIMEOUT=30", "OUTBOX_RELAY_WINDOW_BYTES=-1MiB"}, "config")
	assert.Equal(t, exitUsage, o.code)
	assert.Contains(t, o.out, "default_timeout: 30s", "what could be read is printed all the same")
	assert.Contains(t, o.err, "configuration: 3 faults:")
	assert.Contains(t, o.err, "delivery.default_timeout: 30: has no unit: write 30s")
}

func TestMigratePrintNeedsNoDatabase(t *testing.T) {
	t.Parallel()
	o := invoke(t, []string{"OUTBOX_RELAY_DATABASE_SLOT=my_slot"}, "migrate", "--print")
	require.Equal(t, exitOK, o.code, o.err)
	assert.Contains(t, o.out, "CREATE PUBLICATION outbox_relay_events")
	assert.Contains(t, o.out, "pg_create_logical_replication_slot(''my_slot'', ''pgoutput''")
	o = invoke(t, []string{"OUTBOX_RELAY_DATABASE_SLOT=My Slot"}, "migrate", "--print")
	assert.Equal(t, exitUsage, o.code)
	assert.NotContains(t, o.err, "database.url")
}

func TestUnreachableDatabase(t *testing.T) {
	t.Parallel()
	const nobody = "127.0.0.1:1" // which no other test is given
	missing := pgtest.Shared(t).URL("nosuchdatabase")
	for name, tc := range map[string]struct{ url, hint string }{
		"port":     {"postgres://relay:s3cret@" + nobody + "/app", "check host, port and sslmode of database.url"},
		"host":     {"postgres://relay:s3cret@nosuchhost.invalid/app", "check the host name in database.url"},
		"database": {missing, "check the name of the database in database.url"},
	} {
		for _, command := range []string{"migrate", "tenants list", "tenants add x", "check"} {
			t.Run(name+" "+command, func(t *testing.T) {
				t.Parallel()
				o := invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + tc.url}, strings.Fields(command)...)
				assert.Equal(t, exitFailure, o.code, o.err)
				assert.Contains(t, o.out+o.err, "connect to the database: ")
				assert.Contains(t, o.out+o.err, tc.hint)
				assert.NotContains(t, o.out+o.err, "s3cret")
			})
		}
	}
}

func TestTenantsAreCompleted(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.succeed(t, "migrate")
	d.exec(t, "CREATE SCHEMA acme")
	d.succeed(t, "tenants", "add", "acme")
	for _, line := range []string{"deliveries list --tenant", "tenants pause", "endpoints show -t", "endpoints show 0190c2f6-0000-7000-8000-000000000001 -t"} {
		assert.Contains(t, d.succeed(t, append(append([]string{"__complete"}, strings.Fields(line)...), "")...), "acme\tactive\n:4\n", line)
	}
	o := invoke(t, nil, "__complete", "tenants", "pause", "")
	assert.Equal(t, ":4\n", o.out, "no database, nothing to offer")
	assert.Equal(t, ":4\n", d.succeed(t, "__complete", "tenants", "pause", "acme", ""), "it takes one")
}

// Times are read as text: what a role or database has set for them must not count.
func TestTimesAreReadWhateverTheDateStyle(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.exec(t, "CREATE SCHEMA acme; ALTER DATABASE "+d.name+" SET datestyle = 'German'; ALTER DATABASE "+d.name+" SET timezone = 'Europe/Berlin'")
	d.succeed(t, "migrate")
	d.succeed(t, "tenants", "add", "acme", "--since", "2026-01-02T03:04:05Z")
	assert.Regexp(t, `acme +active +20\S+Z +since 2026-01-02T03:04:05Z, under way`, d.succeed(t, "tenants", "list"))
	assert.Contains(t, d.succeed(t, "__complete", "tenants", "pause", ""), "acme\tactive\n:4\n")
	assert.Contains(t, d.succeed(t, "status"), "queues earlier events: since")
	assert.Contains(t, d.succeed(t, "check"), "ok    clock: ")
}

// A pooler may give the session to an application next.
func TestConnectionsOfCommandsSetNothing(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, "ALTER DATABASE "+d.name+" SET datestyle = 'German'")
	conn, err := dial(t.Context(), "database.url", d.url, 10*time.Second, nil)
	require.NoError(t, err)
	defer func() { assert.NoError(t, hangUp(t.Context(), conn)) }()
	_, err = schema.Tenants(t.Context(), lent(conn))
	require.NoError(t, err)
	var now time.Time
	require.NoError(t, lent(conn).QueryRow(t.Context(), "SELECT now()").Scan(&now))
	var jit string
	require.NoError(t, lent(conn).QueryRow(t.Context(), "SHOW jit").Scan(&jit))
	assert.Equal(t, "off", jit)
	var set []string
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT ARRAY(SELECT name FROM pg_settings WHERE source = 'session'
		UNION ALL SELECT statement FROM pg_prepared_statements)`).Scan(&set))
	assert.Empty(t, set)
}

func TestTenantsFromFirstToLast(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.exec(t, `CREATE SCHEMA acme; CREATE SCHEMA "Big-Corp"`)

	o := invoke(t, d.env, "tenants", "add", "acme")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "Run: outbox-relay migrate")

	out := d.succeed(t, "migrate")
	assert.Contains(t, out, "… replication slot "+d.name)
	assert.Contains(t, out, "The database is up to date.")
	d.succeed(t, "migrate") // again
	assert.Contains(t, d.succeed(t, "tenants", "list"), "No tenants yet")

	out = d.succeed(t, "tenants", "add", "acme")
	assert.Contains(t, out, "acme is a tenant\n")
	d.succeed(t, "tenants", "add", "acme") // again
	d.succeed(t, "tenants", "add", "Big-Corp", "--since", "2026-01-02T03:04:05+01:00")
	d.exec(t, `UPDATE outbox_relay.tenants SET since = '2026-01-01', state_since = '2026-01-01'`)
	d.succeed(t, "tenants", "pause", "acme", "--reason", "it moves & grows")

	out = d.succeed(t, "tenants", "list")
	assert.Regexp(t, `SCHEMA +STATE +SINCE +EARLIER EVENTS +REASON\n`, out)
	assert.Regexp(t, `acme +paused +20\S+Z +- +it moves & grows\n`, out)
	assert.NotRegexp(t, `acme +paused +2026-01-01`, out)
	assert.Regexp(t, `Big-Corp +active +2026-01-01T00:00:00Z +since 2026-01-02T02:04:05Z, under way +-\n`, out)

	text := d.succeed(t, "tenants", "list", "-o", "json")
	assert.Contains(t, text, `"it moves & grows"`)
	assert.Equal(t, 2, strings.Count(text, `"added_at": "2026-01-01T00:00:00Z"`))
	assert.Equal(t, 1, strings.Count(text, `"since": "2026-01-01T00:00:00Z"`))
	d.exec(t, `UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'a column is gone', backfill_from = added_snapshot WHERE schema = 'acme'`)
	assert.Equal(t, "acme is suspended, and paused once that is over\n", d.succeed(t, "tenants", "pause", "acme", "--reason", "it moves"))
	assert.Regexp(t, `acme +suspended, paused +20\S+Z +- +a column is gone; paused: it moves\n`, d.succeed(t, "tenants", "list"))
	var list []map[string]any
	require.NoError(t, json.Unmarshal([]byte(d.succeed(t, "tenants", "list", "-o", "json")), &list))
	assert.Equal(t, []any{"suspended", "a column is gone", true, "it moves"}, []any{list[1]["state"], list[1]["reason"], list[1]["paused"], list[1]["pause_reason"]})

	d.succeed(t, "tenants", "resume", "acme")
	list = nil
	require.NoError(t, json.Unmarshal([]byte(d.succeed(t, "tenants", "list", "-o", "json")), &list))
	require.Len(t, list, 2)
	assert.Equal(t, "active", list[1]["state"])
	assert.Equal(t, "2026-01-02T02:04:05Z", list[0]["backfill_since"])

	o = invoke(t, d.env, "tenants", "remove", "acme") // nobody to ask: standard input is no terminal
	assert.Equal(t, exitUsage, o.code)
	assert.Contains(t, o.err, "there is nobody to ask: say --yes\n")
	assert.Regexp(t, `acme +active`, d.succeed(t, "tenants", "list"))
	assert.Contains(t, d.succeed(t, "tenants", "remove", "acme", "--yes"), "acme is no tenant any more")
	o = invoke(t, d.env, "tenants", "remove", "acme", "--yes")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "outbox-relay tenants list")
	o = invoke(t, d.env, "tenants", "add", "nosuch")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, `schema "nosuch" does not exist`)
}

// TestAddDoesNotSendAgain: the relay leaves processed_at as it is, and forgets after a while what it has delivered.
func TestAddDoesNotSendAgain(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.exec(t, `CREATE SCHEMA acme`)
	d.succeed(t, "migrate")
	d.succeed(t, "tenants", "add", "acme")
	event := func(age string) {
		d.exec(t, `INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type, occurred_at)
			VALUES ('order.created', gen_random_uuid(), 'order', now() - interval '`+age+`')`)
	}
	event("89 days") // retention.deliveries is 90
	d.succeed(t, "tenants", "add", "acme", "--unprocessed")
	event("91 days")
	d.succeed(t, "tenants", "add", "acme")
	for _, back := range [][]string{{"--unprocessed"}, {"--since", "91d"}, {"--unprocessed"}} {
		again := append([]string{"tenants", "add", "acme"}, back...)
		o := invoke(t, d.env, again...)
		assert.Equal(t, exitFailure, o.code)
		assert.Contains(t, o.err, "would be sent again")
		assert.Contains(t, o.err, "--since 20")
		assert.Contains(t, o.err, "--yes")
		d.exec(t, `UPDATE acme.webhook_events SET occurred_at = '-infinity'`) // is no time, but long ago
	}
	d.exec(t, `UPDATE outbox_relay.tenants SET backfill_done_at = now()`) // no relay runs that would do it
	d.succeed(t, "tenants", "add", "acme", "--unprocessed", "--yes")
}

func TestTenantLeftOutByIncludeIsSaid(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.exec(t, `CREATE SCHEMA acme`)
	d.succeed(t, "migrate")
	d.env = append(d.env, "OUTBOX_RELAY_TENANTS_INCLUDE=other*")
	assert.Contains(t, d.succeed(t, "tenants", "add", "acme"), "tenants.include does not name it")
	o := invoke(t, d.env, "check")
	assert.Contains(t, o.out, "warn  tenants: 0 of 1 registered are served → mend tenants.include: other*\n")
}

func TestRemoveAsksAPerson(t *testing.T) {
	t.Parallel()
	for answer, want := range map[string]bool{"y\n": true, "YES\n": true, "n\n": false, "\n": false, "": false, "y": false} {
		in, out, err := os.Pipe()
		require.NoError(t, err)
		_, err = out.WriteString(answer)
		require.NoError(t, err)
		require.NoError(t, out.Close())
		var asked strings.Builder
		a := app{in: in, err: &asked}
		assert.Equal(t, want, a.confirm("Really? "), "%q", answer)
		assert.Equal(t, "Really? ", asked.String())
		require.NoError(t, in.Close())
	}
}

func TestLogFormats(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{"json": `"msg":"slow","took":"1.5s"}`, "auto": `"took":"1.5s"`, "text": "msg=slow took=1.5s"} {
		var out strings.Builder
		var level slog.LevelVar
		log, _ := newLogger(&out, logging{Level: "warn", Format: format}, &level)
		log.Info("left out")
		log.Warn("slow", "took", 1500*time.Millisecond)
		assert.Contains(t, out.String(), want, format)
		assert.NotContains(t, out.String(), "left out")
		level.Set(slog.LevelDebug)
		log.Debug("let in")
		assert.Contains(t, out.String(), "let in", "the level changes while it is in use")
	}
}

func TestRunServesHealthAndStopsOnSignal(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.succeed(t, "migrate")
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()),
		binary(t), "run", "--listen", "127.0.0.1:0", "--log-format", "json")
	cmd.Env = d.env
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	logs := json.NewDecoder(stderr)
	var line struct{ Msg, Address string }
	for line.Address == "" {
		require.NoError(t, logs.Decode(&line))
	}
	rest := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, io.MultiReader(logs.Buffered(), stderr))
		rest <- err
	}()

	get := func(path string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+line.Address+path, http.NoBody)
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer func() { assert.NoError(t, resp.Body.Close()) }()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(body)
	}
	status, _ := get("/livez")
	assert.Equal(t, http.StatusOK, status)
	require.Eventually(t, func() bool { status, _ := get("/readyz"); return status == http.StatusOK }, 20*time.Second, 50*time.Millisecond)
	_, body := get("/metrics")
	assert.Contains(t, body, "outbox_relay_")
	assert.Contains(t, body, "go_goroutines")

	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, <-rest)
	assert.NoError(t, cmd.Wait())
}

func TestSecondSignalSkipsTheDrain(t *testing.T) {
	t.Parallel()
	reached, over := make(chan struct{}), make(chan struct{})
	hanging := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		reached <- struct{}{}
		<-over
	}))
	t.Cleanup(hanging.Close)
	t.Cleanup(func() { close(over) })
	d := installed(t)
	d.exec(t, fmt.Sprintf(`
		INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
		VALUES ('00000000-0000-0000-0000-000000000001', 'hanging', '%s', 'a-secret-of-16-or-more', gen_random_uuid());
		INSERT INTO acme.webhook_event_types (id, event_type, category, display_name)
		VALUES ('00000000-0000-0000-0000-00000000000a', 'order.created', 'order', 'Order created');
		INSERT INTO acme.webhook_subscriptions (endpoint_id, event_type_id, event_type)
		VALUES ('00000000-0000-0000-0000-000000000001', '00000000-0000-0000-0000-00000000000a', 'order.created');
		INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('order.created', gen_random_uuid(), 'order')`, hanging.URL))
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), binary(t), "run", "--listen", "")
	cmd.Env = append(d.env, "OUTBOX_RELAY_SHUTDOWN_DRAIN=1h", "OUTBOX_RELAY_WINDOW_HOLD=1h", "OUTBOX_RELAY_NETWORK_ALLOW=127.0.0.0/8")
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	<-reached
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	log := bufio.NewScanner(stderr)
	for log.Scan() && !strings.Contains(log.Text(), `"msg":"stopping"`) {
	}
	second := time.Now()
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	for log.Scan() { // to the end of the process
	}
	require.NoError(t, log.Err())
	require.NoError(t, cmd.Wait())
	assert.Less(t, time.Since(second), 30*time.Second)

	conn, err := pgx.Connect(t.Context(), d.url)
	require.NoError(t, err)
	defer func() { assert.NoError(t, conn.Close(context.WithoutCancel(t.Context()))) }()
	var queued int
	require.NoError(t, conn.QueryRow(t.Context(), "SELECT count(*) FROM outbox_relay.retry_queue").Scan(&queued))
	assert.Equal(t, 1, queued, "what was cut off is deferred")
}

func TestRunFailsWithTheRemedy(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	o := invoke(t, d.env, "run", "--listen", "")
	assert.Equal(t, exitFailure, o.code, o.err)
	assert.Contains(t, o.err, "outbox-relay migrate")

	taken, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { assert.NoError(t, taken.Close()) }()
	o = invoke(t, d.env, "run", "--listen", taken.Addr().String())
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "error: serve health and metrics on "+taken.Addr().String())
}
