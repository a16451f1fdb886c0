# shellcheck shell=bash
# Sourced by the steps of the node image build.
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"
NODE=$HACK/node-image
WS=${WS:-$CACHE/node-image}
SRC=$WS/src K8S_BIN=$WS/bin/kubernetes RUNTIME_BIN=$WS/bin/runtime IMAGES=$WS/images
ROOTFS=$WS/rootfs
# The modules are wrappers written here, whose sums go fills in.
export GOFLAGS="$GOFLAGS -mod=mod"
mkdir -p "$SRC" "$K8S_BIN" "$RUNTIME_BIN" "$IMAGES"
export TMPDIR=$WS/tmp
mkdir -p "$TMPDIR"
mkimage() { "$WS/bin/mkimage" "$@"; }

# module_dir MODULE VERSION: downloads a module and prints its folder.
module_dir() { (cd "$WS" && go mod download -json "$1@$2") | jq -r .Dir; }
