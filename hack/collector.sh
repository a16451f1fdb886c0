#!/bin/bash
# Usage: collector.sh          builds the collector's distribution, of which builder.yaml in collector/ lists the
#                              components and go.mod and go.sum pin all that is compiled, as $OUT/otelcol.
#        collector.sh update   brings go.mod and go.sum up to date after a change of builder.yaml, of this
#                              repository's go.mod or of the receiver's, and builds.
#        collector.sh verify   fails where builder.yaml and go.mod differ.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO/collector"
src=$CACHE/src/collector
mend="run hack/collector.sh update and commit collector/go.mod and collector/go.sum"

components() { sed -n 's/^ *- gomod: //p' builder.yaml; }

verify() {
  local differ
  # Of what go.mod requires directly, the rest is the framework that components are made of.
  differ=$(diff <(components | sort) <(go mod edit -json | jq -r '.Require[] | select(.Indirect | not) | "\(.Path) \(.Version)"' |
    grep -E '/[a-z]+(receiver|processor|exporter|connector|extension|provider) ' | sort)) ||
    die "collector/builder.yaml (<) and collector/go.mod (>) differ, $mend:"$'\n'"$differ"
}

# generate writes the program into the cache; an overlay lays it over this folder, where go.mod is.
generate() {
  local tool=$CACHE/tools/ocb-$OCB_VERSION
  [ -x "$tool/builder" ] || GOBIN=$tool go install "go.opentelemetry.io/collector/cmd/builder@$OCB_VERSION"
  rm -rf "$src"
  mkdir -p "$src"
  sed '/^dist:/a\  output_path: '"$src" builder.yaml >"$src/builder.yaml"
  "$tool/builder" --config "$src/builder.yaml" --skip-get-modules --skip-compilation
  for f in "$src"/*.go; do echo "$f"; done |
    jq -nR --arg here "$PWD" '{Replace: [inputs | {key: "\($here)/\(split("/") | last)", value: .}] | from_entries}' >"$src/overlay.json"
}

compile() {
  go build -mod=readonly -overlay "$src/overlay.json" -trimpath -ldflags "-s -w -buildid=" -o "$OUT/otelcol" . ||
    die "the collector does not compile: if go.mod or go.sum lack something, $mend"
}

case ${1:-} in
"")
  verify
  generate
  compile
  ;;
update)
  generate
  components | sed 's/ /@/; s/^/-require=/' | xargs go mod edit
  # -e: go.sum holds what the tests of dependencies need too, of which not all may be there to download.
  go mod tidy -e -overlay "$src/overlay.json"
  verify
  compile
  ;;
verify) verify ;;
*) die "usage: collector.sh [update|verify]" ;;
esac
