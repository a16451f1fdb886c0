#!/bin/bash
# Builds the command cloister into the cache's bin folder.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
go build -trimpath -ldflags "-s -w" -o "$BIN/cloister" ./cloister
