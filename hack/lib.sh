# shellcheck shell=bash
# Sourced by every script of hack/: settings, pins and the lines that a person sees.
set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
HACK=$REPO/hack
# shellcheck source=hack/versions.env
. "$HACK/versions.env"

# Everything that the scripts download or build lies in one folder of the user.
CACHE=${CLOISTER_CACHE:-$HOME/.cache/cloister}
BIN=$CACHE/bin LOGS=$CACHE/log RUN=$CACHE/run OUT=$CACHE/out
mkdir -p "$BIN" "$LOGS" "$RUN" "$OUT"
# Finished results that may lie beside the repository: a short cut, never needed.
SHARED=$REPO/../shared/cache

export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -mod=mod"
export PATH=$BIN:/usr/sbin:/sbin:$PATH
NODE_NAME=$CLUSTER-control-plane
OWN_SOCKET=$RUN/docker.sock

# use_engine points docker at the engine that answers: the user's own, else the one that
# hack/docker.sh started. Without any, DOCKER_HOST stays as it is.
use_engine() {
  if [ -z "${DOCKER_HOST:-}" ] && [ -S "$OWN_SOCKET" ]; then
    export DOCKER_HOST=unix://$OWN_SOCKET
  fi
}

# use_cluster points kubectl at the kind cluster; CLUSTER=existing means the current kubeconfig.
use_cluster() {
  [ "$CLUSTER" = existing ] || export KUBECONFIG=$RUN/kubeconfig
}

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

# sum FILE...: one short hash of the contents.
sum() { cat "$@" | sha256sum | cut -c1-12; }
