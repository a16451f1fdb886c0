#!/bin/bash
# Usage: observability.sh build [prometheus|jaeger|victorialogs]... Builds the servers that take the
# telemetry, from their Go modules, into the cache: $OUT/{prometheus,jaeger,victorialogs}.
#        observability.sh identity     makes the collector's certificate: $OUT/collector/tls.{crt,key}.
#        observability.sh deploy FILE  installs manifests/observability; the collector serves enclaves whose
#                                      measurements are in FILE.
#        observability.sh wait         until all of it serves.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
NAMESPACE=cloister-observability # as in manifests/observability

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
  compile -mod=mod -o "$OUT/victorialogs" ./app/victoria-logs
}

# build SERVER: unless the cache has it at the pinned version.
build() {
  local pin=${1^^}_VERSION src=
  if [ -x "$OUT/$1" ] && [ "$(cat "$OUT/$1.version" 2>/dev/null)" = "${!pin}" ]; then return; fi
  ("$1")
  rm -rf "$CACHE/src/$1"
  echo "${!pin}" >"$OUT/$1.version"
}

# identity: workloads measure the certificate, so it is kept. It is its own authority.
identity() {
  local dir=$OUT/collector host=otel-collector.$NAMESPACE.svc.cluster.local
  if openssl x509 -in "$dir/tls.crt" -noout -checkend 86400 >/dev/null 2>&1; then return; fi
  mkdir -p "$dir"
  (umask 077 && openssl ecparam -name prime256v1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$dir/tls.key")
  openssl req -x509 -new -key "$dir/tls.key" -days 90 -subj "/CN=$host" -addext "subjectAltName=DNS:$host" -out "$dir/tls.crt"
}

deploy() {
  use_cluster
  . "$OUT/images.env"
  local dir=$OUT/observability
  mkdir -p "$dir"
  cp "$OUT"/collector/tls.{crt,key} "$CACHE/dev-root/root.pem" "$dir"
  cp "$1" "$dir/measurements.json"
  cat >"$dir/kustomization.yaml" <<YAML
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: $NAMESPACE
resources:
  - $(realpath --relative-to="$dir" "$REPO/manifests/observability")
images:
  - {name: cloister.dev/collector, newTag: ${COLLECTOR_IMAGE##*:}}
  - {name: cloister.dev/prometheus, newTag: ${PROMETHEUS_IMAGE##*:}}
  - {name: cloister.dev/jaeger, newTag: ${JAEGER_IMAGE##*:}}
  - {name: cloister.dev/victorialogs, newTag: ${VICTORIALOGS_IMAGE##*:}}
secretGenerator:
  - {name: otel-collector-tls, files: [tls.crt, tls.key]}
configMapGenerator:
  - {name: otel-collector-trust, files: [measurements.json, root.pem]}
YAML
  kubectl create namespace "$NAMESPACE" --dry-run=client -o yaml | kubectl apply -f -
  kubectl apply -k "$dir"
}

wait_for_all() {
  use_cluster
  for server in otel-collector prometheus jaeger victorialogs; do
    kubectl -n "$NAMESPACE" rollout status "deployment/$server" --timeout=180s
  done
}

case ${1:-} in
build)
  shift
  [ $# -gt 0 ] || set -- victorialogs prometheus jaeger
  for server in "$@"; do build "$server"; done
  ;;
identity) identity ;;
deploy) deploy "$2" ;;
wait) wait_for_all ;;
*) die "usage: observability.sh build [prometheus|jaeger|victorialogs]... | identity | deploy FILE | wait" ;;
esac
