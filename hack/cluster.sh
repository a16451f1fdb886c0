#!/bin/bash
# Usage: cluster.sh create|delete. The kind cluster; with CLUSTER=existing nothing is done but to ask
# the cluster of the current kubeconfig for an answer.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_engine
use_cluster

create() {
  if [ "$CLUSTER" = existing ]; then
    kubectl version >/dev/null || die "CLUSTER=existing, but the cluster of the current kubeconfig does not answer"
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
