#!/bin/bash
# Compares package eif with AWS's own library, for which cargo and a C compiler must be there: both build from the
# same inputs, and AWS's library reads what we write (eif/aws_test.go). With -update it rewrites eif/testdata/aws.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$HACK/eif-peer.sh"
command -v cargo >/dev/null || die "it builds a program in Rust: install cargo"
build_peer
cd "$REPO"
EIF_PEER=$PEER exec go test ./eif -run 'TestAWS|TestVectors' -count=1 -v "$@"
