#!/bin/bash
# Makes the development root once: the key that signs the documents of software NSMs and the
# certificate that `cloister curl --root` is given. It vouches for nothing but this machine's tests.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
dir=$CACHE/dev-root
[ ! -s "$dir/root.pem" ] || exit 0
umask 077
mkdir -p "$dir"
openssl ecparam -name secp384r1 -genkey -noout | openssl pkcs8 -topk8 -nocrypt -out "$dir/key.pem"
openssl req -x509 -new -sha384 -key "$dir/key.pem" -days 3650 -subj "/CN=Cloister development root" \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" -out "$dir/root.pem.part"
mv "$dir/root.pem.part" "$dir/root.pem"
