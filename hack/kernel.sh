#!/bin/bash
# Puts the enclave's kernel into the cache: Debian's cloud kernel of versions.env as $OUT/kernel/vmlinuz, its
# version beside it, and in $OUT/kernel/modules those of its modules that an enclave needs, by name in the
# order of loading. All of it is Debian's, but for virtio_mmio: Debian builds it without
# CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, and a hypervisor names an enclave's devices on the command line alone,
# so this one module is compiled again, from Debian's source and by Debian's compiler. kernel.sha256 pins
# every byte, wherever it came from.
#
# Debian's mirrors keep a version for months; snapshot.debian.org, asked when they have it no more, for ever.
#
# Usage: kernel.sh               what is described above
#        kernel.sh build FOLDER  makes the files in an empty folder, without a look at what they are
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

modules() { sed -n 's|^.*  modules/||p' "$HACK/kernel.sha256"; }

build() {
  local to=$1 series=${KERNEL_VERSION%.*} tmp m
  tmp=$(mktemp -d "$CACHE/kernel-build.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$tmp'" EXIT
  "$HACK/debian-package.sh" trixie "linux-image-$KERNEL_ABI=$KERNEL_VERSION" "$tmp/image"
  "$HACK/debian-package.sh" trixie "linux-source-$series=$KERNEL_VERSION" "$tmp/source"
  "$HACK/debian-rootfs.sh" minbase "$tmp/root" "linux-headers-$KERNEL_ABI,make" trixie
  install -Dm644 "$tmp/image/boot/vmlinuz-$KERNEL_ABI" "$to/vmlinuz"
  mkdir "$to/modules"
  for m in $(modules); do
    xz -dc "$(find "$tmp/image" -name "${m#*-}.xz")" >"$to/modules/$m"
  done
  mkdir "$tmp/root/build"
  tar -xf "$tmp/source/usr/src/linux-source-$series.tar.xz" -C "$tmp/root/build" --strip-components=3 \
    "linux-source-$series/drivers/virtio/virtio_mmio.c"
  sed -i '1i #define CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES 1' "$tmp/root/build/virtio_mmio.c"
  echo 'obj-m := virtio_mmio.o' >"$tmp/root/build/Makefile"
  chroot "$tmp/root" make -C "/usr/src/linux-headers-$KERNEL_ABI" M=/build modules
  chroot "$tmp/root" strip --strip-debug /build/virtio_mmio.ko
  install -m644 "$tmp/root/build/virtio_mmio.ko" "$to"/modules/??-virtio_mmio.ko
}

fresh() { rm -rf "$new" && mkdir "$new" && "$HACK/kernel.sh" build "$new"; }

pinned() { (cd "$1" && sha256sum --quiet -c "$HACK/kernel.sha256"); }

case ${1:-} in
build)
  build "$2"
  exit 0
  ;;
"") ;;
*) die "usage: kernel.sh [build FOLDER]" ;;
esac
if ! pinned "$OUT/kernel" 2>/dev/null; then
  new=$(mktemp -d "$CACHE/kernel.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  { fresh && pinned "$new"; } ||
    { export SNAPSHOT=$KERNEL_SNAPSHOT && fresh && pinned "$new"; } ||
    die "Debian's kernel $KERNEL_VERSION cannot be had as hack/kernel.sha256 pins it: read above why, or pin another in hack/versions.env and there, which changes the measurements"
  echo "linux-image-$KERNEL_ABI=$KERNEL_VERSION" >"$new/version"
  rm -rf "$OUT/kernel"
  mv "$new" "$OUT/kernel"
fi
cat "$OUT/kernel/version"
