#!/bin/bash
# Builds the collector's distribution (collector/builder.yaml) as $OUT/otelcol.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
tool=$CACHE/tools/ocb-$OCB_VERSION
[ -x "$tool/builder" ] || GOBIN=$tool GOFLAGS=-buildvcs=false go install "go.opentelemetry.io/collector/cmd/builder@$OCB_VERSION"
src=$CACHE/src/collector
mkdir -p "$src"
# Where the modules of this repository are, and where the builder writes, differs from machine to machine.
{
  sed '/^dist:/a\  output_path: '"$src" "$REPO/collector/builder.yaml"
  printf '\nreplaces:\n  - cloister.dev/cloister => %s\n' "$REPO"
  printf '  - cloister.dev/cloister/collector/enclavereceiver => %s/collector/enclavereceiver\n' "$REPO"
} >"$src/builder.yaml"
# After it has written the sources the builder calls `go mod tidy`, which wants the tests of every
# dependency and fails where a module proxy lacks one; what is compiled needs none of them.
rm -f "$src"/go.*
"$tool/builder" --config "$src/builder.yaml" --skip-compilation || [ -s "$src/go.mod" ]
cd "$src"
go mod tidy -e
go build -trimpath -ldflags "-s -w -buildid=" -o "$OUT/otelcol" .
