#!/bin/bash
# Prints apt sources (deb822) of a Debian suite, made from the mirrors that this host uses.
# Usage: apt-sources.sh SUITE
# With SNAPSHOT, a time as 20260102T030405Z, they are Debian's whole archive as it was then.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
suite=$1
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keyring" ] || die "the Debian archive keys are missing: apt-get install debian-archive-keyring"
# apt's own view of its sources, whatever file and format they are written in.
uris=$(apt-get indextargets --format '$(SITE) $(CODENAME) $(ORIGIN)' 'Created-By: Packages' |
  awk '$3 == "Debian" {print $1, $2}' | sort -u)
main=$(awk '$2 !~ /-security$/ {print $1; exit}' <<<"$uris")
security=$(awk '$2 ~ /-security$/ {print $1; exit}' <<<"$uris")
[ -n "$main" ] || die "no Debian mirror in this machine's apt sources: add one and run apt-get update"
valid=yes
if [ -n "${SNAPSHOT:-}" ]; then
  main=https://snapshot.debian.org/archive/debian/$SNAPSHOT
  security=https://snapshot.debian.org/archive/debian-security/$SNAPSHOT
  valid=no
fi
cat <<SOURCES
Types: deb
URIs: $main
Suites: $suite $suite-updates
Components: main
Signed-By: $keyring
Check-Valid-Until: $valid
SOURCES
[ -z "$security" ] || cat <<SOURCES

Types: deb
URIs: $security
Suites: $suite-security
Components: main
Signed-By: $keyring
Check-Valid-Until: $valid
SOURCES
