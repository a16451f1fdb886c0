#!/bin/bash
# Builds containerd, runc, the CNI plugins, etcd and CoreDNS, each in a throw-away main module with
# upstream's own requirements, so that the third-party versions are exactly upstream's.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# wrap NAME MODULE VERSION: makes the main module and changes into it.
wrap() {
  local dir
  dir=$(module_dir "$2" "$3")
  mkdir -p "$SRC/$1"
  cd "$SRC/$1"
  {
    printf 'module wrap/%s\n\n' "$1"
    sed -E '/^module /d; /=> \.\.?\//d' "$dir/go.mod" |
      sed -E '/^exclude |^tool /d; /^(tool|exclude|ignore|retract) \(/,/^\)/d'
    echo "require $2 $3"
  } >go.mod
  rm -f go.sum
  [ ! -f "$dir/go.sum" ] || install -m644 "$dir/go.sum" go.sum
}
build() { go build -trimpath "$@"; }

wrap runc github.com/opencontainers/runc "$RUNC_VERSION" # needs cgo (nsenter) and libseccomp; static
CGO_ENABLED=1 build -tags "seccomp netgo osusergo" \
  -ldflags "-s -w -X main.version=${RUNC_VERSION#v} -X main.gitCommit=gomodule -linkmode external -extldflags -static" \
  -o "$RUNTIME_BIN/runc" github.com/opencontainers/runc

wrap cni github.com/containernetworking/plugins "$CNI_VERSION"
build -ldflags "-s -w" -o "$RUNTIME_BIN/" \
  github.com/containernetworking/plugins/plugins/{ipam/host-local,main/loopback,main/ptp,main/bridge,meta/portmap}

wrap etcd go.etcd.io/etcd/server/v3 "$ETCD_VERSION"
build -ldflags "-s -w" -o "$RUNTIME_BIN/etcd" go.etcd.io/etcd/server/v3
wrap etcdctl go.etcd.io/etcd/etcdctl/v3 "$ETCD_VERSION"
build -ldflags "-s -w" -o "$RUNTIME_BIN/etcdctl" go.etcd.io/etcd/etcdctl/v3

wrap containerd github.com/containerd/containerd/v2 "$CONTAINERD_VERSION"
build -tags "no_aufs no_zfs no_btrfs no_devmapper netgo osusergo" \
  -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$CONTAINERD_VERSION" \
  -o "$RUNTIME_BIN/" github.com/containerd/containerd/v2/cmd/{containerd,ctr,containerd-shim-runc-v2}

wrap coredns github.com/coredns/coredns "$COREDNS_VERSION"
# The cluster's own k8s.io versions: their packages are compiled already.
for m in api apimachinery client-go; do go mod edit -require "k8s.io/$m@v0.${K8S_VERSION#v1.}"; done
mkdir -p cmd
cp "$NODE/coredns.go.txt" cmd/main.go
build -ldflags "-s -w" -o "$RUNTIME_BIN/coredns" ./cmd
