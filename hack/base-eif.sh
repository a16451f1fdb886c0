#!/bin/bash
# Builds the two base EIFs, which differ only in the NSM that the measured command line names:
# $OUT/base.eif (device) and $OUT/base-dev.eif (development).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
"$HACK/kernel.sh"
go build -o "$BIN/baseeif" ./hack/baseeif
go build -trimpath -ldflags "-s -w -buildid=" -o "$OUT/enclaved" ./enclaved
build() { baseeif -kernel "$OUT/vmlinuz" -kernel-version "$(cat "$OUT/vmlinuz.version")" -init "$OUT/enclaved" "$@"; }
build -nsm device -o "$OUT/base.eif"
build -nsm dev -o "$OUT/base-dev.eif"
