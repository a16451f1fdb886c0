#!/bin/bash
# Builds a kindest/node-compatible image from Go modules and Debian packages, without pulling any
# image. Usage: build.sh; the folder $WS (default: node-image in the cache) keeps what was built, so
# that a broken-off build goes on where it stopped. Result: $WS/node-image.tar.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ "$(id -u)" = 0 ] || die "the node image needs chroot and mount: run this as root"
hint="read the log, then run the same command again: it goes on where it stopped"
(cd "$REPO" && GOFLAGS=-buildvcs=false go build -o "$WS/bin/mkimage" ./hack/mkimage)
step "node image: Kubernetes $K8S_VERSION" "$hint" "$NODE/kubernetes.sh"
step "node image: containerd, runc, CNI, etcd, CoreDNS" "$hint" "$NODE/runtime.sh"
step "node image: Debian root file system" "$hint" "$NODE/rootfs.sh"
step "node image: control-plane images" "$hint" "$NODE/images.sh"
step "node image: assembly" "$hint" "$NODE/node.sh"
