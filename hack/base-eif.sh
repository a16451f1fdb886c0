#!/bin/bash
# Builds the two base EIFs, which differ only in the NSM that the measured command line names:
# $OUT/base.eif (device) and $OUT/base-dev.eif (development).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
"$HACK/kernel.sh"
go build -o "$BIN/baseeif" ./hack/baseeif
go build -trimpath -ldflags "-s -w -buildid=" -o "$OUT/enclaved" ./enclaved
kernel=$OUT/kernel
build() { baseeif -kernel "$kernel/vmlinuz" -kernel-version "$(cat "$kernel/version")" -modules "$kernel/modules" -init "$OUT/enclaved" "$@"; }
build -nsm device -o "$OUT/base.eif"
build -nsm dev -o "$OUT/base-dev.eif"
