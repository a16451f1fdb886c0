#!/bin/bash
# Downloads the newest version of one Debian package of any suite, with its signature checked, and
# unpacks it. Usage: debian-package.sh SUITE PACKAGE FOLDER. PACKAGE may be PACKAGE=VERSION, and
# src:PACKAGE=VERSION for the files of a source package, as they are. Prints PACKAGE=VERSION.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
suite=$1 package=$2 target=$3
# A private configuration: this machine's own package lists stay as they are.
apt=$RUN/apt-$suite
types=deb
[[ $package != src:* ]] || types="deb deb-src"
mkdir -p "$apt"/{sources,lists/partial,archives/partial,download}
"$HACK/apt-sources.sh" "$suite" | sed "s/^Types: .*/Types: $types/" >"$apt/sources/debian.sources"
: >"$apt/status"
cat >"$apt/apt.conf" <<CONF
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$apt/sources";
Dir::State::status "$apt/status";
Dir::State::lists "$apt/lists";
Dir::Cache::archives "$apt/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Sandbox::User "root";
CONF
export APT_CONFIG=$apt/apt.conf
apt-get update -qq >&2
mkdir -p "$target"
if [[ $package = src:* ]]; then
  cd "$target"
  apt-get source --download-only -qq "${package#src:}" >&2
  echo "${package#src:}"
  exit 0
fi
cd "$apt/download"
rm -f ./*.deb
apt-get download -qq "$package" >&2
dpkg-deb -x ./*.deb "$target"
dpkg-deb -f ./*.deb Package Version | awk '{v[NR]=$2} END{print v[1] "=" v[2]}'
rm -f ./*.deb
