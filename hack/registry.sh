#!/bin/bash
# Usage: registry.sh deploy|push. Runs the registry in the cluster; pushes the sample image to it and
# writes the image's digest to $OUT/nginx.digest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_cluster

deploy() {
  . "$OUT/images.env"
  sed "s#image: cloister.dev/registry\$#image: $REGISTRY_IMAGE#" "$REPO/manifests/sample/registry.yaml" | kubectl apply -f -
  kubectl -n cloister-registry rollout status deployment/registry --timeout=120s
}

push() {
  "$HACK/nginx-rootfs.sh"
  forward cloister-registry svc/registry 5000
  mkimage --push "$FORWARD/nginx:bookworm" --rootfs "$OUT/nginx-rootfs.tar" --keep-owner \
    --entrypoint '["nginx","-g","daemon off;"]' --stop-signal SIGQUIT --port 80 >"$OUT/nginx.digest"
  cat "$OUT/nginx.digest"
}

case ${1:-} in
deploy) deploy ;;
push) push ;;
*) die "usage: registry.sh deploy|push" ;;
esac
