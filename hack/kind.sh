#!/bin/bash
# Builds kind at the pinned version into the cache, unless it is there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ "$("$BIN/kind" version -q 2>/dev/null)" = "${KIND_VERSION#v}" ] || GOBIN=$BIN go install "sigs.k8s.io/kind@$KIND_VERSION"
