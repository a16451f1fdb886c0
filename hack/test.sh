#!/bin/bash
# `make test`: all tests. What the end-to-end tests run beside Cloister is built while the unit tests run,
# with what those leave of the machine.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
step "host packages" "install them by hand: see the list in hack/packages.sh" "$HACK/packages.sh"
log=$LOGS/e2e-servers.log
set -m # a process group of its own, so that it ends whole
nice -n 19 "$HACK/e2e-servers.sh" >"$log" 2>&1 &
servers=$!
set +m
trap 'kill -- -$servers 2>/dev/null || true' EXIT
"$HACK/unit.sh"
wait "$servers" || { cat "$log"; die "a server of the end-to-end tests was not built: read above"; }
trap - EXIT
exec "$HACK/e2e.sh"
