#!/bin/bash
# Usage: localstack.sh build|load. Build makes $OUT/localstack-rootfs-….tar: LocalStack from PyPI, with KMS
# and without the other services, on the Python of Debian trixie, since it needs 3.12. Load brings the image
# cloister.dev/localstack to the cluster's node and writes its name to $OUT/localstack.image.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
requirements=$HACK/localstack-requirements.txt
hash=$(cat "$requirements" "${BASH_SOURCE[0]}" | sha256sum | cut -c1-12)
rootfs=$OUT/localstack-rootfs-$hash.tar

build() {
  [ ! -s "$rootfs" ] || exit 0
  [ "$(id -u)" = 0 ] || die "the root file system needs chroot: run this as root"
  local root packages
  root=$(mktemp -d "$CACHE/localstack.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$root'" EXIT
  chmod 755 "$root"
  "$HACK/debian-rootfs.sh" essential "$root" python3,libstdc++6 trixie
  packages=$root/opt/localstack
  # Wheels for the image's Python, not for this machine's.
  python3 -m pip install -q --no-compile --no-deps --only-binary=:all: --python-version 3.13 \
    --platform manylinux2014_x86_64 --target "$packages" -r "$requirements"
  # Descriptions and emulations of the services that are not started; that of S3 tells which regions there are.
  find "$packages/botocore/data" -mindepth 1 -maxdepth 1 -type d ! -name kms ! -name s3 -exec rm -rf {} +
  find "$packages/moto" -mindepth 1 -maxdepth 1 -type d ! -name core ! -name utilities -exec rm -rf {} +
  rm -rf "$packages/boto3/examples" "$root"/dev/* "$root"/var/cache/debconf "$root"/usr/share/{perl,perl5} \
    "$root"/usr/lib/x86_64-linux-gnu/{perl,perl-base,gconv} "$root"/usr/lib/python3.13/{test,ensurepip,pydoc_data}
  # Compiled here, since a container starts without: 5 s of the first start. Python must not look at the
  # times of the sources, which the archive does not keep.
  find "$root" -name __pycache__ -prune -exec rm -rf {} +
  chroot "$root" python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.13 /opt/localstack
  rm -f "$OUT"/localstack-rootfs-*.tar
  tar --numeric-owner --sort=name --mtime=@0 -C "$root" -cf "$rootfs.part" .
  mv "$rootfs.part" "$rootfs"
}

load() {
  use_engine
  use_cluster
  local ref
  go build -o "$BIN/mkimage" "$REPO/hack/mkimage"
  ref=cloister.dev/localstack:$(sed -n 's/^localstack-core==//p' "$requirements")-$hash
  if ! kind_node ctr -n k8s.io images ls -q | grep -qxF "$ref"; then
    # It asks for nothing outside: no certificate and no statistics of its maker.
    mkimage -o "$OUT/localstack.tar" -t "$ref" --rootfs "$rootfs" --keep-owner --user 1000:0 \
      --env PYTHONPATH=/opt/localstack --env HOME=/tmp --env FILESYSTEM_ROOT=/tmp/localstack --env OVERRIDE_IN_DOCKER=0 \
      --env SERVICES=kms --env EAGER_SERVICE_LOADING=1 --env GATEWAY_SERVER=hypercorn --env GATEWAY_LISTEN=0.0.0.0:4566 \
      --env DNS_ADDRESS=0 --env SKIP_SSL_CERT_DOWNLOAD=1 --env DISABLE_EVENTS=1 \
      --entrypoint '["python3","-m","localstack.runtime.main"]'
    kind load image-archive "$OUT/localstack.tar" --name "$KIND_CLUSTER"
    rm -f "$OUT/localstack.tar"
  fi
  echo "$ref" >"$OUT/localstack.image"
}

case ${1:-} in
build | load) "$1" ;;
*) die "usage: localstack.sh build|load" ;;
esac
