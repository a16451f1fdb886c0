#!/bin/bash
# Usage: observability.sh build [prometheus|jaeger|victorialogs]... Builds the servers that take the
# telemetry, from their Go modules, into the cache: $OUT/{prometheus,jaeger,victorialogs}.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# source_of MODULE VERSION: a copy of a module that can be changed, in the folder $src.
source_of() {
  src=$CACHE/src/${1##*/}
  rm -rf "$src"
  mkdir -p "${src%/*}"
  cp -r "$(go mod download -json "$1@$2" | jq -r .Dir)" "$src"
  chmod -R u+w "$src"
  cd "$src"
}

# GOWORK: Prometheus has a workspace, in which -mod=mod is refused.
compile() { GOWORK=off go build -trimpath -ldflags "-s -w -buildid=" "$@"; }

prometheus() {
  source_of github.com/prometheus/prometheus "$PROMETHEUS_VERSION"
  compile -o "$OUT/prometheus" ./cmd/prometheus
}
jaeger() {
  source_of github.com/jaegertracing/jaeger "$JAEGER_VERSION"
  compile -o "$OUT/jaeger" ./cmd/jaeger
}
victorialogs() {
  source_of github.com/VictoriaMetrics/VictoriaLogs "$VICTORIALOGS_VERSION"
  # The commit that it requires is not served by module proxies; this release holds the same packages.
  go mod edit -require "github.com/VictoriaMetrics/VictoriaMetrics@$VICTORIAMETRICS_VERSION"
  compile -o "$OUT/victorialogs" ./app/victoria-logs
}

# build SERVER: unless the cache has it at the pinned version.
build() {
  local pin=${1^^}_VERSION src=
  if [ -x "$OUT/$1" ] && [ "$(cat "$OUT/$1.version" 2>/dev/null)" = "${!pin}" ]; then return; fi
  # Go's scheduler leaves the machine to everything else that is built at the same time.
  (renice -n 19 $BASHPID >/dev/null; "$1")
  rm -rf "$CACHE/src/$1"
  echo "${!pin}" >"$OUT/$1.version"
}

case ${1:-} in
build)
  shift
  [ $# -gt 0 ] || set -- victorialogs prometheus jaeger
  for server in "$@"; do build "$server"; done
  ;;
*) die "usage: observability.sh build [prometheus|jaeger|victorialogs]..." ;;
esac
