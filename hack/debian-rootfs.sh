#!/bin/bash
# Bootstraps a small Debian root file system from the host's own package sources.
# Usage: debian-rootfs.sh VARIANT FOLDER PACKAGE,PACKAGE,... [SUITE]
# VARIANT is mmdebstrap's minbase, essential, ...; without SUITE it is bookworm.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
variant=$1 target=$2 packages=$3 suite=${4:-bookworm}
sources=$RUN/$suite.sources
"$HACK/apt-sources.sh" "$suite" >"$sources"
# Java's package wants to link a page of the manual into the folder that is left out.
# Its mounts are seen by nobody else, and gone with it, also when it is killed.
unshare --mount mmdebstrap --mode=root --variant="$variant" --include="$packages" \
  --aptopt='APT::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --essential-hook='mkdir -p "$1/usr/share/man/man1"' \
  "$suite" "$target" "$sources"
# The result says nothing of the machine it was made on.
rm -rf "$target"/etc/apt/sources.list "$target"/etc/apt/sources.list.d/* "$target"/var/lib/apt/lists/* \
  "$target"/var/cache/apt/* "$target"/var/log/*.log "$target"/var/log/apt "$target"/etc/hostname "$target"/etc/resolv.conf
: >"$target/etc/machine-id"
