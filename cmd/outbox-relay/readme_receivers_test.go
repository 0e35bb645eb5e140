package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
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

// receiverSecret is what the receivers of the README are started with.
const receiverSecret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

// readmeReceiver is a program of the README at work.
type readmeReceiver struct {
	language, url string

	mu      sync.Mutex
	arrived []*trial // what the relay has sent to it, by way of the test
}

// startReadmeReceiver runs the program that the README has in a language, on a port of its own, with some changes.
func startReadmeReceiver(ctx context.Context, t *testing.T, language string, changes ...func(program string) string) *readmeReceiver {
	t.Helper()
	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(readme), "\n### A receiver\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n## ")
	blocks := regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllStringSubmatch(section, -1)
	require.Len(t, blocks, 1, language)
	require.Equal(t, 1, strings.Count(blocks[0][1], "8080"), language)
	port := strconv.Itoa(freePort(t))
	dir := t.TempDir()
	file := filepath.Join(dir, map[string]string{"go": "receiver.go", "js": "receiver.mjs", "python": "receiver.py"}[language])
	program := strings.Replace(blocks[0][1], "8080", port, 1)
	for _, change := range changes {
		program = change(program)
	}
	require.NoError(t, os.WriteFile(file, []byte(program), 0o600))
	var cmd *exec.Cmd
	switch language {
	case "go":
		out, err := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "receiver"), file).CombinedOutput() // against this module's go.mod
		require.NoError(t, err, "%s", out)
		cmd = exec.CommandContext(ctx, filepath.Join(dir, "receiver"))
	case "js":
		libraries := filepath.Join(os.Getenv("OUTBOX_RELAY_TEST_RECEIVERS"), "node_modules")
		require.NoError(t, os.Symlink(libraries, filepath.Join(dir, "node_modules")))
		cmd = exec.CommandContext(ctx, "node", file)
	case "python":
		cmd = exec.CommandContext(ctx, "python3", file)
	}
	var said bytes.Buffer
	cmd.Env = append(os.Environ(), "WEBHOOK_SECRET="+receiverSecret)
	cmd.Stdout, cmd.Stderr = &said, &said
	require.NoError(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("%s:\n%s", language, said.String())
		}
	})
	r := &readmeReceiver{language: language, url: "http://127.0.0.1:" + port}
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = conn.Close()
			return r
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ended:
			require.FailNow(t, "the receiver has ended", language)
		case <-ctx.Done():
			require.FailNow(t, "the receiver does not listen", language)
		}
	}
}

// freePort returns a port that nobody listens on, below those that the system gives to other tests meanwhile.
func freePort(t *testing.T) int {
	t.Helper()
	for range 100 {
		port := 20_000 + rand.IntN(10_000)
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", fmt.Sprintf(":%d", port))
		if err == nil {
			require.NoError(t, l.Close())
			return port
		}
	}
	require.FailNow(t, "no port is free")
	return 0
}

// send sends a request to the receiver and returns its answer's status.
func (r *readmeReceiver) send(ctx context.Context, headers map[string]string, body []byte) (int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.url, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	for name, value := range headers {
		req.Header.Set(name, value)
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return resp.StatusCode, resp.Body.Close()
}

// ServeHTTP hands a request of the relay on, and keeps it.
func (r *readmeReceiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, _ := io.ReadAll(req.Body)
	got := &trial{Headers: make(map[string]string), Body: body, SignatureHeader: "x-webhook-signature"}
	for name := range req.Header {
		got.Headers[strings.ToLower(name)] = req.Header.Get(name)
	}
	delete(got.Headers, "content-length")
	status, err := r.send(req.Context(), got.Headers, body)
	if err != nil {
		status = http.StatusBadGateway
	}
	r.mu.Lock()
	r.arrived = append(r.arrived, got)
	r.mu.Unlock()
	w.WriteHeader(status)
}

// TestReadmeReceivers runs the receivers of the README: they accept what the relay sends, whichever of two secrets is theirs, and refuse what has been
// tampered with. `make test-receivers` has those that are not written in Go as well.
func TestReadmeReceivers(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	languages := []string{"go"}
	if os.Getenv("OUTBOX_RELAY_TEST_RECEIVERS") != "" {
		languages = append(languages, "js", "python")
	}
	s := newSite(t, "", always(http.StatusOK), "acme")
	var receivers []*readmeReceiver
	for _, language := range languages {
		r := startReadmeReceiver(ctx, t, language)
		receivers = append(receivers, r)
		server := httptest.NewServer(r)
		t.Cleanup(server.Close)
		next := "whsec_" + base64.StdEncoding.EncodeToString([]byte("the receiver does not know it"))
		for _, tokens := range [][2]string{{receiverSecret, ""}, {next, receiverSecret}} {
			id := outbox.NewUUID()
			s.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, secondary_secret_token, max_retry_attempts, created_by_user_id)
				VALUES ($1, $2, $3, $4, nullif($5, ''), 0, $1)`, id, language, server.URL, tokens[0], tokens[1])
			s.subscribe(t, "acme", id, "**", "{}")
		}
	}
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	documents := trialData(rand.New(rand.NewPCG(3, 4)), 20)
	for _, data := range documents {
		s.exec(t, `INSERT INTO acme.webhook_events (event_type, aggregate_id, aggregate_type, event_data) VALUES ('order.created', gen_random_uuid(), 'order', $1::jsonb)`, data)
	}
	var good, bad int
	s.receiver.await(ctx, t, "every delivery", func() bool {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FILTER (WHERE response_status_code = 204 AND delivery_status = 'success'),
			count(*) FILTER (WHERE delivery_status = 'failed') FROM acme.webhook_deliveries`).Scan(&good, &bad))
		return good+bad >= 2*len(receivers)*len(documents)
	})
	require.Zero(t, bad, "requests that were refused")
	_, exit := p.stop(t)
	require.NoError(t, exit)

	for _, r := range receivers {
		for i, got := range r.arrived {
			other := slices.IndexFunc(r.arrived, func(a *trial) bool { return a.Headers["webhook-id"] != got.Headers["webhook-id"] })
			for _, c := range tampered(got, r.arrived[other], i) {
				headers, body := maps.Clone(got.Headers), got.Body
				maps.Copy(headers, c.Headers)
				want := http.StatusUnauthorized
				if c.What == "request" {
					want = http.StatusNoContent // it has come before: the answer is the same
				}
				if c.Body != nil {
					body = c.Body
				}
				status, err := r.send(ctx, headers, body)
				require.NoError(t, err)
				require.Equal(t, want, status, "%s, %s", r.language, c.What)
			}
		}
		r.judgesTime(ctx, t)
	}
}

// judgesTime has the receiver look at requests that are signed as they should be, but five minutes old or young.
func (r *readmeReceiver) judgesTime(ctx context.Context, t *testing.T) {
	t.Helper()
	secret, err := standardwebhooks.NewWebhook(receiverSecret)
	require.NoError(t, err)
	for off, want := range map[time.Duration]int{0: http.StatusNoContent, -6 * time.Minute: http.StatusUnauthorized, 6 * time.Minute: http.StatusUnauthorized} {
		at, body := time.Now().Add(off), []byte(`{}`)
		signature, err := secret.Sign("an id", at, body)
		require.NoError(t, err)
		status, err := r.send(ctx, map[string]string{
			"webhook-id": "an id", "webhook-timestamp": strconv.FormatInt(at.Unix(), 10), "webhook-signature": signature,
		}, body)
		require.NoError(t, err)
		assert.Equal(t, want, status, "%s, off by %s", r.language, off)
	}
	for _, headers := range []map[string]string{nil, {"webhook-id": "x", "webhook-timestamp": "yesterday", "webhook-signature": "v1,"}} {
		status, err := r.send(ctx, headers, nil)
		require.NoError(t, err)
		assert.Equal(t, http.StatusUnauthorized, status, "%s: %v", r.language, headers)
	}
}

// TestReadmeReceiverAgrees puts the lines that the README has for it into its receiver, and has that verify its endpoint.
func TestReadmeReceiverAgrees(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	lines := regexp.MustCompile("(?s)\n### Verified endpoints\n.*?```go\n(.*?)```").FindSubmatch(readme)
	require.Len(t, lines, 2)
	r := startReadmeReceiver(ctx, t, "go", func(program string) string {
		const answer = "        w.WriteHeader(http.StatusNoContent)"
		require.Contains(t, program, answer)
		program = strings.Replace(program, answer, string(lines[1])+answer, 1)
		return strings.Replace(program, "import (\n", "import (\n    \"encoding/json\"\n", 1)
	})
	s := newSite(t, "verification:\n  method: challenge\n", always(http.StatusOK), "acme")
	id, other := outbox.NewUUID(), outbox.NewUUID()
	for id, secret := range map[outbox.UUID]string{id: receiverSecret, other: "whsec_" + base64.StdEncoding.EncodeToString([]byte("the receiver does not know it"))} {
		s.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id) VALUES ($1, 'readme', $2, $3, $1)`, id, r.url, secret)
	}
	out, said, code := s.desk(t, "endpoints", "verify", id.String())
	require.Zero(t, code, out+said)
	out, _, code = s.desk(t, "endpoints", "verify", other.String())
	require.Equal(t, 1, code)
	require.Contains(t, out, "answered 401")
	status, err := r.send(ctx, nil, nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusUnauthorized, status)
	r.judgesTime(ctx, t) // and what else comes is received as before
}
