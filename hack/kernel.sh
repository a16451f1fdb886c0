#!/bin/bash
# Puts Debian trixie's newest cloud kernel into the cache: $OUT/vmlinuz and its version beside it.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ ! -s "$OUT/vmlinuz" ] || { cat "$OUT/vmlinuz.version"; exit 0; }
tmp=$(mktemp -d "$CACHE/kernel.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
FOLLOW=1 "$HACK/debian-package.sh" trixie linux-image-cloud-amd64 "$tmp" >"$OUT/vmlinuz.version"
install -m644 "$tmp"/boot/vmlinuz-* "$OUT/vmlinuz.part"
mv "$OUT/vmlinuz.part" "$OUT/vmlinuz"
cat "$OUT/vmlinuz.version"
