{{- define "gmemd.image" -}}
image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- define "gmemd.scheduling" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{ end -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{ end -}}
priorityClassName: {{ .Values.priorityClassName }}
tolerations: {{ toJson .Values.tolerations }}
{{- end }}

{{- /* Options of gmemd-dra for what differs from its defaults. */}}
{{- define "gmemd.options" -}}
{{- if ne .Values.driverName "memory.gmemd.example" }}
- --driver-name={{ .Values.driverName }}
{{- end }}
{{- if ne .Values.kubeletDirectory "/var/lib/kubelet" }}
- --kubelet={{ .Values.kubeletDirectory }}
{{- end }}
{{- if ne .Values.cdiDirectory "/var/run/cdi" }}
- --cdi={{ .Values.cdiDirectory }}
{{- end }}
{{- if ne .Values.gmemd.directory "/run/gmemd" }}
- --claims={{ .Values.gmemd.directory }}/claims
{{- end }}
{{- with .Values.memory }}
- --memory={{ . }}
{{- end }}
{{- if .Values.monitoring.enabled }}
- --metrics=9465
{{- if ne .Values.gmemd.directory "/run/gmemd" }}
- --http=unix:{{ .Values.gmemd.directory }}/http.sock
{{- end }}
{{- end }}
{{- end }}
