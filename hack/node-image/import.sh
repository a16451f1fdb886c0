#!/bin/sh
# Runs inside the new node root: imports /images/*.tar into containerd and unpacks them.
set -eu
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /sys/fs/cgroup
containerd -l warn >/var/log/containerd-build.log 2>&1 &
daemon=$!
tries=0
until ctr version >/dev/null 2>&1; do
  tries=$((tries + 1))
  [ $tries -lt 100 ] || exit 1
  sleep 0.3
done
for f in /images/*.tar; do
  ctr -n k8s.io images import --label=io.cri-containerd.pinned=pinned --all-platforms "$f"
done
ctr -n k8s.io images ls -q
# The layers' blobs are not needed once they are unpacked; without them the image is half the size.
ctr -n k8s.io content ls | awk 'NR>1{print $1, $2}' | while read -r digest size; do
  case $size in *MB | *MiB | *GB | *GiB) ctr -n k8s.io content rm "$digest" ;; esac
done
# A synchronous removal collects the garbage now and not at the first boot.
any=$(ctr -n k8s.io images ls -q | grep pause | head -1)
ctr -n k8s.io images tag "$any" gc.invalid/x:1
ctr -n k8s.io images rm --sync gc.invalid/x:1
kill $daemon
wait $daemon || true
