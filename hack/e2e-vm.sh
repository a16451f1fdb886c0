#!/bin/bash
# Usage: e2e-vm.sh [GO-TEST-FLAG...]. Boots enclaves in QEMU on this machine, without a cluster: the tests of
# e2e/vm, and the life of a pod with the real initboot, enclaved and console.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
step "host packages" "install them by hand: see the list in hack/packages.sh" "$HACK/packages.sh"
step "the enclave's kernel" "read the log; hack/versions.env and hack/kernel.sha256 pin it" "$HACK/kernel.sh"
step "QEMU" "read the log; hack/versions.env pins its source" "$HACK/qemu.sh"
cd "$REPO"
CLOISTER_OUT=$OUT exec go test -count=1 -v -timeout 30m -run '^Test(VM|VirtualPod)$' "$@" ./e2e/vm ./initboot
