{{- /*
The alerts, a list of rules. Each sums up all relays of a job: a slot is led if any replica leads it, and what is read from the database is the same in all
of them. A relay has no label database or shard unless it has several.
*/}}
{{- define "outbox-relay.alerts" -}}
{{- $in := .Values.prometheusRule.matchers | default (printf "namespace=%q" .Release.Namespace) }}
{{- $slot := "namespace, job, database, shard" }}
{{- $database := "namespace, job, database" }}
{{- with .Values.prometheusRule }}
- alert: OutboxRelayAbsent
  expr: absent(outbox_relay_leader{ {{- $in -}} })
  for: 5m
  labels:
    severity: critical
  annotations:
    summary: Nothing is heard of any relay
    description: No relay is scraped, so none may be running. Events stay in the database, and the log that the slot needs piles up.
- alert: OutboxRelayNoLeader
  expr: max by ({{ $slot }}) (outbox_relay_leader{ {{- $in -}} }) < 1
  for: 2m
  labels:
    severity: critical
  annotations:
    summary: No relay reads the log of {{`{{ $labels.job }} {{ $labels.database }} {{ $labels.shard }}`}}
    description: Relays run, but none leads the slot, so new events are not delivered. /readyz and the log say why.
- alert: OutboxRelayBehind
  expr: max by ({{ $slot }}) (outbox_relay_slot_lag_seconds{ {{- $in -}} }) > {{ .slotLagSeconds }}
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: New events of {{`{{ $labels.job }} {{ $labels.database }} {{ $labels.shard }}`}} are {{`{{ $value | humanizeDuration }}`}} late
    description: The relay reads the log more slowly than it is written, or cannot record what it has delivered.
- alert: OutboxRelaySlotRunsOut
  expr: |-
    min by ({{ $slot }}) (outbox_relay_slot_time_left_seconds{ {{- $in -}} }) < {{ .slotTimeLeftSeconds }}
    and max by ({{ $slot }}) (outbox_relay_slot_retained_bytes{ {{- $in -}} }) > 0
  for: 5m
  labels:
    severity: critical
  annotations:
    summary: The log kept for the slot of {{`{{ $labels.job }} {{ $labels.database }} {{ $labels.shard }}`}} is too much in {{`{{ $value | humanizeDuration }}`}}
    description: At the present rate the server then drops the slot (max_slot_wal_keep_size), or its disk is in danger (database.wal_budget).
- alert: OutboxRelaySlotLost
  expr: max by ({{ $slot }}) (outbox_relay_slot_wal_status{ {{- $in }},status=~"lost|missing"}) == 1
  for: 5m
  labels:
    severity: critical
  annotations:
    summary: The slot of {{`{{ $labels.job }} {{ $labels.database }} {{ $labels.shard }}`}} is gone and has not been made anew
    description: A relay that leads makes a new slot and queues what was missed, within seconds. None has done so.
- alert: OutboxRelayCannotRecord
  expr: sum by ({{ $database }}) (rate(outbox_relay_record_errors_total{ {{- $in -}} }[5m])) > 0
  for: 5m
  labels:
    severity: critical
  annotations:
    summary: Outcomes of {{`{{ $labels.job }} {{ $labels.database }}`}} cannot be recorded
    description: Deliveries wait in memory up to the window, then the stream waits. What is delivered and not recorded is sent again after a restart.
- alert: OutboxRelayDeliveriesFail
  expr: |-
    sum by (namespace, job) (rate(outbox_relay_attempts_total{ {{- $in }},class="success"}[15m]))
    / (sum by (namespace, job) (rate(outbox_relay_attempts_total{ {{- $in -}} }[15m])) > 0.1) < {{ .successRatio }}
  for: 15m
  labels:
    severity: warning
  annotations:
    summary: Only {{`{{ $value | humanizePercentage }}`}} of the attempts of {{`{{ $labels.job }}`}} succeed
    description: Many receivers fail, or one that is called a lot. They are called again, and endpoints that only fail are left alone for a while.
- alert: OutboxRelayObjectiveMissed
  expr: |-
    {{- $missed := .objectiveMissedRatio }}
    {{- range $window := list "1h" "5m" }}
    {{- if ne $window "1h" }}
    and
    {{- end }}
    1 - (sum by (namespace, job) (rate(outbox_relay_objective_met_total{ {{- $in -}} }[{{ $window }}]))
    + sum by (namespace, job) (rate(outbox_relay_objective_unanswered_total{ {{- $in -}} }[{{ $window }}])))
    / (sum by (namespace, job) (rate(outbox_relay_objective_deliveries_total{ {{- $in -}} }[{{ $window }}])) > 0.1) > {{ $missed }}
    {{- end }}
  labels:
    severity: warning
  annotations:
    summary: '{{`{{ $value | humanizePercentage }}`}} of the deliveries of {{`{{ $labels.job }}`}} missed objective.latency by no fault of a receiver that was asked'
    description: They began too late, or have not begun - for an hour already, and still.
- alert: OutboxRelayDeliveriesWait
  expr: max by ({{ $database }}) (outbox_relay_queue_oldest_due_seconds{ {{- $in -}} }) > {{ .oldestDueSeconds }}
  for: 5m
  labels:
    severity: warning
  annotations:
    summary: A delivery of {{`{{ $labels.job }} {{ $labels.database }}`}} has been due for {{`{{ $value | humanizeDuration }}`}}
    description: The retry queue is not worked as fast as it fills. Endpoints whose breaker is open are not the cause, they do not count.
- alert: OutboxRelayDeadLetters
  expr: sum by ({{ $database }}) (increase(outbox_relay_deliveries_total{ {{- $in }},status="failed"}[1h])) > 0
  labels:
    severity: warning
  annotations:
    summary: '{{`{{ $value | humanize }}`}} deliveries of {{`{{ $labels.job }} {{ $labels.database }}`}} were given up in the last hour'
    description: They are dead letters, and stay until somebody replays or discards them.
- alert: OutboxRelayTenantSuspended
  expr: max by ({{ $slot }}) (outbox_relay_tenants{ {{- $in }},state="suspended"}) > 0
  for: 15m
  labels:
    severity: warning
  annotations:
    summary: '{{`{{ $labels.job }} {{ $labels.database }} {{ $labels.shard }}`}} has suspended tenants: {{`{{ $value | humanize }}`}}'
    description: Their tables cannot be worked with, so nothing new of theirs is delivered. Their events stay in the tables, and are queued once that is mended.
- alert: OutboxRelayHealed
  expr: sum by ({{ $slot }}) (increase(outbox_relay_heals_total{ {{- $in -}} }[1h])) > 0
  labels:
    severity: warning
  annotations:
    summary: The slot of {{`{{ $labels.job }} {{ $labels.database }} {{ $labels.shard }}`}} was gone, and has been made anew
    description: Nothing is lost, what was missed is queued from the tables. But somebody or something has dropped or moved the slot.
- alert: OutboxRelayAuditFound
  expr: sum by ({{ $slot }}) (increase(outbox_relay_audit_findings_total{ {{- $in -}} }[1h])) > 0
  labels:
    severity: warning
  annotations:
    summary: '{{`{{ $value | humanize }}`}} events of {{`{{ $labels.job }} {{ $labels.database }} {{ $labels.shard }}`}} had no delivery and should have had'
    description: They are queued now. Somebody has changed what the publications carry, or deleted records.
- alert: OutboxRelayConfigNotReloaded
  expr: min by (namespace, job) (outbox_relay_config_reload_success{ {{- $in -}} }) < 1
  for: 10m
  labels:
    severity: warning
  annotations:
    summary: A relay of {{`{{ $labels.job }}`}} does not use its configuration as it is now
    description: It has a fault, and what was read before stays in use. A relay that restarts would not come up.
{{- end }}
{{- end }}
