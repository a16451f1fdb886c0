#!/bin/bash
# Installs manifests/base with the images that hack/images.sh has built, and waits for all of it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_cluster
. "$OUT/images.env"
# kubectl wants every base below or beside the kustomization, by a relative path.
dir=$OUT/install
mkdir -p "$dir"
# Tests run registries of their own on the node.
node=$(kubectl get nodes -o jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}')
cat >"$dir/kustomization.yaml" <<YAML
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - $(realpath --relative-to="$dir" "$REPO/manifests/base")
images:
  - name: cloister.dev/webhook
    newTag: ${WEBHOOK_IMAGE##*:}
  - name: cloister.dev/controller
    newTag: ${CONTROLLER_IMAGE##*:}
configMapGenerator:
  - name: cloister-install
    namespace: cloister-system
    literals:
      - DRIVER=process
      - INITBOOT_IMAGE=$INITBOOT_DEV_IMAGE
      - SIDECAR_IMAGE=$SIDECAR_IMAGE
      - PLAIN_HTTP_REGISTRIES=registry.cloister-registry.svc.cluster.local:5000,$node
YAML
kubectl apply -k "$dir"
kubectl -n cloister-system rollout status deployment/cloister-webhook --timeout=180s
kubectl -n cloister-system rollout status deployment/cloister-controller --timeout=180s
kubectl wait --for=condition=Available apiservice/v1beta2.custom.metrics.k8s.io --timeout=60s
