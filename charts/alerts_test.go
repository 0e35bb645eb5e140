package charts_test

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// alertCases give each alert an hour in which it has to fire, and one in which it must not. A series is its values at each minute: 0x60 is sixty-one zeros,
// 0+6x60 rises by six a minute.
func alertCases() map[string]struct{ fires, silent string } {
	return map[string]struct{ fires, silent string }{
		"OutboxRelayAbsent": {
			fires:  `outbox_relay_epoch{pod="a"} 1x60`,
			silent: `outbox_relay_leader{pod="a"} 0x60`,
		},
		"OutboxRelayNoLeader": {
			fires: `outbox_relay_leader{pod="a",database="orders"} 0x60
				outbox_relay_leader{pod="b",database="orders"} 0x60
				outbox_relay_leader{pod="b",database="billing"} 1x60`,
			silent: `outbox_relay_leader{pod="a"} 0x30 1x30
				outbox_relay_leader{pod="b"} 1x30 0x30`, // a takeover
		},
		"OutboxRelayBehind": {
			fires:  `outbox_relay_slot_lag_seconds{pod="a"} 400x60`,
			silent: `outbox_relay_slot_lag_seconds{pod="a"} 20x60`,
		},
		"OutboxRelaySlotRunsOut": {
			fires: `outbox_relay_slot_time_left_seconds{pod="a"} 1800x60
				outbox_relay_slot_retained_bytes{pod="a"} 1000000x60`,
			silent: `outbox_relay_slot_time_left_seconds{pod="a"} 0x60
				outbox_relay_slot_retained_bytes{pod="a"} 0x60`, // the database has not been asked yet
		},
		"OutboxRelaySlotLost": {
			fires: `outbox_relay_slot_wal_status{pod="a",status="missing"} 1x60
				outbox_relay_slot_wal_status{pod="a",status="reserved"} 0x60`,
			silent: `outbox_relay_slot_wal_status{pod="a",status="missing"} 0x60
				outbox_relay_slot_wal_status{pod="a",status="extended"} 1x60`,
		},
		"OutboxRelayCannotRecord": {
			fires:  `outbox_relay_record_errors_total{pod="a"} 0+2x60`,
			silent: `outbox_relay_record_errors_total{pod="a"} 5x60`,
		},
		"OutboxRelayDeliveriesFail": {
			fires: `outbox_relay_attempts_total{pod="a",class="success"} 0+60x60
				outbox_relay_attempts_total{pod="a",class="http_5xx"} 0+60x60`,
			silent: `outbox_relay_attempts_total{pod="a",class="success"} 0+600x60
				outbox_relay_attempts_total{pod="a",class="http_5xx"} 0+6x60
				outbox_relay_attempts_total{job="quiet",class="success"} 0x60
				outbox_relay_attempts_total{job="quiet",class="timeout"} 0+1x60`, // one attempt a minute says nothing
		},
		"OutboxRelayObjectiveMissed": {
			fires: `outbox_relay_objective_deliveries_total{pod="a"} 0+60x60
				outbox_relay_objective_met_total{pod="a"} 0+50x60
				outbox_relay_objective_unanswered_total{pod="a"} 0x60`,
			silent: `outbox_relay_objective_deliveries_total{pod="a"} 0+60x60
				outbox_relay_objective_met_total{pod="a"} 0+30x60
				outbox_relay_objective_unanswered_total{pod="a"} 0+29x60
				outbox_relay_objective_deliveries_total{job="over"} 0+60x60
				outbox_relay_objective_met_total{job="over"} 0+20x40 860+60x20
				outbox_relay_objective_unanswered_total{job="over"} 0x60
				outbox_relay_objective_deliveries_total{job="quiet"} 0+1x60
				outbox_relay_objective_met_total{job="quiet"} 0x60
				outbox_relay_objective_unanswered_total{job="quiet"} 0x60`, // receivers that do not answer; what is over; a few
		},
		"OutboxRelayDeliveriesWait": {
			fires:  `outbox_relay_queue_oldest_due_seconds{pod="a"} 900x60`,
			silent: `outbox_relay_queue_oldest_due_seconds{pod="a"} 30x60`,
		},
		"OutboxRelayDeadLetters": {
			fires: `outbox_relay_deliveries_total{pod="a",status="failed"} 7x29 9x30`,
			silent: `outbox_relay_deliveries_total{pod="a",status="failed"} 7x60
				outbox_relay_deliveries_total{pod="a",status="success"} 0+60x60`,
		},
		"OutboxRelayTenantSuspended": {
			fires: `outbox_relay_tenants{pod="a",state="suspended"} 0x60
				outbox_relay_tenants{pod="b",state="suspended"} 1x60
				outbox_relay_tenants{pod="b",state="active"} 9x60`,
			silent: `outbox_relay_tenants{pod="a",state="suspended"} 0x20 2x10 0x30
				outbox_relay_tenants{pod="a",state="paused"} 3x60`, // a migration had its table
		},
		"OutboxRelayHealed": {
			fires:  `outbox_relay_heals_total{pod="a"} 0x29 1x30`,
			silent: `outbox_relay_heals_total{pod="a"} 1x60`,
		},
		"OutboxRelayAuditFound": {
			fires:  `outbox_relay_audit_findings_total{pod="a"} 0x29 12x30`,
			silent: `outbox_relay_audit_findings_total{pod="a"} 12x60`,
		},
		"OutboxRelayConfigNotReloaded": {
			fires: `outbox_relay_config_reload_success{pod="a"} 0x60
				outbox_relay_config_reload_success{pod="b"} 1x60`,
			silent: `outbox_relay_config_reload_success{pod="a"} 1x20 0x5 1x35`, // somebody was writing it
		},
	}
}

// TestAlertsFire when they should, for as long as they ask for, and are silent otherwise; relays of another namespace are none of their business.
func TestAlertsFire(t *testing.T) {
	t.Parallel()
	rules := alerts(t, minimal+"prometheusRule: {enabled: true}\n")
	cases := alertCases()
	assert.Len(t, rules, len(cases))
	for _, rule := range rules {
		t.Run(rule.Alert, func(t *testing.T) {
			t.Parallel()
			var patience time.Duration
			if rule.For != nil {
				var err error
				patience, err = time.ParseDuration(string(*rule.For))
				require.NoError(t, err)
			}
			tc := cases[rule.Alert]
			fires := func(namespace, series string) bool {
				return holds(t, rule.Expr.String(), namespace, series, time.Hour-patience) && holds(t, rule.Expr.String(), namespace, series, time.Hour)
			}
			assert.True(t, fires("sales", tc.fires), "it does not fire")
			assert.False(t, fires("sales", tc.silent), "it fires for nothing")
			if rule.Alert != "OutboxRelayAbsent" {
				assert.False(t, fires("elsewhere", tc.fires), "it fires for others")
			}
		})
	}
}

// holds tells whether an expression finds anything at a time of the hour.
func holds(t *testing.T, expr, namespace, series string, at time.Duration) bool {
	t.Helper()
	var load strings.Builder
	load.WriteString("load 1m\n")
	for line := range strings.Lines(series) {
		line = strings.Replace(strings.TrimSpace(line), "{", `{namespace="`+namespace+`",`, 1)
		if !strings.Contains(line, "job=") {
			line = strings.Replace(line, "{", `{job="shop",`, 1)
		}
		load.WriteString("  " + line + "\n")
	}
	storage := promqltest.LoadedStorage(t, load.String())
	defer func() { assert.NoError(t, storage.Close()) }()
	engine := promqltest.NewTestEngineWithOpts(t, promql.EngineOpts{MaxSamples: 100_000, Timeout: time.Minute})
	query, err := engine.NewInstantQuery(t.Context(), storage, nil, expr, time.Unix(0, 0).Add(at))
	require.NoError(t, err)
	defer query.Close()
	result := query.Exec(t.Context())
	require.NoError(t, result.Err)
	vector, err := result.Vector()
	require.NoError(t, err)
	return len(vector) > 0
}
