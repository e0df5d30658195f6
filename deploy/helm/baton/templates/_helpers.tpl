{{- define "baton.name" -}}
{{- printf "%s-%s" .Release.Name "baton" | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "baton.selector" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "baton.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{/* Settings as the environment variables that the processes read. */}}
{{- define "baton.settings" -}}
{{- range $name, $value := . }}
- name: BATON_{{ $name | replace "-" "_" | upper }}
  {{- /* numbers from a file are floats to Go, which would write 1e+06 */}}
  value: {{ if kindIs "float64" $value }}{{ if eq (floor $value) $value }}{{ int64 $value | toString | quote }}{{ else }}{{ $value | toString | quote }}{{ end }}{{ else }}{{ $value | toString | quote }}{{ end }}
{{- end }}
{{- end -}}

{{/* What every pod's container has. .root, .role */}}
{{- define "baton.common" -}}
image: {{ include "baton.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  - {name: shm, mountPath: /dev/shm}
  - {name: keys, mountPath: /keys, readOnly: true}
  {{- if .root.Values.model.existingClaim }}
  - name: model
    mountPath: /model
    readOnly: true
    {{- with .root.Values.model.subPath }}
    subPath: {{ . | quote }}
    {{- end }}
  {{- end }}
{{- end -}}

{{- define "baton.env" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: BATON_MODEL_DIR, value: {{ if .root.Values.model.existingClaim }}/model{{ else }}/usr/share/baton/demo-model{{ end }}}
- {name: BATON_ADMIN_SOCKET, value: /tmp/admin.sock}
- {name: BATON_CURVE_KEY_FILE, value: /keys/{{ .role }}.key}
- {name: BATON_CURVE_ALLOW_FILE, value: /keys/allow}
{{- include "baton.settings" .root.Values.settings }}
{{- end -}}

{{- define "baton.pod" -}}
# A service called baton would be BATON_PORT in the environment, which is a setting of ours.
enableServiceLinks: false
automountServiceAccountToken: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
volumes:
  - {name: tmp, emptyDir: {}}
  - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.shmSize }}}}
  - name: keys
    secret:
      secretName: {{ .root.Values.keysSecret }}
      defaultMode: 0400
      items:
        - {key: {{ .role }}.key, path: {{ .role }}.key}
        - {key: allow, path: allow}
  {{- with .root.Values.model.existingClaim }}
  - {name: model, persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}}
  {{- end }}
{{- end -}}
