package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// trialKey is one secret that a receiver may hold, in the scheme that it checks: v1 and v1a of webhook-signature, or legacy, the older header.
type trialKey struct {
	Scheme  string `json:"scheme"`
	Token   string `json:"token"` // of v1a, the public key
	Expired bool   `json:"expired"`
}

// trial is a request of the relay, with everything that a verifier needs to judge it and its tampered copies.
type trial struct {
	Headers         map[string]string `json:"headers"`
	Body            []byte            `json:"body"`
	SignatureHeader string            `json:"signatureHeader"`
	Keys            []trialKey        `json:"keys"`
	Copies          []trialCopy       `json:"copies"`          // the first one is the request itself
	Event           *trialEvent       `json:"event,omitempty"` // of a CloudEvent: what it has to say
}

// trialCopy is a request with some of it replaced.
type trialCopy struct {
	What    string            `json:"what"`
	Headers map[string]string `json:"headers,omitempty"`
	Body    []byte            `json:"body,omitempty"`
}

type trialEvent struct {
	ID      string    `json:"id"`
	Source  string    `json:"source"`
	Type    string    `json:"type"`
	Subject string    `json:"subject"`
	Time    time.Time `json:"time"`
	Data    string    `json:"data"`
}

// trialEndpoint is an endpoint of the test with the secrets that its receiver may hold.
type trialEndpoint struct {
	id                 outbox.UUID
	format, header     string
	primary, secondary string
	expires            any // a time.Time, or nil
	keys               []trialKey
}

// trialEndpoints makes endpoints of every kind of secret for every format of the body.
func trialEndpoints(rnd *rand.Rand) (list []*trialEndpoint) {
	random := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return b
	}
	whsec := func() string { return "whsec_" + base64.StdEncoding.EncodeToString(random(24+rnd.IntN(41))) }
	whsk := func() (private, public string) {
		key := ed25519.NewKeyFromSeed(random(ed25519.SeedSize))
		return "whsk_" + base64.StdEncoding.EncodeToString(key.Seed()), "whpk_" + base64.StdEncoding.EncodeToString(key.Public().(ed25519.PublicKey))
	}
	const header = "X-Webhook-Signature"
	soon, ago := time.Now().Add(time.Hour), time.Now().Add(-time.Minute)
	for _, format := range []string{"standard", "neo", "cloudevents", "cloudevents-binary", "raw"} {
		add := func(header, primary, secondary string, expires any, keys ...trialKey) {
			list = append(list, &trialEndpoint{outbox.NewUUID(), format, header, primary, secondary, expires, keys})
		}
		hmacKeys := func(token string) []trialKey {
			return []trialKey{{Scheme: "v1", Token: token}, {Scheme: "legacy", Token: token}}
		}
		for _, token := range []string{
			whsec(), "a token for " + format, "pässwörd \u65e5\u672c \U0001F511 " + format + strings.Repeat(", longer than a block of the hash", 3),
		} {
			add("X-Hub-Signature-256", token, "", nil, hmacKeys(token)...)
		}
		next, older := whsec(), "an older token for "+format
		add(header, next, older, soon, append(hmacKeys(next), trialKey{Scheme: "v1", Token: older})...)
		for _, older := range []string{whsec(), "an old token for " + format} {
			next := whsec()
			add(header, next, older, ago, append(hmacKeys(next), trialKey{"v1", older, true}, trialKey{"legacy", older, true})...)
		}
		private, public := whsk()
		add(header, private, "", nil, trialKey{Scheme: "v1a", Token: public})
		private, public = whsk()
		older = whsec()
		add(header, private, older, nil, trialKey{Scheme: "v1a", Token: public}, trialKey{Scheme: "v1", Token: older})
		for range 2 {
			private, public = whsk()
			olderPrivate, olderPublic := whsk()
			add(header, private, olderPrivate, ago, trialKey{Scheme: "v1a", Token: public}, trialKey{"v1a", olderPublic, true})
		}
	}
	return list
}

// trialData are documents that show what happens to unusual bytes: those that parsers and printers change, and those that end lines and strings.
func trialData(rnd *rand.Rand, n int) []string {
	list := []string{
		`{}`, `[]`, `null`, `true`, `0`, `""`, `"text"`, "\"\ufeff begins like a file\"", `-12345678901234567890.1234567890e-40`,
		`{"b": 1, "a": 12345678901234567890.10, "e": 1e400, "tiny": 1e-300, "zeros": 1.5000}`,
		`{"escapes": "\u0001\u001f\u007f\b\f\n\r\t\"\\\/", "not one": "\\u0000 \\ud83d", "html": "</script><!--&amp;"}`,
		"{\"separators\": \"\u2028\u2029\u0085\u00a0\", \"pairs\": \"\\ud83d\\ude00 \U0001F600 \U0010FFFF\", \"none\": \"\ufffd\ufffe\uffff\"}",
		"{\"composed\": \"\u00e9\", \"not\": \"e\u0301\", \"right to left\": \"\u202e\u05d0\u0628\", \"\": {\"\": []}, \"__proto__\": {\"x\": 1}}",
		strings.Repeat("[", 200) + strings.Repeat("]", 200),
		`{"large": "` + strings.Repeat("0123456789", 10_000) + `"}`,
		`{"large": ["` + strings.Repeat("\U0001F4E6\u00fc\\n", 12_000) + `"]}`,
	}
	for len(list) < n {
		text := make([]rune, rnd.IntN(300))
		for i := range text {
			text[i] = 1 + rnd.Int32N(0xd7ff)
		}
		doc, _ := json.Marshal(map[string]any{"n": len(list), string(text[:len(text)/4]): string(text)})
		list = append(list, string(doc))
	}
	return list
}

const (
	trialSource = "https://shop.example/gr%C3%B6%C3%9Fe?a=b"
	trialEvents = 100 // for each endpoint
)

// trials has the real binary deliver and returns what arrived.
func trials(t *testing.T) (list []*trial) {
	t.Helper()
	s := newSite(t, fmt.Sprintf("delivery:\n  source: %q\n", trialSource), always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	endpoints := make(map[string]*trialEndpoint)
	var mu sync.Mutex
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		ep := endpoints[strings.TrimPrefix(r.URL.Path, "/")]
		if !assert.NoError(t, err) || !assert.NotNil(t, ep, r.URL.Path) {
			return
		}
		a := &trial{Headers: make(map[string]string), Body: body, SignatureHeader: strings.ToLower(ep.header), Keys: ep.keys}
		for name, values := range r.Header {
			a.Headers[strings.ToLower(name)] = strings.Join(values, ", ")
		}
		if strings.HasPrefix(ep.format, "cloudevents") {
			a.Event = new(trialEvent)
		}
		mu.Lock()
		defer mu.Unlock()
		list = append(list, a)
	}))
	t.Cleanup(server.Close)
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, ep := range trialEndpoints(rnd) {
		endpoints[ep.id.String()] = ep
		s.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, secondary_secret_token, secondary_secret_expires_at, payload_format,
			signature_header, created_by_user_id) VALUES ($1, 'trial', $2, $3, nullif($4, ''), $5, $6, $7, $1)`,
			ep.id, server.URL+"/"+ep.id.String(), ep.primary, ep.secondary, ep.expires, ep.format, ep.header)
		s.subscribe(t, "acme", ep.id, "**", "{}")
	}
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	for i, data := range trialData(rnd, trialEvents) {
		kind, name := "order.created", ""
		if i%5 == 0 {
			kind, name = "bestellung.größe_100% \"\u2713\"", "Bestellung \u2028\n\"ok\" \U0001F600" // which nothing but outbox.Insert refuses
		}
		s.exec(t, `INSERT INTO acme.webhook_events (event_type, event_name, aggregate_id, aggregate_type, event_data, event_metadata, correlation_id)
			VALUES ($1, nullif($2, ''), gen_random_uuid(), $3, $4::jsonb, jsonb_build_object('note', $2::text), gen_random_uuid())`, kind, name, "ördnung", data)
	}
	s.receiver.await(ctx, t, "every delivery", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(list) >= trialEvents*len(endpoints)
	})
	_, exit := p.stop(t)
	require.NoError(t, exit)
	s.fillIn(t, list)
	for i, a := range list {
		a.Copies = tampered(a, list[(i+1)%len(list)], i)
	}
	return list
}

// fillIn adds what the database says of each event, and compares the data byte for byte.
func (s *site) fillIn(t *testing.T, list []*trial) {
	t.Helper()
	rows, err := s.pool.Query(t.Context(), `SELECT id::text, event_type, aggregate_id::text, occurred_at, event_data::text FROM acme.webhook_events`)
	require.NoError(t, err)
	defer rows.Close()
	events := make(map[string]trialEvent)
	for rows.Next() {
		e := trialEvent{Source: trialSource}
		require.NoError(t, rows.Scan(&e.ID, &e.Type, &e.Subject, &e.Time, &e.Data))
		events[e.ID] = e
	}
	require.NoError(t, rows.Err())
	require.Len(t, events, trialEvents)
	for _, a := range list {
		e, ok := events[a.Headers["webhook-id"]]
		require.True(t, ok)
		require.True(t, bytes.Contains(a.Body, []byte(e.Data)), "not the bytes of the table: %.200q", a.Body)
		if a.Event != nil {
			*a.Event = e
		}
	}
}

// tampered returns copies of a, of which only the first is as it was sent. other is another request.
func tampered(a, other *trial, i int) []trialCopy {
	const id, timestamp, signature = "webhook-id", "webhook-timestamp", "webhook-signature"
	header := func(what, name, value string) trialCopy {
		return trialCopy{What: what, Headers: map[string]string{name: value}}
	}
	digit := "0"
	if strings.HasSuffix(a.Headers[id], digit) {
		digit = "1"
	}
	flipped := bytes.Clone(a.Body)
	flipped[i*7919%len(flipped)] ^= 1 << (i % 7)
	seconds, _ := strconv.ParseInt(a.Headers[timestamp], 10, 64)
	forged := make(map[string]string)
	for _, name := range []string{signature, a.SignatureHeader} {
		if value, ok := a.Headers[name]; ok {
			forged[name] = forge(value)
		}
	}
	stolen := map[string]string{signature: other.Headers[signature], a.SignatureHeader: other.Headers[other.SignatureHeader]}
	return []trialCopy{
		{What: "request"},
		{What: "body", Body: flipped},
		{What: "body", Body: append(bytes.Clone(a.Body), ' ')},
		{What: "body", Body: append([]byte("\ufeff"), a.Body...)},
		header("id", id, a.Headers[id][:35]+digit),
		header("timestamp", timestamp, strconv.FormatInt(seconds+1, 10)),
		header("timestamp", timestamp, strconv.FormatInt(seconds-1, 10)),
		{What: "signature", Headers: forged},
		{What: "signature", Headers: stolen},
	}
}

var signatureStart = regexp.MustCompile(`(,|^sha256=).`)

// forge changes one character of each signature in a header.
func forge(value string) string {
	return signatureStart.ReplaceAllStringFunc(value, func(s string) string {
		last := len(s) - 1
		if s[last] == 'a' {
			return s[:last] + "b"
		}
		return s[:last] + "a"
	})
}

// verdicts is what a verifier has said: how many requests it accepted, how many copies it refused, by what was tampered with, and what it got wrong.
type verdicts struct {
	Counts map[string]map[string]int `json:"counts"`
	Wrong  []string                  `json:"wrong"` // the first of them
	Wrongs int                       `json:"wrongs"`
}

// judge has the official library for Go look at v1. It reads no other scheme.
func judge(t *testing.T, list []*trial) (v verdicts) {
	t.Helper()
	count := make(map[string]int)
	for _, a := range list {
		for _, c := range a.Copies {
			h, body := make(http.Header), c.Body
			for _, headers := range []map[string]string{a.Headers, c.Headers} {
				for name, value := range headers {
					h.Set(name, value)
				}
			}
			if body == nil {
				body = a.Body
			}
			for _, key := range a.Keys {
				if key.Scheme != "v1" {
					continue
				}
				what := c.What
				if what == "request" && key.Expired {
					what = "expired secret"
				}
				count[what]++
				if err := officialVerifier(t, key.Token).Verify(body, h); (err == nil) != (what == "request") {
					if v.Wrongs++; v.Wrongs > 20 {
						continue
					}
					v.Wrong = append(v.Wrong, fmt.Sprintf("Go, %s: %v", what, err))
				}
			}
		}
	}
	v.Counts = map[string]map[string]int{"Go": count}
	return v
}

func officialVerifier(t *testing.T, token string) *standardwebhooks.Webhook {
	t.Helper()
	parse := standardwebhooks.NewWebhook
	if !strings.HasPrefix(token, "whsec_") {
		parse = func(s string) (*standardwebhooks.Webhook, error) { return standardwebhooks.NewWebhookRaw([]byte(s)) }
	}
	v, err := parse(token)
	require.NoError(t, err)
	return v
}

// judgeInNode has the libraries that receivers in Node use look at the same; dir is where they are.
func judgeInNode(t *testing.T, list []*trial, dir string) (v verdicts) {
	t.Helper()
	var lines bytes.Buffer
	encoder := json.NewEncoder(&lines)
	for _, a := range list {
		require.NoError(t, encoder.Encode(a))
	}
	file := filepath.Join(t.TempDir(), "requests.jsonl")
	require.NoError(t, os.WriteFile(file, lines.Bytes(), 0o600))
	cmd := exec.CommandContext(t.Context(), "node", filepath.Join(dir, "verify.js"), file, list[len(list)-1].Headers["webhook-timestamp"])
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err, "node verify.js: make test-receivers installs what it needs")
	require.NoError(t, json.Unmarshal(out, &v))
	return v
}

// TestOfficialVerifiers has the libraries that receivers use judge real requests, over all formats of the body, kinds of secrets and unusual bytes, and
// tampered copies of them. The libraries for Node are asked by `make test-receivers`.
func TestOfficialVerifiers(t *testing.T) {
	t.Parallel()
	list := trials(t)
	all, libraries := []verdicts{judge(t, list)}, []string{"Go"}
	if dir := os.Getenv("OUTBOX_RELAY_TEST_RECEIVERS"); dir != "" {
		all, libraries = append(all, judgeInNode(t, list, dir)), append(libraries, "standardwebhooks", "svix", "octokit", "node:crypto", "cloudevents")
	}
	counts := make(map[string]map[string]int)
	for _, v := range all {
		assert.Zero(t, v.Wrongs, "%q", v.Wrong)
		maps.Copy(counts, v.Counts)
	}
	t.Logf("%d requests: %v", len(list), counts)
	for _, library := range libraries {
		whats := []string{"request", "body", "id", "timestamp", "signature", "expired secret"}
		switch library {
		case "octokit": // its header is the signature of the body alone
			whats = []string{"request", "body", "signature", "expired secret"}
		case "cloudevents": // it does not verify
			whats = []string{"request", "without a type"}
		}
		for _, what := range whats {
			assert.GreaterOrEqual(t, counts[library][what], 1000, "%s, %s", library, what)
		}
	}
}
