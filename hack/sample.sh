#!/bin/bash
# Usage: sample.sh deploy|measure|verify. The sample workload, its measurements, an attested request to it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_cluster
yaml=$OUT/nginx.yaml measurements=$OUT/nginx.measurements.json root=$CACHE/dev-root/root.pem

deploy() {
  sed "s/NGINX_DIGEST/$(cat "$OUT/nginx.digest")/" "$REPO/manifests/sample/nginx.yaml" >"$yaml"
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

# measure computes what the enclave must show from the YAML and the EIF alone.
measure() { cloister measure -f "$yaml" --eif "$OUT/base-dev.eif" >"$measurements"; }

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
*) die "usage: sample.sh deploy|measure|verify" ;;
esac
