{{- /*
What an application's chart includes into its own pods. It has this chart as a dependency, whose values say mode: sidecar, and hands on the scope of
that dependency, (index .Subcharts "outbox-relay"):

  metadata:
    annotations: {{- include "outbox-relay.podAnnotations" (index .Subcharts "outbox-relay") | nindent 8 }}
  spec:
    initContainers: {{- include "outbox-relay.nativeSidecar" (index .Subcharts "outbox-relay") | nindent 8 }}
    volumes: {{- include "outbox-relay.volumes" (index .Subcharts "outbox-relay") | nindent 8 }}
*/}}

{{- define "outbox-relay.sidecarOnly" -}}
{{- if ne .Values.mode "sidecar" }}
{{- fail (printf "mode: %s: must be sidecar where a chart includes the sidecar: the dependency would bring a Deployment of its own as well" .Values.mode) }}
{{- end }}
{{- end }}

{{- /* For initContainers: it is up before the application's containers begin, and is stopped after they have ended. */}}
{{- define "outbox-relay.nativeSidecar" -}}
{{- include "outbox-relay.sidecarOnly" . }}
{{- if semverCompare "<1.29.0-0" .Capabilities.KubeVersion.Version }}
{{- fail (printf "outbox-relay.nativeSidecar needs Kubernetes 1.29, this is %s: include outbox-relay.classicSidecar into containers instead" .Capabilities.KubeVersion.Version) }}
{{- end -}}
- {{ include "outbox-relay.container" . | nindent 2 | trim }}
  restartPolicy: Always
  startupProbe:
    {{- include "outbox-relay.probe" (dict "path" "/livez" "port" (include "outbox-relay.portName" .) "times" .Values.startupProbe) | nindent 4 }}
{{- end }}

{{- /* For containers: it begins and is stopped together with the application. */}}
{{- define "outbox-relay.classicSidecar" -}}
{{- include "outbox-relay.sidecarOnly" . -}}
- {{ include "outbox-relay.container" . | nindent 2 | trim }}
{{- end }}
