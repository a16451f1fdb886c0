#!/bin/bash
# Usage: [REV=NAME] install.sh [remove]. Installs manifests/base with the images that hack/images.sh has built, and
# waits for all of it. With REV it installs, or removes, another revision of the webhook beside that, for the
# namespaces labelled cloister.dev/rev=NAME.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_cluster
. "$OUT/images.env"
rev=${REV:-}
[[ $rev =~ ^([a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?)?$ ]] || die "REV is \"$rev\": it becomes part of names, so use up to 30 lower-case letters, digits and dashes"
suffix=${rev:+-$rev} key=${rev:+.$rev}
# kubectl wants every base below or beside the kustomization, by a relative path.
dir=$OUT/install$suffix
mkdir -p "$dir/revision"
base=$REPO/manifests/base
if [ -n "$rev" ]; then
  base=$dir/revision
  sed "s/canary/$rev/g; s|\.\./webhook|$(realpath --relative-to="$base" "$REPO/manifests/webhook")|" "$REPO/manifests/revision/kustomization.yaml" >"$base/kustomization.yaml"
fi
# Tests run registries of their own on the node.
node=$(kubectl get nodes -o jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}')
cat >"$dir/kustomization.yaml" <<YAML
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources:
  - $(realpath --relative-to="$dir" "$base")
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
      - REVISION=$rev
YAML

# allow [IMAGES]: this revision's part of what the policy allows; of other revisions nothing changes.
allow() {
  kubectl apply --server-side --force-conflicts --field-manager="cloister-install$suffix" -f - <<YAML
apiVersion: cloister.dev/v1alpha1
kind: InjectedImages
metadata: {name: cloister}
images: {$*}
YAML
}
# images PART IMAGE: the image, and the one that was installed before: until the new replicas have taken over, the
# old ones inject it.
images() {
  local before
  before=$(kubectl get injectedimages cloister --ignore-not-found -o go-template="{{with .images}}{{with index . \"$1$key\"}}{{range .}}{{.}} {{end}}{{end}}{{end}}")
  if [[ "$before " != "$2 "* ]]; then before="$2 ${before%% *}"; fi
  before=${before% }
  echo "$1$key: [${before// /, }]"
}

case ${1:-} in
remove)
  [ -n "$rev" ] || die "say with REV which revision to remove"
  kubectl delete --ignore-not-found -k "$dir"
  kubectl -n cloister-system delete --ignore-not-found secret "cloister-webhook-ca$suffix"
  allow
  exit
  ;;
"") ;;
*) die "usage: [REV=NAME] install.sh [remove]" ;;
esac
kubectl apply -f "$REPO/manifests/policy/crd.yaml"
kubectl wait --for=condition=Established crd/injectedimages.cloister.dev --timeout=60s
allow "$(images initboot "$INITBOOT_DEV_IMAGE"), $(images sidecar "$SIDECAR_IMAGE")"
kubectl apply -k "$dir"
kubectl -n cloister-system rollout status "deployment/cloister-webhook$suffix" --timeout=180s
[ -z "$rev" ] || exit 0
kubectl -n cloister-system rollout status deployment/cloister-controller --timeout=180s
kubectl wait --for=condition=Available apiservice/v1beta2.custom.metrics.k8s.io --timeout=60s
