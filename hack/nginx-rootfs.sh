#!/bin/bash
# Bootstraps Debian's nginx, unmodified, as $OUT/nginx-rootfs.tar: the root of the sample image.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ ! -s "$OUT/nginx-rootfs.tar" ] || exit 0
[ "$(id -u)" = 0 ] || die "the root file system needs chroot: run this as root"
root=$(mktemp -d "$CACHE/nginx.XXXXXX")
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"
"$HACK/debian-rootfs.sh" essential "$root" nginx
# The image unpacks into the enclave's memory: without the packages' scripts nobody needs Perl, and
# without iconv nobody needs its tables.
rm -rf "$root"/usr/share/perl "$root"/usr/lib/x86_64-linux-gnu/{perl,perl-base,gconv} "$root"/var/cache/debconf
# An image brings no devices: whoever runs it makes them.
rm -rf "$root"/dev/*
# As in the official image: the logs are the container's.
ln -sf /dev/stdout "$root/var/log/nginx/access.log"
ln -sf /dev/stderr "$root/var/log/nginx/error.log"
tar --numeric-owner --sort=name --mtime=@0 -C "$root" -cf "$OUT/nginx-rootfs.tar.part" .
mv "$OUT/nginx-rootfs.tar.part" "$OUT/nginx-rootfs.tar"
