{{- define "pyproxy.chart" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* With -metrics at its end, it is still the name of a Service. */ -}}
{{- define "pyproxy.name" -}}
{{- $chart := include "pyproxy.chart" . }}
{{- $both := contains $chart .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $chart) }}
{{- .Values.fullnameOverride | default $both | trunc 55 | trimSuffix "-" }}
{{- end }}

{{- /* The name of what has no namespace. */ -}}
{{- define "pyproxy.clusterName" -}}
{{ .Release.Namespace }}:{{ include "pyproxy.name" . }}
{{- end }}

{{- define "pyproxy.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "pyproxy.name" .) }}
{{- end }}

{{- define "pyproxy.selector" -}}
k8s-app: {{ include "pyproxy.name" . }}
{{- end }}

{{- define "pyproxy.labels" -}}
{{ include "pyproxy.selector" . }}
app.kubernetes.io/name: {{ include "pyproxy.chart" . }}
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
{{- if .Values.fromIptablesLegacy }}{{ $found = append $found "NET_RAW" | uniq }}{{ end }}
{{- if .Values.socketLB.enabled }}
{{- if ne .Values.mode "userspace" }}{{ fail "socketLB: it is part of mode userspace" }}{{ end }}
{{- $found = append $found "SYS_ADMIN" }}
{{- end }}
{{- toYaml $found }}
{{- end }}

{{- /* The configuration as it is mounted. An empty field says nothing, as in kubeadm's ConfigMap. */ -}}
{{- define "pyproxy.config" -}}
{{- if ne (get .Values.config "mode" | default .Values.mode) .Values.mode }}{{ fail "config.mode: set mode instead, which the capabilities follow" }}{{ end }}
{{- $own := dict "apiVersion" "kubeproxy.config.k8s.io/v1alpha1" "kind" "KubeProxyConfiguration" }}
{{- if .Values.socketLB.enabled }}{{ $_ := set $own "userspace" (dict "cgroup" "/host/cgroup") }}{{ end }}
{{- $own = mergeOverwrite $own .Values.config (dict "mode" .Values.mode) }}
{{- if and .Values.serviceMonitor.enabled (not $own.metricsBindAddress) }}{{ $_ := set $own "metricsBindAddress" "0.0.0.0:10249" }}{{ end }}
{{- toYaml $own }}
{{- end }}

{{- /* What the init container and the main one have in common. */ -}}
{{- define "pyproxy.container" -}}
{{- with .Values.image -}}
image: {{ .repository }}{{ .digest | empty | ternary (printf ":%v" (.tag | default $.Chart.AppVersion)) (printf "@%s" .digest) }}
imagePullPolicy: {{ .pullPolicy }}
{{- end }}
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

{{- /* What an address such as 0.0.0.0:10256, [::1]:10256 or ::1 has for a port: list ADDRESS DEFAULT. */ -}}
{{- define "pyproxy.port" -}}
{{- regexFind "^([^:]*|\\[.*\\]):[0-9]+$" (first .) | regexFind "[0-9]+$" | default (last . | toString) }}
{{- end }}

{{- /* The IP of such an address, unless it is all of the node's. */ -}}
{{- define "pyproxy.host" -}}
{{- $ip := regexReplaceAll "^([^:]*|\\[.*\\]):[0-9]+$" . "${1}" | trimAll "[]" }}
{{- if not (has $ip (list "0.0.0.0" "::")) }}{{ $ip }}{{ end }}
{{- end }}

{{- /* Where the kubelet asks: list ROOT PATH SETTINGS. */ -}}
{{- define "pyproxy.probe" -}}
{{- $address := (first .).Values.config.healthzBindAddress | default "" }}
{{- $get := dict "path" (index . 1) "port" (include "pyproxy.port" (list $address 10256) | int) }}
{{- with include "pyproxy.host" $address }}{{ $_ := set $get "host" . }}{{ end }}
{{- toYaml (mergeOverwrite (dict "httpGet" $get) (last . | default dict)) }}
{{- end }}

{{- define "pyproxy.metricsPort" -}}
{{ include "pyproxy.port" (list (get (include "pyproxy.config" . | fromYaml) "metricsBindAddress") 10249) }}
{{- end }}

{{- /* Seconds of a duration such as 1m30s, rounded up. */ -}}
{{- define "pyproxy.seconds" -}}
{{- $factors := dict "h" 3600 "m" 60 "s" 1 "ms" 1e-3 "us" 1e-6 "µs" 1e-6 "μs" 1e-6 "ns" 1e-9 }}
{{- $sum := 0.0 }}
{{- range $part := regexFindAll "[0-9.]+[a-zµμ]+" (toString .) -1 }}
{{- $sum = addf $sum (mulf (regexFind "[0-9.]+" $part | float64) (get $factors (regexFind "[^0-9.]+" $part))) }}
{{- end }}
{{- ceil $sum }}
{{- end }}

{{- /* As long as mode userspace serves after SIGTERM, and some seconds to end. */ -}}
{{- define "pyproxy.gracePeriod" -}}
{{- $drain := dig "userspace" "drainTimeout" "" .Values.config }}
{{- .Values.terminationGracePeriodSeconds | default (max 30 (add 10 (include "pyproxy.seconds" $drain))) | int }}
{{- end }}
