#!/bin/bash
# Usage: up.sh cluster|images|install. Brings the machine to that point, each including the ones
# before it. What is there already is used.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
again="read the log, then run the same command again: what is done stays done"
[[ "$(go env GOVERSION 2>/dev/null)" == go1.* ]] || die "Go is missing: install it from go.dev or Debian's golang package"

cluster() {
  use_cluster
  step "host packages" "install them by hand: see the list in hack/packages.sh" "$HACK/packages.sh"
  step "kind $KIND_VERSION" "check that the Go module proxy answers: go env GOPROXY" "$HACK/kind.sh"
  local hint="'make clean', then run the same command again"
  if [ "$CLUSTER" = existing ]; then
    hint="look at kubectl config get-contexts and kind get clusters"
  else
    step "container engine" "start Docker, or read $LOGS/dockerd.log" "$HACK/docker.sh" start
    step "firewall rule" "check that iptables works: iptables -S DOCKER-USER" "$HACK/firewall.sh" add
    step "node image" "read the log; 'make clean' and another run start afresh" "$HACK/node-image.sh"
  fi
  step "cluster $KIND_CLUSTER" "$hint" "$HACK/cluster.sh" create
}

images() {
  cluster
  step "base EIFs and image initboot" "$again" "$HACK/images.sh" initboot
  step "Envoy and image sidecar" "$again" "$HACK/images.sh" sidecar
  step "image webhook" "$again" "$HACK/images.sh" webhook
  step "image controller" "$again" "$HACK/images.sh" controller
  step "image registry" "$again" "$HACK/images.sh" registry
  step "command cloister" "$again" "$HACK/cli.sh"
}

install() {
  images
  step "Cloister in the cluster" "kubectl -n cloister-system describe pods" "$HACK/install.sh"
  step "registry in the cluster" "kubectl -n cloister-registry describe pods" "$HACK/registry.sh" deploy
  step "sample image: Debian's nginx" "$again" "$HACK/nginx-rootfs.sh"
  step "sample image in the registry" "$again" "$HACK/registry.sh" push
}

case ${1:-} in
cluster | images | install) "$1" ;;
*) die "usage: up.sh cluster|images|install" ;;
esac
