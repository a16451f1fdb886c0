#!/bin/bash
# Usage: keycloak.sh build|load. Build makes $OUT/keycloak-rootfs.tar: Keycloak, unmodified, with its
# configuration compiled in, on Debian's Java. Load brings the image cloister.dev/keycloak to the cluster's
# node and writes its name to $OUT/keycloak.image.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rootfs=$OUT/keycloak-rootfs-$KEYCLOAK_VERSION.tar

# Settings that Keycloak wants to know when it is built, so that it starts in seconds (kc.sh help build).
settings=(--db=dev-mem --health-enabled=true --cache=local)

build() {
  [ ! -s "$rootfs" ] || exit 0
  [ "$(id -u)" = 0 ] || die "the root file system needs chroot: run this as root"
  local root zip
  root=$(mktemp -d "$CACHE/keycloak.XXXXXX")
  chmod 755 "$root"
  zip=$root.zip
  # shellcheck disable=SC2064
  trap "rm -rf '$root' '$root.zip' '$root.mvn'" EXIT
  mvn -B -q dependency:copy -Dmdep.useBaseVersion=true -DoutputDirectory="$root.mvn" \
    -Dartifact="org.keycloak:keycloak-quarkus-dist:$KEYCLOAK_VERSION:zip"
  mv "$root.mvn"/*.zip "$zip"
  "$HACK/debian-rootfs.sh" essential "$root" openjdk-17-jre-headless
  unzip -q "$zip" -d "$root/opt"
  mv "$root/opt/keycloak-$KEYCLOAK_VERSION" "$root/opt/keycloak"
  unshare --mount sh -ec 'mount -t proc proc "$1/proc"; shift; exec chroot "$@"' sh "$root" \
    "$root" /opt/keycloak/bin/kc.sh build "${settings[@]}"
  # The server writes below its own folder only.
  chown -R 1000:0 "$root/opt/keycloak"
  rm -rf "$root"/dev/* "$root"/usr/share/perl "$root"/usr/lib/x86_64-linux-gnu/{perl,gconv}
  tar --numeric-owner --sort=name --mtime=@0 -C "$root" -cf "$rootfs.part" .
  mv "$rootfs.part" "$rootfs"
}

load() {
  use_engine
  use_cluster
  local ref
  go build -o "$BIN/mkimage" "$REPO/hack/mkimage"
  ref=cloister.dev/keycloak:$KEYCLOAK_VERSION-$(echo "${settings[*]}" | sha256sum | cut -c1-8)
  if ! kind_node ctr -n k8s.io images ls -q | grep -qxF "$ref"; then
    mkimage -o "$OUT/keycloak.tar" -t "$ref" --rootfs "$rootfs" --keep-owner --user 1000:0 \
      --workdir /opt/keycloak --entrypoint '["/opt/keycloak/bin/kc.sh"]'
    kind load image-archive "$OUT/keycloak.tar" --name "$KIND_CLUSTER"
    rm -f "$OUT/keycloak.tar"
  fi
  echo "$ref" >"$OUT/keycloak.image"
}

case ${1:-} in
build | load) "$1" ;;
*) die "usage: keycloak.sh build|load" ;;
esac
