{{- define "pyproxy.name" -}}
{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "pyproxy.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "pyproxy.name" .) }}
{{- end }}

{{- define "pyproxy.selector" -}}
k8s-app: {{ include "pyproxy.name" . }}
{{- end }}

{{- define "pyproxy.labels" -}}
{{ include "pyproxy.selector" . }}
app.kubernetes.io/name: pyproxy
app.kubernetes.io/part-of: kubernetes
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* The least that a mode needs; deploy/kustomize/components says why. */ -}}
{{- define "pyproxy.capabilities" -}}
{{- $byMode := dict
  "nftables" (list "NET_ADMIN")
  "iptables" (list "NET_ADMIN" "NET_RAW")
  "ipvs" (list "NET_ADMIN")
  "userspace" (list "NET_ADMIN" "NET_BIND_SERVICE" "BPF" "PERFMON") }}
{{- $found := get $byMode .Values.mode }}
{{- if not $found }}{{ fail (printf "mode: %s is none of nftables, iptables, ipvs and userspace" .Values.mode) }}{{ end }}
{{- if .Values.fromIptablesLegacy }}{{ $found = append $found "NET_RAW" | uniq }}{{ end }}
{{- if .Values.socketLB.enabled }}
{{- if ne .Values.mode "userspace" }}{{ fail "socketLB: it is part of mode userspace" }}{{ end }}
{{- $found = append $found "SYS_ADMIN" }}
{{- end }}
{{- toYaml $found }}
{{- end }}

{{- /* The configuration as it is mounted. */ -}}
{{- define "pyproxy.config" -}}
{{- $own := dict "apiVersion" "kubeproxy.config.k8s.io/v1alpha1" "kind" "KubeProxyConfiguration" "mode" .Values.mode }}
{{- if ne (get .Values.config "mode" | default .Values.mode) .Values.mode }}{{ fail "config.mode: set mode instead, which the capabilities follow" }}{{ end }}
{{- if .Values.serviceMonitor.enabled }}{{ $_ := set $own "metricsBindAddress" "0.0.0.0:10249" }}{{ end }}
{{- if .Values.socketLB.enabled }}{{ $_ := set $own "userspace" (dict "cgroup" "/host/cgroup") }}{{ end }}
{{- toYaml (mergeOverwrite $own .Values.config) }}
{{- end }}

{{- /* What the init container and the main one have in common. */ -}}
{{- define "pyproxy.container" -}}
image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
args:
- --config=/etc/pyproxy/config.conf
- --hostname-override=$(NODE_NAME)
- --state-dir=/var/lib/pyproxy
{{- with .Values.extraArgs }}
{{ toYaml . }}
{{- end }}
env:
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
{{- if not (dig "clientConnection" "kubeconfig" "" .Values.config) }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ required "apiServer.host: the API server's address, as nodes see it, is needed" .Values.apiServer.host | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .Values.apiServer.port | quote }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "pyproxy.mounts" -}}
- name: config # by subPath: a change comes with a rolling update, not to all nodes at once
  mountPath: /etc/pyproxy/config.conf
  subPath: config.conf
- name: xtables-lock
  mountPath: /run/xtables.lock
- name: state
  mountPath: /var/lib/pyproxy
- name: tmp # certificates and keys that a kubeconfig holds as text are files while it is read
  mountPath: /tmp
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "pyproxy.healthPort" -}}
{{- $given := regexFind "^([^:]*|\\[.*\\]):[0-9]+$" (.Values.config.healthzBindAddress | default "") -}}
{{ regexFind "[0-9]+$" $given | default 10256 }}
{{- end }}
