#!/bin/bash
# Builds the two base EIFs, which differ only in the NSM that the measured command line names:
# $OUT/base.eif (device) and $OUT/base-dev.eif (development).
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
"$HACK/kernel.sh"
go build -trimpath -ldflags "-s -w -buildid=" -o "$OUT/enclaved" ./enclaved
go run ./hack/baseeif -kernel "$OUT/vmlinuz" -init "$OUT/enclaved" -nsm device -o "$OUT/base.eif"
go run ./hack/baseeif -kernel "$OUT/vmlinuz" -init "$OUT/enclaved" -nsm dev -o "$OUT/base-dev.eif"
