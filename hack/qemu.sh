#!/bin/bash
# Builds QEMU with the nitro-enclave machine into the cache, from Debian trixie's source: Debian's own packages
# lack that machine. $OUT/qemu gets qemu-system-x86_64, the libraries that it is linked to in libs, what boots
# the machine in firmware, and run, which starts it on a host with other libraries.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
if [ "$(cat "$OUT/qemu/version" 2>/dev/null)" = "$QEMU_VERSION" ]; then
  echo "$QEMU_VERSION"
  exit 0
fi
tmp=$(mktemp -d "$CACHE/qemu.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
root=$tmp/root new=$tmp/new
mkdir -p "$new"/{libs,firmware}
"$HACK/debian-package.sh" trixie "qemu-system-data=$QEMU_VERSION" "$tmp/data"
install -m644 "$tmp"/data/usr/share/qemu/{qboot.rom,linuxboot_dma.bin} "$new/firmware/"
"$HACK/debian-package.sh" trixie "src:qemu=$QEMU_VERSION" "$tmp/source"
"$HACK/debian-rootfs.sh" minbase "$root" \
  gcc,libc6-dev,ninja-build,meson,pkgconf,python3,python3-venv,python3-pycotap,python3-setuptools,python3-wheel,flex,bison,libglib2.0-dev,libcbor-dev,libgnutls28-dev,libfdt-dev,libpixman-1-dev,zlib1g-dev trixie
mkdir "$root/qemu"
tar -xf "$tmp"/source/qemu_*.orig.tar.xz -C "$root/qemu" --strip-components=1
# Debian's archive of the source has no firmware of others in it.
sed -i 's/unpack_edk2_blobs = bzip2.found()/unpack_edk2_blobs = false/' "$root/qemu/meson.build"
printf 'CONFIG_NITRO_ENCLAVE=y\nCONFIG_MICROVM=y\n' >"$root/qemu/configs/devices/x86_64-softmmu/nitro.mak"
mkdir "$root/qemu/build"
chroot "$root" sh -ec 'cd /qemu/build
../configure --target-list=x86_64-softmmu --without-default-features --without-default-devices \
  --with-devices-x86_64=nitro --enable-system --enable-tcg --enable-kvm --enable-fdt=system --enable-gnutls \
  --enable-libcbor --enable-vhost-user --enable-pixman --disable-docs --disable-werror --disable-install-blobs
ninja qemu-system-x86_64
strip qemu-system-x86_64
ldd qemu-system-x86_64 | sed -nE "s|.*[ \t](/[^ ]+) \(.*|\1|p" >libs'
install -m755 "$root/qemu/build/qemu-system-x86_64" "$new/"
while read -r lib; do install -m755 "$root$(chroot "$root" readlink -f "$lib")" "$new/libs/${lib##*/}"; done <"$root/qemu/build/libs"
cat >"$new/run" <<'RUN'
#!/bin/sh
here=$(dirname "$0")
exec "$here/libs/ld-linux-x86-64.so.2" --library-path "$here/libs" "$here/qemu-system-x86_64" "$@"
RUN
chmod +x "$new/run"
"$new/run" -M help | grep -q ^nitro-enclave || die "this QEMU has no nitro-enclave machine: read the log above"
echo "$QEMU_VERSION" >"$new/version"
rm -rf "$OUT/qemu"
mv "$new" "$OUT/qemu"
echo "$QEMU_VERSION"
