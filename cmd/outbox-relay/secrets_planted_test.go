package main

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

// trove are the secrets of a run, by what they are, and all that was printed, logged, served and recorded in it.
type trove struct {
	secrets map[string][]string // each in the forms it could turn up in
	said    map[string]string   // by where
}

// plant takes note of a secret, and of what is in it where that is base64.
func (p *trove) plant(what, secret string) string {
	_, body, found := strings.Cut(secret, "_")
	if !found {
		body = secret
	}
	forms := []string{strings.TrimRight(body, "="), base64.StdEncoding.EncodeToString([]byte(secret))[:len(secret)], hex.EncodeToString([]byte(secret))}
	if raw, err := base64.StdEncoding.DecodeString(body); err == nil {
		forms = append(forms, string(raw), hex.EncodeToString(raw), base64.RawURLEncoding.EncodeToString(raw))
		if len(raw) == 64 { // of a key pair the public half may be shown
			seed := raw[:32]
			forms = []string{base64.StdEncoding.EncodeToString(seed)[:42], base64.RawURLEncoding.EncodeToString(seed)[:42], hex.EncodeToString(seed), string(seed)}
		}
	}
	p.secrets[what] = forms
	return secret
}

func (p *trove) note(where, text string) { p.said[where] += text + "\n" }

// found lists what is where it must not be.
func (p *trove) found() (list []string) {
	for what, forms := range p.secrets {
		for where, text := range p.said {
			for _, form := range forms {
				if i := strings.Index(text, form); i >= 0 {
					list = append(list, fmt.Sprintf("%s in %s: …%.200q", what, where, text[max(0, i-100):]))
					break
				}
			}
		}
	}
	return list
}

// plantedSite has an endpoint for each way in which a delivery fails, or its row is wrong, each with secrets of its own.
func plantedSite(t *testing.T, p *trove) (s *site, m *moods, endpoints map[string]outbox.UUID) {
	t.Helper()
	m = new(moods)
	key, lostKey := p.plant("the key", seal.NewKey()), p.plant("a key that is gone", seal.NewKey())
	s = newSite(t, fmt.Sprintf("queue:\n  poll: 100ms\nbreaker:\n  failures: 1000\n  failure_ratio: 0\nsecrets:\n  keys: ['2026=file:%s']\n", fileOf(t, "key", key)),
		m.answer, "acme")
	header, query := p.plant("a header", "planted-header-value"), p.plant("a query", "planted-query-value")
	user := p.plant("a password in a URL", "planted-userinfo-password")
	endpoints = make(map[string]outbox.UUID)
	ring := func(id, text string) *seal.Ring {
		k, err := seal.ParseKey(id, text)
		require.NoError(t, err)
		r, err := seal.NewRing(k)
		require.NoError(t, err)
		return r
	}
	sealed := func(r *seal.Ring, id outbox.UUID, secret string) string {
		text, err := r.Seal("acme", id, secret)
		require.NoError(t, err)
		return text
	}
	fresh := func(what string) string {
		return p.plant(what, "whsec_"+base64.StdEncoding.EncodeToString([]byte("planted: the secret of "+what+".")))
	}
	for name, set := range map[string]func(id outbox.UUID) (url, token string){
		"plain":   func(outbox.UUID) (string, string) { return "", fresh("plain") },
		"sealed":  func(id outbox.UUID) (string, string) { return "", sealed(ring("2026", key), id, fresh("sealed")) },
		"odd":     func(outbox.UUID) (string, string) { return "", p.plant("odd", "planted-odd-token") },
		"private": func(outbox.UUID) (string, string) { return "", p.plant("private", delivery.NewPrivateKey()) },
		"refused": func(id outbox.UUID) (string, string) {
			return "http://u:" + user + "@127.0.0.1:1/hook?key=" + query, sealed(ring("2026", key), id, fresh("refused"))
		},
		"tls": func(outbox.UUID) (string, string) {
			return strings.Replace(s.receiver.URL, "http:", "https:", 1) + "/?key=" + query, fresh("tls")
		},
		"no host": func(outbox.UUID) (string, string) {
			return "http://u:" + user + "@nosuchhost.invalid/?key=" + query, fresh("no host")
		},
		"denied": func(outbox.UUID) (string, string) {
			return "http://u:" + user + "@10.0.0.1/?key=" + query, fresh("denied")
		},
		"no URL": func(outbox.UUID) (string, string) {
			return "http://u:" + user + "@[::1/?key=" + query, fresh("no URL")
		},
		"bad token": func(outbox.UUID) (string, string) { return "", p.plant("bad token", "whsk_planted-bad-token") },
		"bad seal":  func(id outbox.UUID) (string, string) { return "", sealed(ring("2026", lostKey), id, fresh("bad seal")) },
		"moved": func(outbox.UUID) (string, string) {
			return "", sealed(ring("2026", key), outbox.UUID{1}, fresh("moved"))
		},
	} {
		id := s.endpoint(t, "acme", 1)
		endpoints[name] = id
		url, token := set(id)
		if url == "" {
			url = s.receiver.URL + "/" + id.String() + "?key=" + query
		}
		s.exec(t, `UPDATE acme.webhook_endpoints SET name = $2, endpoint_url = $3, secret_token = $4, secondary_secret_token = $5, custom_headers = $6 WHERE id = $1`,
			id, name, url, token, fresh("second of "+name), `{"Authorization": "`+header+`"}`)
		s.subscribe(t, "acme", id, "order.created", "{}")
	}
	bad := s.endpoint(t, "acme", 1)
	s.exec(t, `UPDATE acme.webhook_endpoints SET custom_headers = $2 WHERE id = $1`, bad, `{"Host": "`+header+`", "X": "`+header+`\r\n"}`)
	m.set(endpoints["odd"], http.StatusBadRequest)
	m.set(endpoints["private"], http.StatusServiceUnavailable)
	return s, m, endpoints
}

// TestPlantedSecrets searches all that a run prints, logs, serves and records for its secrets: with debug logs, failures of every kind, dead letters, a crash,
// and every command that shows something.
func TestPlantedSecrets(t *testing.T) {
	t.Parallel()
	p := &trove{make(map[string][]string), make(map[string]string)}
	s, m, endpoints := plantedSite(t, p)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var inSight string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT string_agg(e::text, ' ') FROM acme.webhook_endpoints e`).Scan(&inSight))
	require.Greater(t, len((&trove{p.secrets, map[string]string{"table webhook_endpoints": inSight}}).found()), 20, "the search finds what is there")
	s.asRunner(t)
	password := p.plant("the password of the database", "planted-database-password")
	text, err := os.ReadFile(s.config)
	require.NoError(t, err)
	withPassword := strings.Replace(string(text), "@127.0.0.1", ":"+password+"@127.0.0.1", 1)
	require.Contains(t, withPassword, password)
	require.NoError(t, os.WriteFile(s.config, []byte(withPassword), 0o600))

	spans := newTraceCollector(t)
	env := append(spans.environment("OTEL_EXPORTER_OTLP_HEADERS=x-key="+p.plant("the key of the collector", "planted-collector-key")+","+
		p.plant("a header that is none", "planted-broken-header")), "OUTBOX_RELAY_LOG_LEVEL=debug", "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0")
	relay := startBinary(t, binary(t), s.config, env...)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 4)
	const payload = "planted-payload-value" // which rows, and commands that show rows, do have
	s.exec(t, `INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type, event_data, event_metadata)
		VALUES ('order.created', gen_random_uuid(), 'order', $1, $1)`, `{"card": "`+payload+`"}`)
	count := func(sql string) (n int) {
		require.NoError(t, s.pool.QueryRow(ctx, sql).Scan(&n))
		return n
	}
	s.receiver.await(ctx, t, "dead letters of six endpoints", func() bool {
		return count(`SELECT count(DISTINCT webhook_endpoint_id) FROM acme.webhook_dead_letters`) == 6 && s.arrivedAt(endpoints["sealed"]) == 5
	})
	for _, page := range []string{"/metrics", "/readyz", "/livez"} {
		p.note(page, get(ctx, t, addressOf(t, relay)+page))
	}
	require.Contains(t, p.said["/metrics"], "outbox_relay_attempts_total")

	// Everything that shows something.
	var event, letter, waiting string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT webhook_event_id::text, delivery_id::text FROM acme.webhook_dead_letters LIMIT 1`).Scan(&event, &letter))
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT id::text FROM acme.webhook_deliveries LIMIT 1`).Scan(&waiting))
	shown := [][]string{
		{"config"},
		{"check"},
		{"tenants", "list"},
		{"endpoints", "list"},
		{"deliveries", "list"},
		{"deadletters", "list"},
		{"events", "list"},
		{"audit"},
		{"status"},
		{"status", "-o", "json"},
		{"deliveries", "show", waiting, "--body"},
		{"deadletters", "show", letter, "--body"},
		{"events", "show", event, "--body"},
		{"events", "explain", event},
		{"deliveries", "show", waiting, "-o", "json"},
		{"deadletters", "show", letter, "-o", "json"},
		{"endpoints", "list", "-o", "json"},
		{"secrets", "seal", "--dry-run"},
		{"secrets", "seal"},
		{"deadletters", "replay", "--all", "--dry-run"},
		{"migrate", "--print"},
	}
	for _, id := range endpoints {
		shown = append(shown, []string{"endpoints", "show", id.String()}, []string{"endpoints", "show", id.String(), "-o", "json"}, []string{"endpoints", "test", id.String()})
	}
	shown = append(shown, s.owner("secrets", "seal"), s.owner("check"))
	for _, args := range shown {
		out, said, _ := s.desk(t, args...)
		p.note(strings.Join(args, " "), out+said)
	}
	require.Contains(t, p.said["secrets seal --database-url "+s.dsn], "sealed with the key 2026")
	var made struct{ Secret string }
	s.read(t, &made, s.owner("endpoints", "rotate-secret", endpoints["plain"].String(), "--yes")...)
	p.plant("a secret made by rotate-secret", made.Secret)
	m.set(endpoints["plain"], http.StatusBadRequest)
	s.insertMany(t, "acme", "order.created", 5)
	s.receiver.await(ctx, t, "dead letters with the new secret", func() bool {
		return count(`SELECT count(*) FROM acme.webhook_dead_letters l JOIN acme.webhook_endpoints e ON e.id = l.webhook_endpoint_id WHERE e.name = 'plain'`) == 5
	})

	// Connections that break, a crash, a start with the DSN in a file, one that is not let in, and configurations with all of it in the wrong place.
	s.exec(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1`, "runner_"+s.slot)
	s.receiver.await(ctx, t, "the end of the stream to be told of", func() bool { return strings.Contains(relay.said(t), "the stream has ended") })
	require.NoError(t, relay.cmd.Process.Signal(syscall.SIGQUIT))
	<-relay.done
	require.Contains(t, relay.said(t), "goroutine ", "the crash")
	p.note("the log of the first relay", relay.said(t))
	p.crooked(t, s, password)
	relay = startBinary(t, binary(t), s.config, append(env, "OUTBOX_RELAY_SHUTDOWN_DRAIN=1s")...)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 5)
	s.receiver.await(ctx, t, "events of the second relay", func() bool {
		return count(`SELECT count(*) FROM acme.webhook_deliveries d JOIN acme.webhook_endpoints e ON e.id = d.webhook_endpoint_id WHERE e.name = 'sealed' AND d.delivery_status = 'success'`) == 15
	})
	_, exit := relay.stop(t)
	require.NoError(t, exit)
	p.note("the log of the second relay", relay.said(t))
	require.Contains(t, relay.said(t), `"level":"DEBUG"`)
	for where, text := range map[string]string{"first relay": p.said["the log of the first relay"], "second relay": p.said["the log of the second relay"], "spans": spans.bytes()} {
		require.NotEmpty(t, text, where)
		assert.NotContains(t, text, payload, where)
	}
	p.note("the spans", spans.bytes())
	p.tables(ctx, t, s)

	assert.Empty(t, p.found())
	bytes := 0
	for _, text := range p.said {
		bytes += len(text)
	}
	t.Logf("%d secrets, %d places, %d bytes searched", len(p.secrets), len(p.said), bytes)
}

// crooked runs commands whose configuration has secrets where none belong, or where they are not understood.
func (p *trove) crooked(t *testing.T, s *site, password string) {
	t.Helper()
	key := p.plant("a key in the configuration", seal.NewKey())
	for i, c := range []struct{ env, args string }{
		{"OUTBOX_RELAY_SECRETS_KEYS=k1=" + key, "config"},
		{"OUTBOX_RELAY_SECRETS_KEYS=k1=file:" + key, "run"},
		{"OUTBOX_RELAY_SECRETS_KEYS=" + key, "check"},
		{"OUTBOX_RELAY_SECRETS_KEYS=k1=file:" + fileOf(t, "wrong", "0"+key), "config"},
		{"OUTBOX_RELAY_DATABASE_URL=postgres://u:" + password + "@127.0.0.1:1/x", "run"},
		{"OUTBOX_RELAY_DATABASE_URL=postgres://u:" + password + "@127.0.0.1:x/x", "run"},
		{"OUTBOX_RELAY_DATABASE_URL=postgres://u:@" + password + "@127.0.0.1/x", "config"},
		{"OUTBOX_RELAY_DATABASE_URL_FILE=" + fileOf(t, "dsn", "host=127.0.0.1 port=1 user=u password="+password), "check"},
		{"OUTBOX_RELAY_DATABASE_URL_FILE=" + fileOf(t, "dsn", "password='"+password), "config"},
	} {
		env := []string{c.env}
		if !strings.Contains(c.env, "DATABASE_URL") {
			env = append(env, "OUTBOX_RELAY_DATABASE_URL=postgres://u:"+password+"@127.0.0.1:1/x")
		}
		o := invoke(t, env, c.args)
		p.note(fmt.Sprintf("crooked configuration %d", i), o.out+o.err)
	}
	yaml := fileOf(t, "crooked.yaml", fmt.Sprintf("database: {url: [%q]}\nsecrets: {keys: {k1: %q}}\n", "postgres://u:"+password+"@h/x", key))
	o := invoke(t, nil, "config", "--config", yaml)
	require.Equal(t, exitUsage, o.code)
	p.note("crooked file", o.out+o.err)
	_, said, code := s.desk(t, "endpoints", "rotate-secret", outbox.NewUUID().String(), "--secret-file", fileOf(t, "token", p.plant("a token in a file", "whsk_planted-file-token")))
	require.Equal(t, exitUsage, code)
	p.note("rotate-secret", said)
}

// tables notes every row of the tenant and of the relay, without the columns that hold secrets.
func (p *trove) tables(ctx context.Context, t *testing.T, s *site) {
	t.Helper()
	rows, err := s.pool.Query(ctx, `SELECT schemaname::text, tablename::text FROM pg_tables WHERE schemaname IN ('acme', 'outbox_relay')`)
	require.NoError(t, err)
	type table struct{ Schema, Name string }
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[table])
	require.NoError(t, err)
	require.Greater(t, len(list), 10)
	for _, tb := range list {
		var text string
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT coalesce(string_agg((to_jsonb(t) - '{secret_token,secondary_secret_token,custom_headers,endpoint_url}'::text[])::text, E'\n'), '') FROM `+
			pgx.Identifier{tb.Schema, tb.Name}.Sanitize()+` t`).Scan(&text))
		p.note("table "+tb.Name, text)
	}
	require.Contains(t, p.said["table webhook_dead_letters"], "http_4xx")
	require.Contains(t, p.said["table webhook_delivery_attempts"], "connect")
}

// addressOf is where the relay says it serves its pages.
func addressOf(t *testing.T, p *relayProcess) string {
	t.Helper()
	for line := range strings.Lines(p.said(t)) {
		var said struct{ Msg, Address string }
		if json.Unmarshal([]byte(line), &said) == nil && said.Address != "" {
			return "http://" + said.Address
		}
	}
	require.Fail(t, "it serves nothing")
	return ""
}

func get(ctx context.Context, t *testing.T, url string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer func() { assert.NoError(t, resp.Body.Close()) }()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(body)
}
