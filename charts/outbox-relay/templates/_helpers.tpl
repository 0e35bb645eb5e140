{{- define "outbox-relay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* Names are cut so that "-migrate", the longest end, still fits. */}}
{{- define "outbox-relay.fullname" -}}
{{- $name := include "outbox-relay.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 55 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 55 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 55 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "outbox-relay.selectorLabels" -}}
app.kubernetes.io/name: {{ include "outbox-relay.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "outbox-relay.labels" -}}
{{ include "outbox-relay.selectorLabels" . }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | trunc 63 | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "outbox-relay.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- .Values.serviceAccount.name | default (include "outbox-relay.fullname" .) }}
{{- else }}
{{- .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{- define "outbox-relay.image" -}}
{{- if .Values.image.digest }}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}
{{- end }}

{{- /* A sidecar shares the pod with the application, which has a port called metrics already, as likely as not. */}}
{{- define "outbox-relay.portName" -}}
{{- ternary "relay-metrics" "metrics" (eq .Values.mode "sidecar") }}
{{- end }}

{{- /* The configuration file. What the chart knows better than the operator comes first. */}}
{{- define "outbox-relay.config" -}}
{{- $file := dict "log" (dict "format" "json") }}
{{- $file = mustMergeOverwrite $file (deepCopy .Values.config) }}
{{- $_ := set $file "server" (dict "listen" (printf ":%d" (int .Values.port))) }}
{{- if .Values.databases }}
{{- $list := list }}
{{- range .Values.databases }}
{{- $list = append $list (mustMerge (dict "name" .name) (get . "config" | default dict | deepCopy)) }}
{{- end }}
{{- $_ := set $file "databases" $list }}
{{- end }}
{{- toYaml $file }}
{{- end }}

{{- define "outbox-relay.secretName" -}}
{{- if .Values.database.existingSecret }}
{{- .Values.database.existingSecret }}
{{- else if .Values.database.url }}
{{- include "outbox-relay.fullname" . }}
{{- else if not .Values.databases }}
{{- fail "database.existingSecret: is required: the name of a Secret whose key url holds the DSN of the database (kubectl create secret generic NAME --from-literal=url=postgres://…), or give databases" }}
{{- end }}
{{- end }}

{{- define "outbox-relay.secretVariable" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
{{- end }}

{{- /* The DSNs, which hold passwords and so are not in the file. One that is in a file of its own is not given twice. */}}
{{- define "outbox-relay.databaseVariables" -}}
{{- if .Values.databases }}
{{- range .Values.databases }}
{{- $prefix := printf "OUTBOX_RELAY_DATABASES_%s" (.name | upper | replace "-" "_") }}
{{- $secret := .existingSecret }}
{{- if not (dig "config" "url_file" "" .) }}
{{ include "outbox-relay.secretVariable" (dict "name" (printf "%s_URL" $prefix) "secret" $secret "key" (get . "key" | default "url")) }}
{{- end }}
{{- with get . "replicationKey" }}
{{ include "outbox-relay.secretVariable" (dict "name" (printf "%s_REPLICATION_URL" $prefix) "secret" $secret "key" .) }}
{{- end }}
{{- end }}
{{- else }}
{{- if not (dig "database" "url_file" "" .Values.config) }}
{{ include "outbox-relay.secretVariable" (dict "name" "OUTBOX_RELAY_DATABASE_URL" "secret" (include "outbox-relay.secretName" .) "key" .Values.database.key) }}
{{- end }}
{{- with .Values.database.replicationKey }}
{{- $secret := include "outbox-relay.secretName" $ }}
{{ include "outbox-relay.secretVariable" (dict "name" "OUTBOX_RELAY_DATABASE_REPLICATION_URL" "secret" $secret "key" .) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Whole seconds of a duration such as 1m30s: templates cannot parse one, but can add one to a date. */}}
{{- define "outbox-relay.seconds" -}}
{{- $date := toDate "2006-01-02" "2000-01-01" }}
{{- sub (mustDateModify . $date | unixEpoch) ($date | unixEpoch) }}
{{- end }}

{{- /* What a stop takes at most: attempts in flight may finish, then their outcomes are recorded. */}}
{{- define "outbox-relay.stopSeconds" -}}
{{- $drain := dig "shutdown" "drain" "20s" .Values.config }}
{{- $record := dig "record" "timeout" "10s" .Values.config }}
{{- add (include "outbox-relay.seconds" $drain) (include "outbox-relay.seconds" $record) }}
{{- end }}

{{- /* The pod's grace period. For a sidecar, the application's own time comes on top if it is native, as it is stopped after the application. */}}
{{- define "outbox-relay.gracePeriodSeconds" -}}
{{- $stop := include "outbox-relay.stopSeconds" . | int }}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds }}
{{- add $stop 5 }}
{{- else if lt (int .Values.terminationGracePeriodSeconds) $stop }}
{{- fail (printf "terminationGracePeriodSeconds: %d: must be at least %d: shutdown.drain and record.timeout of config together, or what is in flight is killed and sent again; lower config.shutdown.drain, or leave it out" (int .Values.terminationGracePeriodSeconds) $stop) }}
{{- else }}
{{- int .Values.terminationGracePeriodSeconds }}
{{- end }}
{{- end }}

{{- /* Nine tenths of the memory limit in bytes: the rest is for what Go does not count. */}}
{{- define "outbox-relay.goMemLimit" -}}
{{- if .Values.goMemLimit }}
{{- .Values.goMemLimit }}
{{- else }}
{{- $limit := dig "limits" "memory" "" (.Values.resources | default dict) }}
{{- $limit = ternary $limit (int64 $limit | toString) (kindIs "string" $limit) }}
{{- if $limit }}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" $limit }}
{{- $unit := trimPrefix $number $limit }}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- if or (not $number) (not (hasKey $units $unit)) }}
{{- fail (printf "resources.limits.memory: %q: write a number and a unit of Ki, Mi, Gi, k, M or G, such as 384Mi, or set goMemLimit" $limit) }}
{{- end }}
{{- mulf $number (get $units $unit) 0.9 | floor | int64 }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What a running relay does not take on, as config.example.yaml lists it: a test compares the two. */}}
{{- define "outbox-relay.restartKeys" -}}
database databases tenants delivery.workers delivery.max_connections delivery.max_connections_per_host delivery.keep_alive delivery.dns_cache delivery.tls window queue.lease verification network.proxy network.proxy_file validation objective metrics server log.format
{{- end }}

{{- /* Annotations that restart the pods where one of these has changed. */}}
{{- define "outbox-relay.podAnnotations" -}}
{{- if .Values.restartOnConfigChange -}}
{{- $config := include "outbox-relay.config" . | fromYaml }}
{{- $kept := dict }}
{{- range $key := include "outbox-relay.restartKeys" . | splitList " " }}
{{- $value := $config }}
{{- range $key | splitList "." }}
{{- $value = get ($value | default dict) . }}
{{- end }}
{{- $_ := set $kept $key $value }}
{{- end -}}
checksum/outbox-relay: {{ $kept | toJson | sha256sum }}
{{- end }}
{{- end }}

{{- define "outbox-relay.volumes" -}}
- name: outbox-relay-config
  configMap:
    name: {{ include "outbox-relay.fullname" . }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* A probe of one page, with the times of the values. */}}
{{- define "outbox-relay.probe" -}}
httpGet:
  path: {{ .path }}
  port: {{ .port }}
{{ toYaml .times }}
{{- end }}

{{- /* The container, but for what differs between the modes: its probes. */}}
{{- define "outbox-relay.container" -}}
name: outbox-relay
image: {{ include "outbox-relay.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
  - run
  - --config=/etc/outbox-relay/config.yaml
  - --patient
  {{- with .Values.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
env:
  {{- include "outbox-relay.databaseVariables" . | trim | nindent 2 }}
  {{- with include "outbox-relay.goMemLimit" . }}
  - name: GOMEMLIMIT
    value: {{ . | quote }}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - name: {{ include "outbox-relay.portName" . }}
    containerPort: {{ int .Values.port }}
    protocol: TCP
livenessProbe:
  {{- include "outbox-relay.probe" (dict "path" "/livez" "port" (include "outbox-relay.portName" .) "times" .Values.livenessProbe) | nindent 2 }}
{{- with .Values.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - name: outbox-relay-config
    mountPath: /etc/outbox-relay
    readOnly: true
  {{- with .Values.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
