#!/bin/bash
# `make bench-admission`: the cost of one admission, ours and that of injectors by others, as a table.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$HACK/bench"
# -mod=mod: ours is replaced by the work tree, whose dependencies may have moved on.
go build -mod=mod -o "$OUT/bench" .
exec "$OUT/bench" "$REPO/webhook/admit/testdata/review.json"
