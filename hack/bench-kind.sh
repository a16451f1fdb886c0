#!/bin/bash
# `make bench-admission-kind`: how long the API server waits for the webhook while 300 pods are created, and the
# memory of the webhook after that. First a Deployment of 300 replicas, at the pace of the controller manager; no
# scheduler takes its pods. Then dry runs of 300 pods, by one client and by four, as fast as they can. ROUNDS (5) of all;
# each waits, for up to a minute, until other programs leave the CPUs idle.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
"$HACK/up.sh" install
use_cluster
namespace=bench-admission-$$
dir=$(mktemp -d)
trap 'rm -rf "$dir"; kubectl delete namespace --wait=false --ignore-not-found "$namespace" >/dev/null' EXIT

# What the API server has measured of calls of the webhook: bucket limit in seconds, count.
buckets() {
  kubectl get --raw /metrics |
    sed -nE 's/^apiserver_admission_webhook_admission_duration_seconds_bucket\{name="inject\.cloister\.dev",operation="CREATE",rejected="false",type="admit",le="([^"]+)"\} ([0-9]+)$/\1 \2/p'
}
# idle: the share of the CPUs' last second, in percent, in which they had nothing to do.
idle() {
  { grep '^cpu ' /proc/stat; sleep 1; grep '^cpu ' /proc/stat; } |
    awk '{ all = 0; for (i = 2; i <= 9; i++) all += $i; d = all - a; n = $5 - b; a = all; b = $5 } END { printf "%d\n", 100 * n / d }'
}
# calm: waits until the CPUs are idle and sets IDLE to how idle they are.
calm() {
  local deadline=$((SECONDS + 60))
  until IDLE=$(idle); [ "$IDLE" -ge 80 ] || [ $SECONDS -ge $deadline ]; do :; done
}
# report WHAT: the quantile as Prometheus reckons it: by straight lines between the limits of the buckets.
report() {
  awk -v what="$1" -v idle="$IDLE" 'NR == FNR { before[$1] = $2; next } { limit[++n] = $1; count[n] = $2 - before[$1] }
    END {
      if (count[n] < 300) { print "only " count[n] + 0 " calls were counted" >"/dev/stderr"; exit 1 }
      for (i = 1; count[i] < .99 * count[n]; i++);
      low = i > 1 ? limit[i-1] : 0; below = i > 1 ? count[i-1] : 0
      printf "%-12s p99 %5.1f ms: %d calls, %d within 5 ms, %d within 25 ms; CPUs %d %% idle before\n", what,
        1000 * (low + (limit[i] - low) * (.99 * count[n] - below) / (count[i] - below)), count[n], count[1], count[2], idle
    }' "$dir/before" "$dir/after" | tee -a "$dir/figures"
}
# dry_run WHAT FILE...: creates the pods of each file, one after the other, by a client of its own, and reports. The
# clients are no part of a cluster: what runs in it goes before.
dry_run() {
  local what=$1 file p pids=()
  shift
  calm
  buckets >"$dir/before"
  for file; do
    nice -n 19 kubectl -n "$namespace" create --dry-run=server -o name -f "$file" <&0 >"$dir/$what.out" 2>>"$dir/$what.err" &
    pids+=($!)
  done
  for p in "${pids[@]}"; do wait "$p" || { cat "$dir/$what.err" >&2; die "a pod was refused: read above"; }; done
  buckets >"$dir/after"
  report "$what"
}
# pod INDENT: the body of the pod.
pod() {
  sed "s/^/$1/" <<YAML
spec:
  schedulerName: nobody
  containers:
  - name: app
    image: registry.example/app@sha256:$(printf '5e%.0s' {1..32})
    ports: [{containerPort: 8080}]
    env: [{name: LOG_LEVEL, value: info}, {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
    readinessProbe: {httpGet: {path: /ready, port: 8080}}
    resources: {limits: {memory: 256Mi}, requests: {cpu: 100m}}
YAML
}
for i in 1 2 3 4; do
  for j in $(seq 75); do
    printf -- '---\napiVersion: v1\nkind: Pod\nmetadata: {name: app-%d-%d, annotations: {cloister.dev/enclave: app}}\n' "$i" "$j"
    pod ""
  done >"$dir/$i.yaml"
done
cat >"$dir/deployment.yaml" <<YAML
apiVersion: apps/v1
kind: Deployment
metadata: {name: app}
spec:
  replicas: 300
  selector: {matchLabels: {app: app}}
  template:
    metadata: {labels: {app: app}, annotations: {cloister.dev/enclave: app}}
$(pod "    ")
YAML

for _ in $(seq "${ROUNDS:-5}"); do
  kubectl create namespace "$namespace" >/dev/null
  kubectl label namespace "$namespace" cloister.dev/injection=enabled pod-security.kubernetes.io/enforce=privileged >/dev/null
  kubectl -n "$namespace" wait --for=create serviceaccount/default --timeout=60s >/dev/null
  kubectl -n "$namespace" create --dry-run=server -o name -f "$dir/1.yaml" >"$dir/warm" 2>/dev/null # connections and caches are there
  calm
  buckets >"$dir/before"
  kubectl -n "$namespace" create -f "$dir/deployment.yaml" >/dev/null
  kubectl -n "$namespace" wait deployment/app --for=jsonpath='{.status.replicas}'=300 --timeout=120s >/dev/null
  buckets >"$dir/after"
  report Deployment

  cat "$dir"/[1-4].yaml | dry_run one-client -
  dry_run four-clients "$dir"/[1-4].yaml
  kubectl delete namespace "$namespace" >/dev/null
done
for what in Deployment one-client four-clients; do
  sed -nE "s/^$what +p99 +([0-9.]+) .*/\1/p" "$dir/figures" | sort -n | awk -v what="$what" '{ v[NR] = $1 } END { printf "%-12s p99 %5.1f ms: the median\n", what, NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
done
kubectl -n cloister-system get pods -l app.kubernetes.io/name=cloister-webhook -o name | while read -r pod; do
  rss=$(kubectl get --raw "/api/v1/namespaces/cloister-system/pods/${pod#pod/}:8080/proxy/metrics" | sed -n 's/^process_resident_memory_bytes //p')
  awk -v p="$pod" -v r="$rss" 'BEGIN { printf "%s: resident memory %.0f MiB\n", p, r / 1048576 }'
done
