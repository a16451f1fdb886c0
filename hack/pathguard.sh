#!/bin/bash
# Usage: pathguard.sh build|push. The example plugin of docs/examples/pathguard in an image of its own, as
# its author would make it: Debian's Python, packages from PyPI and one file. Build makes
# $OUT/pathguard-rootfs.tar, push pushes the image to the registry in the cluster and writes its digest to
# $OUT/pathguard.digest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
source=$REPO/docs/examples/pathguard
rootfs=$OUT/pathguard-rootfs-$(cat "$source/requirements.txt" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-12).tar

build() {
  [ ! -s "$rootfs" ] || exit 0
  [ "$(id -u)" = 0 ] || die "the root file system needs chroot: run this as root"
  local root
  root=$(mktemp -d "$CACHE/pathguard.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$root'" EXIT
  chmod 755 "$root"
  "$HACK/debian-rootfs.sh" essential "$root" python3,libstdc++6
  # Wheels for the image's Python, not for this machine's.
  python3 -m pip install -q --no-compile --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux2014_x86_64 --target "$root/opt/pathguard" -r "$source/requirements.txt"
  # The image unpacks into the enclave's memory.
  rm -rf "$root"/dev/* "$root"/var/cache/debconf "$root"/usr/share/perl \
    "$root"/usr/lib/x86_64-linux-gnu/{perl,perl-base,gconv} "$root"/usr/lib/python3.11/{test,ensurepip,lib2to3,pydoc_data}
  find "$root" -name __pycache__ -prune -exec rm -rf {} +
  rm -f "$OUT"/pathguard-rootfs-*.tar
  tar --numeric-owner --sort=name --mtime=@0 -C "$root" -cf "$rootfs.part" .
  mv "$rootfs.part" "$rootfs"
}

push() {
  use_cluster
  go build -o "$BIN/mkimage" "$REPO/hack/mkimage"
  forward cloister-registry svc/registry 5000
  mkimage --push "$FORWARD/pathguard:e2e" --rootfs "$rootfs" --keep-owner \
    --add "$source/pathguard.py:/opt/pathguard/pathguard.py" --env PYTHONPATH=/opt/pathguard --env PYTHONDONTWRITEBYTECODE=1 \
    --entrypoint '["python3","/opt/pathguard/pathguard.py"]' >"$OUT/pathguard.digest"
  cat "$OUT/pathguard.digest"
}

case ${1:-} in
build | push) "$1" ;;
*) die "usage: pathguard.sh build|push" ;;
esac
