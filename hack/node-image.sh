#!/bin/bash
# Gives the engine a node image: the one it has, else one from the user's cache or from beside the
# repository, else kind's official one, else one built here. Writes its name to $RUN/node-image.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_engine
local_image=kindest/node:$K8S_VERSION-local
packed=kind-node-$K8S_VERSION.tar.zst

found() {
  echo "$1" >"$RUN/node-image"
  echo "node image: $1"
  exit 0
}
has() { docker image inspect "$1" >/dev/null 2>&1; }
unpack() { zstd -dc --long=30 "$1" | docker load; }

! has "$local_image" || found "$local_image"
official=$(sed -nE 's/^const Image = "(.*)"$/\1/p' \
  "$(cd "$CACHE" && go mod download -json "sigs.k8s.io/kind@$KIND_VERSION" | jq -r .Dir)/pkg/apis/config/defaults/image.go")
! has "$official" || found "$official"
for f in "$CACHE/$packed" "$SHARED/$packed"; do
  if [ -f "$f" ] && unpack "$f"; then found "$local_image"; fi
done
# The official image refuses to start on cgroup v1.
if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] && timeout 900 docker pull -q "$official"; then
  found "$official"
fi
"$HACK/node-image/build.sh"
ws=$CACHE/node-image
# kube-all lies twice in the image, far apart: the long window makes the second copy free.
zstd -q -f -T0 -12 --long=30 "$ws/node-image.tar" -o "$CACHE/$packed.part"
mv "$CACHE/$packed.part" "$CACHE/$packed"
docker load -i "$ws/node-image.tar"
rm -rf "$ws"
found "$local_image"
