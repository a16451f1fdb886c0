#!/bin/bash
# `make bench-admission-kind`: how long the API server waits for the webhook while 300 pods are created, and the
# memory of the webhook after that. The pods are created in a dry run, so nothing of them runs.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
"$HACK/up.sh" install
use_cluster
namespace=bench-admission
dir=$(mktemp -d)
trap 'rm -rf "$dir"; kubectl delete namespace --wait=false "$namespace" >/dev/null' EXIT
kubectl create namespace "$namespace" >/dev/null
kubectl label namespace "$namespace" cloister.dev/injection=enabled pod-security.kubernetes.io/enforce=privileged >/dev/null
# What the API server has measured of calls of the webhook: bucket limit in seconds, count.
buckets() {
  kubectl get --raw /metrics |
    sed -nE 's/^apiserver_admission_webhook_admission_duration_seconds_bucket\{name="inject\.cloister\.dev",operation="CREATE",rejected="false",type="admit",le="([^"]+)"\} ([0-9]+)$/\1 \2/p'
}
for i in 1 2 3 4; do
  for j in $(seq 75); do
    cat <<YAML
---
apiVersion: v1
kind: Pod
metadata: {name: app-$i-$j, namespace: $namespace, annotations: {cloister.dev/enclave: app}}
spec:
  containers:
  - name: app
    image: registry.example/app@sha256:$(printf '5e%.0s' {1..32})
    ports: [{containerPort: 8080}]
    env: [{name: LOG_LEVEL, value: info}, {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    readinessProbe: {httpGet: {path: /ready, port: 8080}}
    resources: {limits: {memory: 256Mi}, requests: {cpu: 100m}}
YAML
  done >"$dir/$i.yaml"
done
kubectl create --dry-run=server -o name -f "$dir/1.yaml" >"$dir/warm" 2>/dev/null # service account and caches are there
buckets >"$dir/before"
pids=()
for i in 1 2 3 4; do
  kubectl create --dry-run=server -o name -f "$dir/$i.yaml" >"$dir/$i.out" 2>"$dir/$i.err" &
  pids+=($!)
done
for p in "${pids[@]}"; do wait "$p" || { cat "$dir"/*.err >&2; die "a pod was refused: read above"; }; done
buckets >"$dir/after"
# The quantile as Prometheus reckons it: by straight lines between the limits of the buckets.
awk 'NR == FNR { before[$1] = $2; next } { limit[++n] = $1; count[n] = $2 - before[$1] }
  END {
    for (i = 1; i <= n && count[i] < .99 * count[n]; i++);
    low = i > 1 ? limit[i-1] : 0; below = i > 1 ? count[i-1] : 0
    printf "%d calls, p99 %.1f ms\n", count[n], 1000 * (low + (limit[i] - low) * (.99 * count[n] - below) / (count[i] - below))
    for (i = 1; i <= n; i++) printf "  within %s s: %d\n", limit[i], count[i]
  }' "$dir/before" "$dir/after"
kubectl -n cloister-system get pods -l app.kubernetes.io/name=cloister-webhook -o name | while read -r pod; do
  rss=$(kubectl get --raw "/api/v1/namespaces/cloister-system/pods/${pod#pod/}:8080/proxy/metrics" | sed -n 's/^process_resident_memory_bytes //p')
  awk -v p="$pod" -v r="$rss" 'BEGIN { printf "%s: resident memory %.0f MiB\n", p, r / 1048576 }'
done
