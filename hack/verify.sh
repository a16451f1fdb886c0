#!/bin/bash
# `make verify`: the tree is formatted and vetted, go.mod is tidy, the collector's has the components that are
# listed, and the generated code is what the protocol files give.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
unformatted=$(gofmt -l .)
[ -z "$unformatted" ] || die "not formatted, run gofmt -w: $unformatted"
go vet ./...
go vet -tags devnsm ./initboot
go mod tidy -diff || die "go.mod is not tidy: run go mod tidy"
"$HACK/collector.sh" verify
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"$HACK/generate.sh" "$fresh"
(cd "$fresh" && find . -name '*.pb.go') | while read -r f; do
  cmp -s "$fresh/$f" "$f" || die "$f is not what its .proto gives: run make generate"
done
