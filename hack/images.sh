#!/bin/bash
# Usage: images.sh [NAME]... Builds our images, all or the named ones, and
# loads those into the cluster that it does not have yet. The collector, the servers behind it and
# initboot-qemu are built only when they are named. A tag is a hash of the contents. Writes $OUT/images.env:
# one NAME_IMAGE=reference a line.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_engine
use_cluster
cd "$REPO"
go build -o "$BIN/mkimage" ./hack/mkimage

# binary OUTPUT PACKAGE [FLAG...]: a static, reproducible binary.
binary() {
  local output=$1 package=$2
  shift 2
  go build -trimpath -ldflags "-s -w -buildid=" "$@" -o "$OUT/$output" "./$package"
}

# image NAME FILE... -- MKIMAGE-FLAG...: the image cloister.dev/NAME; FILEs are what it is made of.
image() {
  local name=$1 files=() tag ref archive
  shift
  while [ "$1" != -- ]; do
    files+=("$1")
    shift
  done
  shift
  tag=dev-$({ cat "${files[@]}" "$BIN/mkimage"; echo "$*"; } | sha256sum | cut -c1-12)
  ref=cloister.dev/$name:$tag
  if ! grep -qxF "$ref" <<<"$present"; then
    archive=$OUT/$name.tar
    mkimage -o "$archive" -t "$ref" "$@"
    kind load image-archive "$archive" --name "$KIND_CLUSTER"
    rm -f "$archive"
  fi
  echo "$ref"
  local key=${name^^}
  key=${key//-/_}_IMAGE
  touch "$OUT/images.env"
  sed -i "/^$key=/d" "$OUT/images.env"
  echo "$key=$ref" >>"$OUT/images.env"
}

# The authorities of registries, as Debian has them: initboot and the webhook ask registries.
roots=/etc/ssl/certs/ca-certificates.crt

# Two images of one part. The release initboot lacks the code of the development NSM; the -dev one
# has it and holds the development key, so it must never leave this machine.
initboot() {
  binary initboot initboot
  binary initboot-dev initboot -tags devnsm
  "$HACK/base-eif.sh"
  "$HACK/dev-root.sh"
  image initboot "$OUT"/{initboot,base.eif} "$roots" -- --add "$roots:$roots" \
    --add "$OUT/initboot:/initboot" --add "$OUT/base.eif:/base.eif" --entrypoint '["/initboot"]'
  image initboot-dev "$OUT"/{initboot-dev,base-dev.eif} "$CACHE"/dev-root/{key,root}.pem "$roots" -- --add "$roots:$roots" \
    --add "$OUT/initboot-dev:/initboot" --add "$OUT/base-dev.eif:/base.eif" \
    --add "$CACHE/dev-root/key.pem:/etc/cloister/dev/key.pem:600" --add "$CACHE/dev-root/root.pem:/etc/cloister/dev/root.pem" \
    --entrypoint '["/initboot"]'
}
# The -dev image with QEMU, for DRIVER=qemu of a development installation.
initboot-qemu() {
  binary initboot-dev initboot -tags devnsm
  "$HACK/base-eif.sh"
  "$HACK/dev-root.sh"
  "$HACK/qemu.sh"
  image initboot-qemu "$OUT"/{initboot-dev,base-dev.eif} "$CACHE"/dev-root/{key,root}.pem "$roots" "$OUT"/qemu/{qemu-system-x86_64,libs/*,firmware/*} -- --add "$roots:$roots" \
    --add "$OUT/initboot-dev:/initboot" --add "$OUT/base-dev.eif:/base.eif" \
    --add "$CACHE/dev-root/key.pem:/etc/cloister/dev/key.pem:600" --add "$CACHE/dev-root/root.pem:/etc/cloister/dev/root.pem" \
    --add "$OUT/qemu/qemu-system-x86_64:/qemu/run" --add "$OUT/qemu/firmware:/qemu/firmware" \
    --add "$OUT/qemu/libs:/lib/x86_64-linux-gnu" --add "$OUT/qemu/libs/ld-linux-x86-64.so.2:/lib64/ld-linux-x86-64.so.2" \
    --entrypoint '["/initboot"]'
}
sidecar() {
  binary sidecar sidecar
  "$HACK/envoy.sh"
  image sidecar "$OUT"/{sidecar,envoy} "$OUT"/envoy-libs/* -- --user 65532:65532 \
    --add "$OUT/sidecar:/sidecar" --add "$OUT/envoy:/envoy" \
    --add "$OUT/envoy-libs:/lib/x86_64-linux-gnu" --add "$OUT/envoy-libs/ld-linux-x86-64.so.2:/lib64/ld-linux-x86-64.so.2" \
    --entrypoint '["/sidecar"]'
}
webhook() {
  binary webhook webhook
  image webhook "$OUT/webhook" "$roots" -- --user 65532:65532 --add "$roots:$roots" --add "$OUT/webhook:/webhook" --entrypoint '["/webhook"]'
}
controller() {
  binary controller controller
  image controller "$OUT/controller" -- --user 65532:65532 --add "$OUT/controller:/controller" --entrypoint '["/controller"]'
}
registry() {
  binary registry hack/registry
  image registry "$OUT/registry" -- --user 65532:65532 --add "$OUT/registry:/registry" --entrypoint '["/registry"]'
}
# The collector, and the servers that it hands telemetry to.
collector() {
  "$HACK/collector.sh"
  image collector "$OUT/otelcol" -- --user 65532:65532 --add "$OUT/otelcol:/otelcol" --entrypoint '["/otelcol"]'
}
server() {
  "$HACK/observability.sh" build "$1"
  image "$1" "$OUT/$1" -- --user 65532:65532 --dir /tmp:1777 --add "$OUT/$1:/$1" --entrypoint "[\"/$1\"]"
}
prometheus() { server prometheus; }
jaeger() { server jaeger; }
victorialogs() { server victorialogs; }

present=$(kind_node ctr -n k8s.io images ls -q)
[ $# -gt 0 ] || set -- initboot sidecar webhook controller registry
for name in "$@"; do $name; done
