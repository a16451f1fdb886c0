#!/bin/bash
# Usage: cluster.sh create|delete. The kind cluster; with CLUSTER=existing nothing is made or deleted: the
# cluster of the current kubeconfig must answer and its nodes be within reach.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_engine
use_cluster

create() {
  if [ "$CLUSTER" = existing ]; then
    kind get clusters 2>/dev/null | grep -qx "$KIND_CLUSTER" ||
      die "the current context is kind-$KIND_CLUSTER, and this machine's container engine has no such kind cluster: start it, or set DOCKER_HOST to the engine that has it"
    kubectl version --request-timeout=10s >/dev/null || die "the cluster of the current context, kind-$KIND_CLUSTER, does not answer: see that its node runs"
    kubectl wait --for=condition=Ready node --all --timeout=60s
    return
  fi
  if kind get clusters 2>/dev/null | grep -qx "$CLUSTER"; then
    docker start "$CLUSTER-control-plane" >/dev/null # after a restart of the engine
    kind export kubeconfig --name "$CLUSTER" --kubeconfig "$KUBECONFIG"
  else
    sed "s#CONTROL_PLANE#$HACK/kind/control-plane#" "$HACK/kind/config.yaml" >"$RUN/kind.yaml"
    kind create cluster --name "$CLUSTER" --config "$RUN/kind.yaml" --image "$(cat "$RUN/node-image")" --kubeconfig "$KUBECONFIG" --wait 180s
  fi
  # The node's own kubectl: one is there, and of the right version, whatever the machine has.
  [ -x "$BIN/kubectl" ] || docker cp -L "$CLUSTER-control-plane:/usr/bin/kubectl" "$BIN/kubectl"
  # Pods are refused until the controller has made this account.
  kubectl wait --for=condition=Ready node --all --timeout=120s
  kubectl wait --for=create serviceaccount/default --timeout=60s
}

delete() {
  if docker info >/dev/null 2>&1 && kind get clusters 2>/dev/null | grep -qx "$CLUSTER"; then
    kind delete cluster --name "$CLUSTER" --kubeconfig "$KUBECONFIG"
  fi
  rm -f "$RUN/kubeconfig" "$BIN/kubectl"
}

case ${1:-} in
create) create ;;
delete) [ "$CLUSTER" = existing ] || delete ;;
*) die "usage: cluster.sh create|delete" ;;
esac
