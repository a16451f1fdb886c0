#!/bin/bash
# Usage: sample.sh measure|deploy|verify. The sample workload's YAML and measurements, the workload, an attested
# request to it. With OBSERVABILITY=1 it sends its logs, metrics and traces to the collector of hack/observability.sh.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_cluster
yaml=$OUT/nginx.yaml measurements=$OUT/nginx.measurements.json root=$CACHE/dev-root/root.pem

# measure computes what the enclave must show from the YAML and the EIF alone.
measure() {
  sed "s/NGINX_DIGEST/$(cat "$OUT/nginx.digest")/" "$REPO/manifests/sample/nginx.yaml" >"$yaml"
  if [ "${OBSERVABILITY:-}" = 1 ]; then with_telemetry; fi
  cloister measure -f "$yaml" --eif "$OUT/base-dev.eif" >"$measurements"
}

# with_telemetry lists two plugins in the workload's EnclaveConfig.
with_telemetry() {
  local dir=$OUT/sample
  mkdir -p "$dir"
  mv "$yaml" "$dir/nginx.yaml"
  jq -n --rawfile ca "$OUT/collector/tls.crt" '
    {endpoint: "otel-collector.cloister-observability.svc.cluster.local:4317", ca: $ca} as $config |
    {apiVersion: "cloister.dev/v1alpha1", kind: "EnclaveConfig", plugins: [
      {name: "logs", type: "logging", builtin: "otlp", config: $config},
      {name: "telemetry", type: "telemetry", builtin: "otlp", config: $config}]} as $enclave |
    {apiVersion: "kustomize.config.k8s.io/v1beta1", kind: "Kustomization", resources: ["nginx.yaml"], patches: [{
      target: {kind: "Deployment"},
      patch: [{op: "add", path: "/spec/template/metadata/annotations/cloister.dev~1config", value: ($enclave | tojson)}] | tojson}]}
  ' >"$dir/kustomization.yaml"
  kubectl kustomize "$dir" >"$yaml"
}

deploy() {
  kubectl apply -f "$yaml"
  # A pod keeps the Cloister that it was injected with: after a change of ours it is replaced.
  . "$OUT/images.env"
  local injected
  injected=$(kubectl -n cloister-sample get pods -l app=nginx -o jsonpath='{.items[*].spec.initContainers[*].image}')
  for image in $injected; do
    [[ $image = "$INITBOOT_DEV_IMAGE" || $image = "$SIDECAR_IMAGE" ]] || {
      kubectl -n cloister-sample rollout restart deployment/nginx
      break
    }
  done
  kubectl -n cloister-sample rollout status deployment/nginx --timeout=180s || {
    kubectl -n cloister-sample describe pods
    exit 1
  }
}

verify() {
  forward cloister-sample svc/nginx 443
  echo
  echo "\$ cloister curl --measurements $measurements --root $root --connect-to $FORWARD https://nginx.cloister-sample.svc/"
  cloister curl --measurements "$measurements" --root "$root" --connect-to "$FORWARD" https://nginx.cloister-sample.svc/
}

case ${1:-} in
deploy) deploy ;;
measure) measure ;;
verify) verify ;;
*) die "usage: sample.sh measure|deploy|verify" ;;
esac
