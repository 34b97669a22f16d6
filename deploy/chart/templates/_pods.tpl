{{/* A group of pods. Takes root, group (head or an entry of workers), head (whether it is the head).
     KubeRay writes the command (ray start), Ray's token, and labels of its own. */}}

{{- define "moesaic.rayStartParams" -}}
metrics-export-port: "8080"
{{- if .head }}
num-cpus: "0"
dashboard-host: 0.0.0.0
{{- end }}
# Ray uses a disk if its store is larger than what is free in /dev/shm.
object-store-memory: {{ div (mul (int64 (default 1024 .group.shmMi)) 1048576 9) 10 | quote }}
{{- end -}}

{{- define "moesaic.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "moesaic.probe" -}}
httpGet:
  path: /api/healthz
  port: 52365
timeoutSeconds: 5
periodSeconds: 5
{{- end -}}

{{- define "moesaic.podTemplate" -}}
{{- $root := .root -}}
{{- $values := $root.Values -}}
metadata:
  labels:
    # Nothing that a new version of the chart changes: KubeRay would replace the cluster.
    {{- include "moesaic.selector" $root | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge (deepCopy (default dict .group.annotations)) $values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  terminationGracePeriodSeconds: {{ include "moesaic.graceSeconds" $root }}
  {{- with $values.serviceAccountName }}
  serviceAccountName: {{ . }}
  {{- end }}
  # On the head Ray's autoscaler asks Kubernetes for pods; nothing else needs its API.
  automountServiceAccountToken: {{ and .head $values.autoscaling.enabled }}
  enableServiceLinks: false
  {{- if and (gt (int64 (default 0 .group.gpus)) 0) $values.runtimeClassName }}
  runtimeClassName: {{ $values.runtimeClassName }}
  {{- end }}
  {{- with .group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with .group.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $tolerations := default list .group.tolerations }}
  {{- if gt (int64 (default 0 .group.gpus)) 0 }}
  {{- $tolerations = append $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
  {{- end }}
  {{- with $tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" .head }}
      image: {{ default (include "moesaic.image" $root) .group.image }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext:
        {{- include "moesaic.securityContext" $root | nindent 8 }}
      {{- $resources := deepCopy .group.resources }}
      {{- if gt (int64 (default 0 .group.gpus)) 0 }}
      {{- $gpus := dict "nvidia.com/gpu" (.group.gpus | int64 | toString) }}
      {{- $_ := set $resources "limits" (merge (default dict $resources.limits) $gpus) }}
      {{- $_ := set $resources "requests" (merge (default dict $resources.requests) $gpus) }}
      {{- end }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      ports:
        - {name: metrics, containerPort: 8080}
        {{- if .head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: serve, containerPort: {{ $values.spec.endpoint.port | int64 }}}
        - {name: monitoring, containerPort: {{ $values.spec.monitoring.port | int64 }}}
        {{- with $values.spec.router }}
        - {name: router, containerPort: {{ default 8001 .port | int64 }}}
        {{- end }}
        {{- end }}
      env:
        # The only places that can be written, with /tmp and the models.
        - {name: HOME, value: /home/moesaic}
        - {name: XDG_CACHE_HOME, value: /cache}
        {{- if .head }}
        # Serve's proxy passes requests on as the endpoint needs it.
        - name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
          value: moesaic.actors.endpoint.http.proxy_middleware.middlewares
        {{- end }}
        {{- if not $values.modelVolume.existingClaim }}
        - name: HF_HOME
          value: {{ $values.modelVolume.mountPath }}/huggingface
        {{- end }}
        {{- with $values.hubToken }}
        {{- if .existingSecret }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}
        {{- end }}
        {{- end }}
        {{- with $values.routerKey }}
        {{- if .existingSecret }}
        - name: MOESAIC_ROUTER_KEY
          valueFrom:
            secretKeyRef: {name: {{ .existingSecret }}, key: {{ .key }}}
        {{- end }}
        {{- end }}
        {{- with concat $values.env (default list .group.env) }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      lifecycle:
        preStop:
          exec:
            command:
              - before-stop
              - {{ ternary "head" "worker" .head }}
              - --settle-s={{ $values.settleSeconds | int64 }}
              - --drain-s={{ include "moesaic.drainSeconds" $root }}
              {{- if .head }}
              - --metrics=http://127.0.0.1:{{ $values.spec.monitoring.port | int64 }}/metrics
              {{- end }}
      # Whether Ray runs in this pod; on the head, its GCS, too. Whether models answer is another
      # question, which the endpoint answers at /readyz.
      startupProbe:
        {{- include "moesaic.probe" $root | nindent 8 }}
        failureThreshold: {{ div (add (int64 $values.probes.startupSeconds) 4) 5 }}
      livenessProbe:
        {{- include "moesaic.probe" $root | nindent 8 }}
        failureThreshold: 24
      readinessProbe:
        {{- include "moesaic.probe" $root | nindent 8 }}
        failureThreshold: 2
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/moesaic}
        - {name: cache, mountPath: /cache}
        - {name: shared-mem, mountPath: /dev/shm}
        - name: models
          mountPath: {{ $values.modelVolume.mountPath }}
          readOnly: {{ and (ne $values.modelVolume.existingClaim "") $values.modelVolume.readOnly }}
        {{- if and .head (eq $values.kind "RayCluster") }}
        - {name: spec, mountPath: /etc/moesaic, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: home
      emptyDir: {}
    - name: cache
      emptyDir: {}
    - name: shared-mem
      emptyDir:
        medium: Memory
        sizeLimit: {{ int64 (default 1024 .group.shmMi) }}Mi
    - name: models
      {{- with $values.modelVolume }}
      {{- if .existingClaim }}
      persistentVolumeClaim:
        claimName: {{ .existingClaim }}
        readOnly: {{ .readOnly }}
      {{- else if .storageClass }}
      ephemeral:
        volumeClaimTemplate:
          spec:
            accessModes: [ReadWriteOnce]
            storageClassName: {{ .storageClass }}
            resources:
              requests:
                storage: {{ .size }}
      {{- else }}
      emptyDir:
        sizeLimit: {{ .size }}
      {{- end }}
      {{- end }}
    {{- if and .head (eq $values.kind "RayCluster") }}
    - name: spec
      configMap:
        name: {{ include "moesaic.fullname" $root }}-spec
    {{- end }}
{{- end -}}

{{- define "moesaic.rayCluster" -}}
{{- $root := . -}}
rayVersion: {{ .Values.rayVersion | quote }}
authOptions:
  mode: token
  secretName: {{ include "moesaic.tokenSecret" . }}
enableInTreeAutoscaling: {{ .Values.autoscaling.enabled }}
{{- if .Values.autoscaling.enabled }}
autoscalerOptions:
  version: v2
  upscalingMode: {{ .Values.autoscaling.upscalingMode }}
  idleTimeoutSeconds: {{ .Values.autoscaling.idleTimeoutSeconds | int64 }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources:
    {{- toYaml .Values.autoscaling.resources | nindent 4 }}
  securityContext:
    {{- include "moesaic.securityContext" . | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: home, mountPath: /home/moesaic}
{{- end }}
{{- with .Values.gcsFaultTolerance }}
{{- if eq .backend "redis" }}
gcsFaultToleranceOptions:
  backend: redis
  redisAddress: {{ .redis.address | quote }}
  {{- if .redis.existingSecret }}
  redisPassword:
    valueFrom:
      secretKeyRef: {name: {{ .redis.existingSecret }}, key: {{ .redis.passwordKey }}}
  {{- with .redis.usernameKey }}
  redisUsername:
    valueFrom:
      secretKeyRef: {name: {{ $root.Values.gcsFaultTolerance.redis.existingSecret }}, key: {{ . }}}
  {{- end }}
  {{- end }}
{{- else if eq .backend "rocksdb" }}
gcsFaultToleranceOptions:
  backend: rocksdb
  storage:
    {{- if .rocksdb.existingClaim }}
    claimName: {{ .rocksdb.existingClaim }}
    {{- else }}
    size: {{ .rocksdb.size }}
    accessModes: [ReadWriteOnce]
    {{- with .rocksdb.storageClass }}
    storageClassName: {{ . }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end }}
headGroupSpec:
  rayStartParams:
    {{- include "moesaic.rayStartParams" (dict "group" .Values.head "head" true) | nindent 4 }}
  template:
    {{- include "moesaic.podTemplate" (dict "root" . "group" .Values.head "head" true) | nindent 4 }}
workerGroupSpecs:
  {{- range .Values.workers }}
  - groupName: {{ .name }}
    replicas: {{ .replicas | int64 }}
    minReplicas: {{ .minReplicas | int64 }}
    maxReplicas: {{ .maxReplicas | int64 }}
    {{- with .labels }}
    labels:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    rayStartParams:
      {{- include "moesaic.rayStartParams" (dict "group" . "head" false) | nindent 6 }}
    template:
      {{- include "moesaic.podTemplate" (dict "root" $root "group" . "head" false) | nindent 6 }}
  {{- end }}
{{- end -}}
