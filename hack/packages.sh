#!/bin/bash
# Installs the host's missing Debian packages.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
packages=(mmdebstrap build-essential pkg-config libseccomp-dev xz-utils zstd jq
  cpio unzip python3-pip python3-venv maven iproute2 procps openssl ca-certificates curl)
# An existing cluster has its engine and its network.
[ "$CLUSTER" = existing ] || packages+=(docker.io iptables nftables)
missing=()
for p in "${packages[@]}"; do
  [ "$(dpkg-query -Wf '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing+=("$p")
done
[ ${#missing[@]} -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || die "packages are missing and only root can install them: apt-get install ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Installing docker.io must not start an engine that nobody would stop again.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update
apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
