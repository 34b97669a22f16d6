{{/* A RayService's name may have 47 characters: KubeRay appends to it, and labels have 63. */}}
{{- define "moesaic.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 47 | trimSuffix "-" -}}
{{- end -}}

{{/* What selects the pods of this install, in any cluster that KubeRay makes of it. */}}
{{- define "moesaic.selector" -}}
moesaic/install: {{ include "moesaic.fullname" . }}
{{- end -}}

{{- define "moesaic.labels" -}}
{{ include "moesaic.selector" . }}
app.kubernetes.io/part-of: moesaic
app.kubernetes.io/instance: {{ .Release.Name | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end -}}

{{- define "moesaic.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "moesaic.tokenSecret" -}}
{{ default (printf "%s-ray-token" (include "moesaic.fullname" .)) .Values.auth.existingSecret }}
{{- end -}}

{{/* Service that reaches the endpoint: KubeRay's for a RayService, the chart's for a RayCluster. */}}
{{- define "moesaic.endpointService" -}}
{{ include "moesaic.fullname" . }}-{{ ternary "serve-svc" "endpoint" (eq .Values.kind "RayService") }}
{{- end -}}

{{/* Seconds, all from spec.endpoint.drain_s: preStop lasts at most settle + drain; Ray then has 30 s
     to end; a cluster that was replaced stays as long as its pods may take. */}}
{{- define "moesaic.drainSeconds" -}}
{{ .Values.spec.endpoint.drain_s | float64 | ceil | int64 }}
{{- end -}}
{{- define "moesaic.graceSeconds" -}}
{{ add (include "moesaic.drainSeconds" . | int64) (.Values.settleSeconds | int64) 30 }}
{{- end -}}

{{/* Port of the collector that spec.traces names; nothing if it names none. */}}
{{- define "moesaic.tracesPort" -}}
{{- with (default dict .Values.spec.traces).endpoint -}}
{{- $url := urlParse . -}}
{{- $named := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- default (ternary "443" "80" (eq $url.scheme "https")) $named -}}
{{- end -}}
{{- end -}}

{{- define "moesaic.check" -}}
{{- $names := list -}}
{{- range .Values.workers -}}
{{- if or (gt (int64 .minReplicas) (int64 .replicas)) (gt (int64 .replicas) (int64 .maxReplicas)) -}}
{{- fail (printf "workers: minReplicas <= replicas <= maxReplicas must hold (%s: %d, %d, %d)" .name (int64 .minReplicas) (int64 .replicas) (int64 .maxReplicas)) -}}
{{- end -}}
{{- if has .name $names -}}
{{- fail (printf "workers: two groups have the name %q" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- if eq (int64 .Values.spec.endpoint.port) (int64 .Values.spec.monitoring.port) -}}
{{- fail (printf "spec: endpoint.port and monitoring.port are both %d" (int64 .Values.spec.monitoring.port)) -}}
{{- end -}}
{{- end -}}
