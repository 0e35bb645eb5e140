package main

import (
	"bytes"
	"context"
	"math"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// movesConfig has little room and little patience, so that everything happens soon.
const movesConfig = `
window:
  deliveries: 40
  bytes: 1MiB
  hold: 5s
queue:
  poll: 100ms
  batch: 20
  lease: 5s
delivery:
  workers: 20
  connect_timeout: 1s
breaker:
  failures: 3
  open_for: 2s
objective:
  latency: 1s
metrics:
  per_tenant: 1
  per_endpoint: 3
validation:
  max_depth: 3
verification:
  method: head
`

func finite(_, now float64) bool { return now > 0 && !math.IsInf(now, 0) }

// phases are played one after the other.
func (w *town) phases(ctx context.Context, t *testing.T, relay, standby **relayProcess) []phase {
	t.Helper()
	_, port, _ := strings.Cut(strings.TrimPrefix(w.moody.URL, "http://"), ":")
	unlock := func() {}
	return []phase{
		{name: "start", do: func() {
			w.settle(t, "ok", w.moody.URL+"/ok", "")
			w.settle(t, "local", "http://localhost:"+port+"/ok", "max_concurrency = 4")
			w.settle(t, "slow", w.moody.URL+"/hang", "")
			w.settle(t, "fail", w.moody.URL+"/fail", "max_concurrency = 1")
			*relay = startRelay(t, w.config)
			w.leading(ctx, t)
		}, moves: map[string]move{
			"leader": is(1), "epoch": rises, "takeovers_total": is(1), `tenants{state="active"}`: is(2), `endpoints{state="active"}`: is(4),
			`database_connections{state="idle"}`: rises, "database_connections_opened_total": rises, "database_waits_total": rises,
			"database_wait_seconds_total": rises, "database_connections_limit": is(6), "in_flight_limit": is(20), "claimed_limit_deliveries": is(40),
			"window_limit_deliveries": is(40), "window_limit_bytes": is(1 << 20), "objective_latency_seconds": is(1),
			`slot_wal_status{status="reserved"}`: is(1), "slot_retained_bytes": rises, "slot_safe_bytes": finite,
		}},
		{name: "all is well", do: func() {
			w.send(t, "ok", 5)
			w.insertMany(t, "acme", "nobody", 3)
			w.insertMany(t, "acme", "local", 30)
			w.receiver.await(ctx, t, "the record", func() bool { return w.delivered(ctx, t, "local") == 30 })
			w.insertData(t, "local", `jsonb_build_object('note', repeat('x', 40000))`) // too large for the connections of before: the name is known by now
		}, moves: map[string]move{
			`events_total{matched="true"}`: by(36), `events_total{matched="false"}`: by(3), "dispatched_total": by(36), `deliveries_total{status="success"}`: by(36),
			`attempts_total{class="success"}`: by(36), "attempt_duration_seconds": by(36), "commit_to_read_seconds": by(39), "commit_to_attempt_seconds": by(36),
			"commit_to_answer_seconds": by(36), "commit_to_record_seconds": by(36), "record_flush_seconds": rises, "record_flush_outcomes": rises,
			"objective_deliveries_total": by(36), "objective_met_total": rises, // not by all, if the machine stands still for a while
			`tenant_attempts_total{class="success",tenant="acme"}`: by(36), `tenant_deliveries_total{status="success",tenant="acme"}`: by(36),
			`tenant_commit_to_answer_seconds{tenant="acme"}`: by(36), `tenant_objective_deliveries_total{tenant="acme"}`: by(36), `tenant_objective_met_total{tenant="acme"}`: rises,
			"endpoint_attempts_total": by(36), "endpoint_deliveries_total": by(36), "endpoint_commit_to_answer_seconds": by(36),
			"endpoint_objective_deliveries_total": by(36), "endpoint_objective_met_total": rises,
			"connections_opened_total": rises, "connections_open": rises, "connections_reused_total": rises, "dns_lookups_total": rises, "dns_cache_hits_total": rises,
		}},
		{name: "a receiver that hangs", do: func() {
			w.send(t, "slow", 4)
		}, moves: map[string]move{
			"in_flight": rises, "attempts_in_flight": rises, "window_deliveries": rises, "window_bytes": rises, "restart_lag_seconds": rises,
			`deliveries_total{status="leased"}`: rises, "queue_deliveries": rises, "objective_deliveries_total": by(4),
		}},
		{name: "it answers late", do: w.moody.letGo, moves: map[string]move{
			"objective_unanswered_total": rises, `tenant_objective_unanswered_total{tenant="acme"}`: rises, "endpoint_objective_unanswered_total": rises,
			"in_flight": toZero, "window_deliveries": toZero, "window_bytes": toZero, "restart_lag_seconds": toZero,
		}},
		{name: "a database that cannot record", do: func() {
			tx, err := w.pool.Begin(ctx)
			require.NoError(t, err)
			_, err = tx.Exec(ctx, "LOCK TABLE outbox_relay.progress IN EXCLUSIVE MODE")
			require.NoError(t, err)
			unlock = func() { require.NoError(t, tx.Rollback(ctx)) }
			t.Cleanup(func() { _ = tx.Rollback(context.Background()) }) // or the pool waits for it, if this fails
			w.send(t, "ok", 300)                                        // more than window, reserve and deferrals hold
		}, moves: map[string]move{
			"record_errors_total": rises, "record_pending": rises, "slot_lag_bytes": rises, "slot_lag_seconds": rises, `database_connections{state="acquired"}`: rises,
		}},
		{name: "it can again", do: func() { unlock() }, moves: map[string]move{"record_pending": toZero, "slot_lag_seconds": toZero}},
		{name: "a receiver that fails", do: func() {
			w.insertMany(t, "acme", "fail", 60)
		}, moves: map[string]move{
			`attempts_total{class="http_5xx"}`: rises, `deliveries_total{status="retrying"}`: rises, "breakers_open": is(1), `deferred_total{reason="breaker"}`: rises,
			`deliveries_total{status="pending"}`: rises, "queue_deliveries": rises, "claimed_total": rises, `deliveries_total{status="failed"}`: rises,
		}},
		{name: "its backlog waits", do: func() {
			w.moody.keep()
			w.exec(t, `UPDATE acme.webhook_endpoints SET endpoint_url = $2 WHERE id = $1`, w.ids["fail"], w.moody.URL+"/hang")
		}, moves: map[string]move{
			"breakers_half_open": is(1), "breakers_open": toZero, "claimed_deliveries": rises,
		}},
		{name: "it recovers", do: func() {
			w.exec(t, `UPDATE acme.webhook_endpoints SET endpoint_url = $2 WHERE id = $1`, w.ids["fail"], w.moody.URL+"/ok")
			w.moody.letGo()
		}, moves: map[string]move{
			"breakers_half_open": toZero, "claimed_deliveries": toZero, "queue_deliveries": toZero, "queue_due_deliveries": toZero,
		}},
		{name: "the dead letter is sent again", do: func() {
			require.Positive(t, w.count(ctx, t, `SELECT outbox_relay.replay('acme', $1)`, w.ids["fail"]))
		}, moves: map[string]move{"replays_total": rises}},
		{name: "limits", do: func() {
			w.settle(t, "rated", w.moody.URL+"/ok", "rate_limit_per_second = 5")
			w.settle(t, "busy", w.moody.URL+"/busy", "max_retry_attempts = 10")
			w.insertMany(t, "acme", "rated", 35)
			unlock = w.holdQueued(ctx, t, "rated")
			w.send(t, "busy", 3)
		}, moves: map[string]move{
			"queue_due_deliveries": rises, "queue_oldest_due_seconds": rises, `deferred_total{reason="rate"}`: rises, `attempts_total{class="http_429"}`: rises, `endpoint_deliveries_total{endpoint="other",tenant="other",status="success"}`: rises,
		}},
		{name: "nobody holds them", do: func() { unlock() }, moves: map[string]move{"queue_due_deliveries": toZero, "queue_oldest_due_seconds": toZero}},
		{name: "nobody there", do: func() {
			w.settle(t, "closed", "http://127.0.0.1:1/", "")
			w.settle(t, "nameless", "http://nobody.invalid/", "")
			w.send(t, "closed", 1)
			w.send(t, "nameless", 1)
		}, moves: map[string]move{
			`connection_errors_total{stage="connect"}`: rises, "dns_lookup_errors_total": rises, `attempts_total{class="connect"}`: rises,
		}},
		{name: "a kept connection ends", do: func() {
			w.settle(t, "quits", quitter(t), "")
			w.send(t, "quits", 1)
			w.receiver.await(ctx, t, "the record", func() bool { return w.delivered(ctx, t, "quits") == 1 })
			w.send(t, "quits", 1)
		}, moves: map[string]move{"attempt_resends_total": rises}},
		{name: "people at work", do: func() {
			w.settle(t, "paused", w.moody.URL+"/ok", "")
			w.exec(t, `SELECT outbox_relay.pause_endpoint('acme', $1)`, w.ids["paused"])
			w.settle(t, "off", w.moody.URL+"/ok", "is_active = false")
			w.settle(t, "bad", w.moody.URL+"/ok", `custom_headers = '{"bad header": "x"}'`)
			w.send(t, "paused", 1)
			w.command(t, "tenants", "pause", "quiet")
		}, moves: map[string]move{
			`deferred_total{reason="paused"}`: rises, `endpoints{state="paused"}`: is(1), `endpoints{state="inactive"}`: is(1), `endpoints{state="invalid"}`: is(1),
			"invalid_rows_total": rises, `tenants{state="paused"}`: is(1),
		}},
		{name: "what may not be sent", do: func() {
			w.insertData(t, "ok", `'{"a": {"b": {"c": {"d": 1}}}}'`)
		}, moves: map[string]move{`invalid_events_total{code="event_invalid"}`: rises}},
		{name: "receivers that are asked", do: func() {
			w.settle(t, "agrees", w.moody.URL+"/ok", "is_verified = false")
			w.settle(t, "refuses", w.moody.URL+"/fail", "is_verified = false")
		}, moves: map[string]move{`verifications_total{verified="true"}`: rises, `verifications_total{verified="false"}`: rises}},
		{name: "a configuration with a fault", do: func() { w.configure(t, "log: {level: loud}\n") }, moves: map[string]move{"config_reload_success": is(0)}},
		{name: "one without", do: func() { w.configure(t, "") }, moves: map[string]move{"config_reload_success": is(1), "config_reload_timestamp_seconds": rises}},
		{name: "an endpoint is gone", do: func() {
			w.exec(t, `DELETE FROM acme.webhook_endpoints WHERE id = $1`, w.ids["off"])
		}, moves: map[string]move{`endpoints{state="inactive"}`: is(0)}},
		{name: "a takeover", do: func() { w.takeOver(ctx, t, relay, standby) }, moves: map[string]move{
			"leader": is(1), "takeovers_total": is(1), "epoch": rises, "repeated_total": rises,
		}},
		{name: "the slot is dropped", do: func() {
			w.moody.letGo()
			w.receiver.await(ctx, t, "the slot to be free", func() bool {
				w.exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", w.slot)
				_, err := w.pool.Exec(ctx, "SELECT pg_drop_replication_slot($1)", w.slot)
				return err == nil
			})
		}, moves: map[string]move{"heals_total": rises, "takeovers_total": rises, `deferred_total{reason="backfill"}`: rises}},
		{name: "the log has not carried it", do: func() { w.hide(ctx, t) }, moves: map[string]move{
			"audit_findings_total": is(3), `deferred_total{reason="audit"}`: rises,
		}},
		{name: "the log is written", do: func() {
			w.exec(t, `CREATE TABLE ballast AS SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n`)
		}, moves: map[string]move{"slot_safe_bytes": finite, "slot_time_left_seconds": finite}},
	}
}

// insertData commits an event whose data is an expression.
func (w *town) insertData(t *testing.T, eventType, data string) {
	t.Helper()
	w.exec(t, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
		VALUES (gen_random_uuid(), $1, gen_random_uuid(), 'order', `+data+`)`, eventType)
}

// configure has the relay read a configuration with something more.
func (w *town) configure(t *testing.T, more string) {
	t.Helper()
	require.NoError(t, os.WriteFile(w.config, append(bytes.Clone(w.yaml), more...), 0o600))
}

// holdQueued keeps deliveries of an endpoint that wait from being claimed.
func (w *town) holdQueued(ctx context.Context, t *testing.T, name string) (letGo func()) {
	t.Helper()
	tx, err := w.pool.Begin(ctx)
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback(context.Background()) })
	w.receiver.await(ctx, t, "deliveries that wait", func() bool {
		tag, err := tx.Exec(ctx, `SELECT FROM outbox_relay.retry_queue WHERE endpoint_id = $1 AND leased_by IS NULL FOR UPDATE SKIP LOCKED`, w.ids[name])
		require.NoError(t, err)
		return tag.RowsAffected() > 0
	})
	return func() { require.NoError(t, tx.Rollback(ctx)) }
}

// takeOver has a second relay stand by, kills the first while an older commit is not recorded and newer ones are, and has the second one at work.
func (w *town) takeOver(ctx context.Context, t *testing.T, relay, standby **relayProcess) {
	t.Helper()
	*standby = startRelay(t, w.config)
	w.receiver.await(ctx, t, "a relay that stands by", func() bool { return strings.Contains((*standby).said(t), "standing by") })
	before := w.delivered(ctx, t, "ok")
	w.moody.keep()
	w.send(t, "slow", 1)
	w.insertMany(t, "acme", "ok", 10)
	w.receiver.await(ctx, t, "the record of what came behind", func() bool { return w.delivered(ctx, t, "ok") == before+10 })
	(*relay).kill(t)
	*relay = *standby
}

// hide commits events that the log does not carry, and has the relay look at what it has handled.
func (w *town) hide(ctx context.Context, t *testing.T) {
	t.Helper()
	cut := func() {
		w.exec(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active", w.slot)
	}
	checkpoint := func() {
		var now string
		require.NoError(t, w.pool.QueryRow(ctx, "SELECT pg_current_snapshot()::text").Scan(&now))
		cut()
		w.receiver.await(ctx, t, "a checkpoint", func() (saved bool) {
			require.NoError(t, w.pool.QueryRow(ctx, `SELECT coalesce(pg_snapshot_xmax(snapshot) >= pg_snapshot_xmax($1::pg_snapshot), false)
				FROM outbox_relay.progress WHERE slot = $2`, now, w.slot).Scan(&saved))
			return saved
		})
	}
	checkpoint()
	w.exec(t, "ALTER PUBLICATION outbox_relay_events SET (publish = 'delete')")
	w.insertMany(t, "acme", "ok", 3)
	w.exec(t, "ALTER PUBLICATION outbox_relay_events SET (publish = 'insert')")
	checkpoint()
}
