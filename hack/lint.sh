#!/bin/bash
# `make lint`: staticcheck, pinned.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$REPO"
tool=$CACHE/tools/staticcheck-$STATICCHECK_VERSION
[ -x "$tool/staticcheck" ] || GOBIN=$tool go install "honnef.co/go/tools/cmd/staticcheck@$STATICCHECK_VERSION"
# ST1005 out: our errors are sentences for users, and a sentence may start with a name (Envoy).
"$tool/staticcheck" -checks inherit,-ST1005 ./...
