#!/bin/bash
# `make bench-attestation`: the cost of verifying an attestation document, beside that of its bare signatures
# and that of a verifier by others, as a table. The documents of AWS enclaves are other people's and not part of
# the repository: without them one is generated.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$HACK/bench"
# -mod=mod: ours is replaced by the work tree, whose dependencies may have moved on.
go build -mod=mod -o "$OUT/bench-attestation" ./attestation
real=$REPO/../shared/vectors/attestation/36_2025-12-25_real_dstack.bin
if [ -e "$real" ]; then exec "$OUT/bench-attestation" "$real"; fi
exec "$OUT/bench-attestation"
