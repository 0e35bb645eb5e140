package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// desk runs a command of the binary, which may fail.
func (s *site) desk(t testing.TB, args ...string) (out, errors string, code int) {
	t.Helper()
	cmd, stdout, stderr := s.prepare(t.Context(), t, args...)
	if err := cmd.Run(); err != nil {
		require.NotNil(t, cmd.ProcessState, "%v", err)
	}
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}

func (s *site) prepare(ctx context.Context, t testing.TB, args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	t.Helper()
	cmd = exec.CommandContext(ctx, binary(t), append(args, "--config", s.config)...)
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	return cmd, stdout, stderr
}

// read runs a command that must succeed, and reads its JSON.
func (s *site) read(t testing.TB, value any, args ...string) {
	t.Helper()
	out, errors, code := s.desk(t, append(args, "-o", "json")...)
	require.Zero(t, code, errors)
	require.NoError(t, json.Unmarshal([]byte(out), value), out)
}

// TestSupportDesk goes the way of a person who is told that a webhook has not arrived: what happened, why, and how it is put right.
func TestSupportDesk(t *testing.T) {
	t.Parallel()
	var m moods
	s := newSite(t, "queue:\n  poll: 100ms\nbreaker:\n  failures: 1000\n  failure_ratio: 0\n", m.answer, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s.asRunner(t)
	broken, strict := s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 10)
	s.subscribe(t, "acme", broken, "order.created", `{"n": {"$lte": 3}}`)
	s.subscribe(t, "acme", strict, "order.changed", "{}")
	s.exec(t, `UPDATE acme.webhook_endpoints SET delivery_order = 'strict', retry_backoff_seconds = 3600 WHERE id = $1`, strict)
	m.set(broken, http.StatusBadRequest)
	m.set(strict, http.StatusServiceUnavailable)
	startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 4)
	s.insertMany(t, "acme", "order.changed", 3)
	count := func(sql string, args ...any) (n int) {
		t.Helper()
		require.NoError(t, s.pool.QueryRow(ctx, sql, args...).Scan(&n))
		return n
	}
	s.receiver.await(ctx, t, "three dead letters and three rows that wait", func() bool {
		return count(`SELECT count(*) FROM acme.webhook_dead_letters`) == 3 && count(`SELECT count(*) FROM outbox_relay.retry_queue WHERE leased_by IS NULL`) == 3 &&
			count(`SELECT count(*) FROM acme.webhook_deliveries WHERE delivery_status = 'retrying'`) == 1
	})

	// What failed, for people and for scripts, without anybody's secret.
	var letters []struct {
		DeliveryID outbox.UUID `json:"delivery_id"`
		State      string      `json:"state"`
		EventID    outbox.UUID `json:"event_id"`
	}
	s.read(t, &letters, "deadletters", "list")
	require.Len(t, letters, 3)
	letter := letters[0].DeliveryID.String()
	for _, args := range [][]string{
		{"deadletters", "list"},
		{"deadletters", "show", letter, "--body"},
		{"deliveries", "list"},
		{"deliveries", "show", letter, "-o", "json"},
		{"endpoints", "list"},
		{"endpoints", "show", broken.String()},
		{"endpoints", "show", broken.String(), "-o", "json"},
		{"events", "explain", letters[0].EventID.String()},
		{"events", "show", letters[0].EventID.String(), "--body"},
	} {
		out, errors, code := s.desk(t, args...)
		require.Zero(t, code, "%s: %s", args, errors)
		require.NotEmpty(t, out)
		require.NotContains(t, out, "whsec_", "%s", args)
	}
	out, _, _ := s.desk(t, "deadletters", "show", letter, "--body")
	require.Contains(t, out, "400")
	require.Contains(t, out, `"order.created"`)

	// Why one did not go out at all.
	var unmatched string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT id::text FROM acme.webhook_events WHERE event_data @> '{"n": 4}'`).Scan(&unmatched))
	out, _, _ = s.desk(t, "events", "explain", unmatched)
	require.Contains(t, out, "$lte", "the clause that said no")
	_, errors, code := s.desk(t, "events", "explain", outbox.NewUUID().String())
	require.NotZero(t, code)
	require.NotEmpty(t, errors)

	// What waits behind what, and giving up the first.
	var waits []struct {
		ID     outbox.UUID `json:"id"`
		Status string      `json:"status"`
	}
	s.read(t, &waits, "deliveries", "list", "--endpoint", strict.String())
	require.Len(t, waits, 3)
	var head, second string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT (array_agg(delivery_id::text ORDER BY order_lsn, order_n))[1], (array_agg(delivery_id::text ORDER BY order_lsn, order_n))[2]
		FROM outbox_relay.retry_queue`).Scan(&head, &second))
	out, _, _ = s.desk(t, "deliveries", "show", second)
	require.Contains(t, out, head, "it says behind what it waits")
	m.set(strict, http.StatusOK)
	s.command(t, "deliveries", "skip", head, "--reason", "the customer agreed")
	s.receiver.await(ctx, t, "the other two", func() bool { return s.arrivedAt(strict) == 2 })
	require.Equal(t, 1, count(`SELECT count(*) FROM acme.webhook_dead_letters WHERE last_error_code = 'skipped' AND last_error = 'the customer agreed'`))

	// A paused endpoint keeps what comes.
	s.command(t, "endpoints", "pause", strict.String(), "--reason", "they move house")
	out, _, _ = s.desk(t, "endpoints", "list", "--status", "paused")
	require.Contains(t, out, strict.String())
	s.insertMany(t, "acme", "order.changed", 2)
	s.receiver.await(ctx, t, "two rows", func() bool {
		return count(`SELECT count(*) FROM outbox_relay.retry_queue WHERE endpoint_id = $1`, strict) == 2
	})
	require.Equal(t, 2, s.arrivedAt(strict))
	s.command(t, "endpoints", "resume", strict.String())
	s.receiver.await(ctx, t, "both", func() bool { return s.arrivedAt(strict) == 4 })

	// Sending again asks first, and says what it would do.
	m.set(broken, http.StatusOK)
	_, errors, code = s.desk(t, "deadletters", "replay", "--all")
	require.Equal(t, 2, code, errors)
	require.Contains(t, errors, "--yes")
	_, _, code = s.desk(t, "deadletters", "replay")
	require.Equal(t, 2, code)
	_, _, code = s.desk(t, "deadletters", "replay", letter, "--all")
	require.Equal(t, 2, code)
	out, errors, code = s.desk(t, "deadletters", "replay", "--endpoint", broken.String(), "--dry-run")
	require.Zero(t, code, errors)
	require.Contains(t, out, "3 dead letters")
	require.Zero(t, s.arrivedAt(broken))
	s.command(t, "deadletters", "replay", letter)
	s.receiver.await(ctx, t, "the one", func() bool { // that has arrived; it is queued until that is recorded, and not sent again
		return count(`SELECT count(*) FROM acme.webhook_deliveries WHERE id = $1 AND replay = 1 AND delivery_status = 'success'`, letter) == 1
	})
	require.Equal(t, 1, s.arrivedAt(broken))
	_, errors, code = s.desk(t, "deadletters", "replay", letter)
	require.NotZero(t, code)
	require.Contains(t, errors, "deliveries resend")
	s.command(t, "deliveries", "resend", letter)
	s.receiver.await(ctx, t, "and once more", func() bool {
		return count(`SELECT count(*) FROM acme.webhook_deliveries WHERE id = $1 AND replay = 2 AND delivery_status = 'success'`, letter) == 1
	})
	s.command(t, "deadletters", "discard", letters[1].DeliveryID.String())
	s.command(t, "deadletters", "replay", "--endpoint", broken.String(), "--yes")
	s.receiver.await(ctx, t, "the last one", func() bool { return s.arrivedAt(broken) == 2 })
	s.read(t, &letters, "deadletters", "list", "--status", "open")
	require.Len(t, letters, 1, "the one that was skipped")
	s.command(t, "endpoints", "test", broken.String())
}

// TestShowOfWhatIsLeftToTheConfiguration: an adopted table may have nulls, which are not zeros.
func TestShowOfWhatIsLeftToTheConfiguration(t *testing.T) {
	t.Parallel()
	d := installed(t)
	const id = "01890000-0000-7000-8000-000000000001"
	d.exec(t, `ALTER TABLE acme.webhook_endpoints ALTER timeout_seconds DROP NOT NULL, ALTER max_retry_attempts DROP NOT NULL, ALTER retry_backoff_seconds DROP NOT NULL,
		  ALTER retry_backoff_multiplier DROP NOT NULL;
		INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id, timeout_seconds, max_retry_attempts, retry_backoff_seconds, retry_backoff_multiplier)
		VALUES ('`+id+`', 'x', 'https://example.com/', 'a-secret-of-16-or-more', gen_random_uuid(), 90, 3, 3600, 1.5)`)
	out := d.succeed(t, "endpoints", "show", id)
	assert.Regexp(t, `(?m)^Retries +3, first wait 3600s, factor 1\.5$`, out)
	assert.Regexp(t, `(?m)^Timeout +90s$`, out)
	d.exec(t, `UPDATE acme.webhook_endpoints SET timeout_seconds = NULL, max_retry_attempts = NULL, retry_backoff_seconds = NULL, retry_backoff_multiplier = NULL`)
	out = d.succeed(t, "endpoints", "show", id)
	assert.Regexp(t, `(?m)^Retries +as configured, first wait as configured, factor as configured$`, out)
	assert.Regexp(t, `(?m)^Timeout +as configured$`, out)
}

// TestReplayKilledHalfway: a bulk replay goes on where it was killed, and sends nothing twice. What the relay had in its hands when it was killed itself,
// it may send twice.
func TestReplayKilledHalfway(t *testing.T) {
	t.Parallel()
	const letters = 10_000
	var m moods
	s := newSite(t, "queue:\n  poll: 100ms\n  lease: 2s\n  batch: 200\nwindow:\n  deliveries: 2000\nbreaker:\n  failures: 1000000\n  failure_ratio: 0\n", m.answer, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	endpoint := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", endpoint, "order.created", "{}")
	m.set(endpoint, http.StatusBadRequest)
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", letters)
	s.receiver.await(ctx, t, "the dead letters", func() bool {
		var n int
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_dead_letters`).Scan(&n))
		return n == letters
	})
	m.set(endpoint, http.StatusOK)

	arrived := func() int { return s.arrivedAt(endpoint) }
	again := []string{"deadletters", "replay", "--all", "--yes", "--rate", "2500"}
	replay, _, said := s.prepare(ctx, t, again...)
	require.NoError(t, replay.Start())
	s.receiver.await(ctx, t, "the first part", func() bool { return arrived() >= letters/4 })
	require.NoError(t, replay.Process.Kill())
	require.Error(t, replay.Wait(), "it was under way")
	queued := func() (n int) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM outbox_relay.retry_queue`).Scan(&n))
		return n
	}
	s.receiver.await(ctx, t, "the end of the first part", func() bool { return queued() == 0 })
	require.Less(t, arrived(), letters)
	require.Contains(t, said.String(), "10000 dead letters of tenant acme will be sent again")
	require.LessOrEqual(t, most(s.receiver.delivered()), 1)

	replay, out, said := s.prepare(ctx, t, again...)
	require.NoError(t, replay.Start())
	s.receiver.await(ctx, t, "half of it", func() bool { return arrived() >= letters*3/4 })
	p.kill(t)
	p = startRelay(t, s.config)
	require.NoError(t, replay.Wait(), said)
	require.Contains(t, out.String(), "are queued")
	s.receiver.await(ctx, t, "all", func() bool { return arrived() == letters && queued() == 0 })
	_, exit := p.stop(t)
	require.NoError(t, exit)
	got := s.receiver.delivered()
	require.Len(t, got, letters)
	twice := 0
	for _, n := range got {
		twice += n - 1
	}
	t.Logf("%d were in flight when the relay was killed, and were sent twice", twice)
	require.LessOrEqual(t, twice, 2*200, "no more than it had claimed")
	require.LessOrEqual(t, most(got), 2)
	nothing, _, _ := s.desk(t, "deadletters", "replay", "--all", "--yes")
	require.True(t, strings.HasPrefix(nothing, "No open dead letters"), nothing)
}

// TestDiscardBesideAnother: letters that somebody else has in an open transaction neither end the command before the others are discarded, nor have it wait.
func TestDiscardBesideAnother(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, `INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, attempts, dead_at)
		SELECT gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'https://receiver.example', 'POST', '{}', 1, now() - n * interval '1 minute' FROM generate_series(1, 600) n`)
	other, err := pgx.Connect(t.Context(), d.url)
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Close(context.WithoutCancel(t.Context()))) }()
	_, err = other.Exec(t.Context(), `BEGIN; SELECT count(outbox_relay.discard('acme', delivery_id)) FROM (SELECT delivery_id FROM acme.webhook_dead_letters ORDER BY dead_at LIMIT 500) l`)
	require.NoError(t, err)
	discard := []string{"deadletters", "discard", "--all", "--yes"}
	require.Equal(t, "100 dead letters are discarded\n500 of those counted were queued, discarded or taken by somebody else meanwhile\n", d.succeed(t, discard...))
	_, err = other.Exec(t.Context(), "ROLLBACK")
	require.NoError(t, err)
	require.Equal(t, "500 dead letters are discarded\n", d.succeed(t, discard...))
}

// TestReplayBehindWhatIsQueued: letters whose deliveries are queued already are not all there is.
func TestReplayBehindWhatIsQueued(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
			VALUES ('00000000-0000-0000-0000-000000000001', 'one', 'https://receiver.example', 'a-secret-of-16-or-more', gen_random_uuid());
		INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, request_body, attempts, dead_at)
			SELECT gen_random_uuid(), gen_random_uuid(), '00000000-0000-0000-0000-000000000001', 'https://receiver.example', 'POST', '{}', '{}', 1, now() - n * interval '1 minute'
			FROM generate_series(1, 600) n;
		INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at)
			SELECT delivery_id, 'acme', webhook_endpoint_id, now() FROM acme.webhook_dead_letters ORDER BY dead_at LIMIT 500`)
	require.Equal(t, "100 dead letters are queued: outbox-relay deliveries list -t acme shows what becomes of them\n"+
		"500 of those counted were queued, discarded or taken by somebody else meanwhile\n", d.succeed(t, "deadletters", "replay", "--all", "--yes", "--rate", "0"))
}

func most(counts map[pair]int) int {
	var list []int
	for _, n := range counts {
		list = append(list, n)
	}
	return slices.Max(list)
}

// TestPauseOfWhatIsNotActive: its events would not wait, and why it was disabled is still to be read.
func TestPauseOfWhatIsNotActive(t *testing.T) {
	t.Parallel()
	const disabled, inactive = "00000000-0000-0000-0000-000000000001", "00000000-0000-0000-0000-000000000002"
	d := installed(t)
	d.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id, is_active, disabled_at, disabled_reason) VALUES
		('`+disabled+`', 'one', 'https://receiver.example', 'a-secret-of-16-or-more', gen_random_uuid(), false, now(), 'answered 410'),
		('`+inactive+`', 'two', 'https://receiver.example', 'a-secret-of-16-or-more', gen_random_uuid(), false, NULL, NULL)`)
	for _, id := range []string{disabled, inactive} {
		o := invoke(t, d.env, "endpoints", "pause", id, "--reason", "they move house")
		require.Equal(t, exitFailure, o.code, o.out)
		require.Contains(t, o.err, "endpoint "+id+" is not active: its events get no delivery that could wait\nhint: Resume it first, then pause it")
	}
	list := d.succeed(t, "endpoints", "list")
	require.Contains(t, list, "answered 410")
	require.NotContains(t, list, "they move house")

	d.succeed(t, "endpoints", "resume", disabled)
	require.Contains(t, d.succeed(t, "endpoints", "pause", disabled, "--reason", "they move house"), "its events wait")
	require.Contains(t, d.succeed(t, "endpoints", "list"), "they move house")
}

// TestRecoverRefuses what the relay could not do.
func TestRecoverRefuses(t *testing.T) {
	t.Parallel()
	const id = "00000000-0000-0000-0000-000000000001"
	d := installed(t)
	d.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id, is_active) VALUES
		('`+id+`', 'one', 'https://receiver.example', 'a-secret-of-16-or-more', gen_random_uuid(), false)`)
	recoverIt := []string{"endpoints", "recover", id, "--since", "1d", "--wait=false"}
	o := invoke(t, d.env, recoverIt...)
	require.Equal(t, exitFailure, o.code, o.out)
	require.Contains(t, o.err, "endpoint "+id+" is not active: nothing would be queued for it\nhint: Resume it first")
	d.succeed(t, "endpoints", "resume", id)
	for _, rate := range []string{"NaN", "1e-13", "-1", "inf", "1000001", "0.0009"} {
		o := invoke(t, d.env, append(recoverIt, "--rate="+rate)...)
		require.Equal(t, exitUsage, o.code, rate)
		require.Contains(t, o.err, `"--rate" flag: must be a number of deliveries a second from 0.001 to 1000000`, rate)
	}
	for _, rate := range []string{"0", "0.001", "50/s", "1000000"} {
		d.succeed(t, append(recoverIt, "--rate="+rate)...)
	}
}

func TestTenantToChoose(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, "CREATE SCHEMA zebra; SELECT outbox_relay.add_tenant('zebra')")
	o := invoke(t, d.env, "deliveries", "list")
	require.Equal(t, exitUsage, o.code)
	require.Contains(t, o.err, "name one of them with --tenant: acme, zebra")
}

// TestExplainNamesTheCommand: what it says to run can be run as it stands, whatever tenants there are.
func TestExplainNamesTheCommand(t *testing.T) {
	t.Parallel()
	const id = "00000000-0000-0000-0000-000000000001"
	d := installed(t)
	d.exec(t, `CREATE SCHEMA zebra; SELECT outbox_relay.add_tenant('zebra');
		INSERT INTO acme.webhook_event_types (event_type, category, display_name) VALUES ('a.b', 'c', 'd');
		INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id)
		VALUES ('`+id+`', 'one', 'https://receiver.example', 'a-secret-of-16-or-more', gen_random_uuid());
		INSERT INTO acme.webhook_subscriptions (endpoint_id, event_type_id, event_type) SELECT '`+id+`', t.id, t.event_type FROM acme.webhook_event_types t;
		INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, xid) VALUES ('`+id+`', 'a.b', gen_random_uuid(), 'a', NULL)`)
	_, command, ok := strings.Cut(d.succeed(t, "events", "explain", "-t", "acme", id), "queue what it missed: outbox-relay ")
	require.True(t, ok)
	command, _, _ = strings.Cut(command, "\n")
	d.succeed(t, append(strings.Fields(command), "--wait=false")...)
}
