# shellcheck shell=bash
# Sourced by every script of hack/: settings, pins and the lines that a person sees.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HACK=$REPO/hack
# shellcheck source=hack/versions.env
. "$HACK/versions.env"
# CLUSTER=existing takes the kind cluster of the current kubeconfig instead of making one.
CLUSTER=${CLUSTER:-cloister}

# Everything that the scripts download or build lies in one folder of the user.
CACHE=${CLOISTER_CACHE:-$HOME/.cache/cloister}
BIN=$CACHE/bin LOGS=$CACHE/log RUN=$CACHE/run OUT=$CACHE/out
mkdir -p "$BIN" "$LOGS" "$RUN" "$OUT"
# Finished results that may lie beside the repository: a short cut, never needed.
SHARED=$REPO/../shared/cache

export CGO_ENABLED=0 GOFLAGS=-buildvcs=false
export PATH=$BIN:/usr/sbin:/sbin:$PATH
OWN_SOCKET=$RUN/docker.sock

# use_engine points docker at the engine that answers: the user's own, else the one that
# hack/docker.sh started. Without any, DOCKER_HOST stays as it is.
use_engine() {
  if [ -z "${DOCKER_HOST:-}" ] && [ -S "$OWN_SOCKET" ]; then
    export DOCKER_HOST=unix://$OWN_SOCKET
  fi
}

# use_cluster points kubectl at the cluster and sets KIND_CLUSTER to kind's name for it.
use_cluster() {
  KIND_CLUSTER=$CLUSTER
  if [ "$CLUSTER" = existing ]; then
    local context
    command -v kubectl >/dev/null || die "CLUSTER=existing needs kubectl: install it, or run the same without CLUSTER"
    context=$(kubectl config current-context 2>/dev/null) ||
      die "CLUSTER=existing takes the cluster of the current context, and ${KUBECONFIG:-~/.kube/config} has none: set KUBECONFIG, or run kubectl config use-context kind-NAME"
    [[ $context = kind-?* ]] ||
      die "CLUSTER=existing takes kind clusters only, since images are loaded into their nodes, and the current context is \"$context\": run kubectl config use-context kind-NAME"
    KIND_CLUSTER=${context#kind-}
  else
    export KUBECONFIG=$RUN/kubeconfig
  fi
}

# kind_node COMMAND...: runs a command in the cluster's node.
kind_node() { docker exec "$KIND_CLUSTER-control-plane" "$@"; }

# step WHAT HINT COMMAND...: runs a command with its output in a log file and prints one line with
# the result and the time; a failure shows the end of the log and what to do.
step() {
  local what=$1 hint=$2 start=$SECONDS log
  shift 2
  log=$LOGS/$(tr -cs 'a-z0-9' - <<<"${what,,}" | sed 's/^-//; s/-$//').log
  printf '%s  %-52s ' "$(date +%H:%M:%S)" "$what"
  if "$@" >"$log" 2>&1; then
    printf 'ok    %4d s\n' $((SECONDS - start))
    return
  fi
  printf 'FAILED %3d s\n' $((SECONDS - start))
  tail -n 20 "$log" | sed 's/^/    /'
  printf '  What to do: %s\n  Whole log:  %s\n' "$hint" "$log"
  exit 1
}

# die SENTENCE: what is wrong and what to do.
die() {
  echo "error: $*" >&2
  exit 1
}

# forward NAMESPACE TARGET PORT: sets FORWARD to a loopback address that leads to the port, until the
# script ends.
forward() {
  local out=$RUN/forward.$$
  kubectl -n "$1" port-forward --address 127.0.0.1 "$2" ":$3" >"$out" 2>&1 &
  # shellcheck disable=SC2064
  trap "kill $! 2>/dev/null || true; rm -f '$out'" EXIT
  for _ in $(seq 100); do
    FORWARD=$(sed -nE 's/^Forwarding from (127\.0\.0\.1:[0-9]+) .*/\1/p' "$out")
    [ -z "$FORWARD" ] || return 0
    kill -0 $! 2>/dev/null || break
    sleep 0.1
  done
  cat "$out"
  die "kubectl port-forward to $2 in namespace $1 failed"
}
