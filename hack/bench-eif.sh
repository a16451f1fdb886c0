#!/bin/bash
# `make bench-eif`: what building an enclave image file from a ramdisk of 300 MB costs, beside one SHA-384 of it
# and AWS's builder, as a table. Where cargo cannot build it, AWS's builder is left out.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$HACK/eif-peer.sh"
peer=()
if command -v cargo >/dev/null && build_peer; then
  peer=("$PEER")
fi
cd "$REPO"
go build -o "$OUT/cloister" ./cloister
cd "$HACK/bench"
# -mod=mod: ours is replaced by the work tree, whose dependencies may have moved on.
go build -mod=mod -o "$OUT/bench-eif" ./eif
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
"$OUT/bench-eif" "$files" "$OUT/cloister" "${peer[@]}"
