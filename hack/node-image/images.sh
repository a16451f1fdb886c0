#!/bin/bash
# Assembles the control-plane images as archives, one layer each, with the names that kubeadm wants.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
rm -f "$IMAGES"/*.tar
declare -A ref
while read -r r; do
  n=${r##*/}
  ref[${n%%:*}]=$r
done < <("$K8S_BIN/kubeadm" config images list --kubernetes-version "$K8S_VERSION")

mkimage -o "$IMAGES/etcd.tar" -t "${ref[etcd]}" --add "$RUNTIME_BIN/etcd:/usr/local/bin/etcd" \
  --add "$RUNTIME_BIN/etcdctl:/usr/local/bin/etcdctl" --dir /tmp:1777 --entrypoint '["etcd"]'
mkimage -o "$IMAGES/coredns.tar" -t "${ref[coredns]}" --add "$RUNTIME_BIN/coredns:/coredns" --entrypoint '["/coredns"]'
# kind's containerd configuration names a pause image of its own; ours answers to both names.
kind_pause=$(sed -nE 's/^ *sandbox(_image)? = "(.*)"/\2/p' "$ROOTFS/etc/containerd/config.toml" | head -1)
gcc -Os -Wall -DVERSION=local -static -o "$RUNTIME_BIN/pause" \
  "$(module_dir k8s.io/kubernetes "$K8S_VERSION")/build/pause/linux/pause.c"
strip "$RUNTIME_BIN/pause"
mkimage -o "$IMAGES/pause.tar" -t "${ref[pause]}" -t "${kind_pause:-${ref[pause]}}" \
  --add "$RUNTIME_BIN/pause:/pause" --user 65535:65535 --entrypoint '["/pause"]'

# The four Kubernetes images share one layer, so that containerd unpacks it once: kube-all and what
# kube-proxy calls (nft, iptables, conntrack, with their libraries, out of the node's root).
kube=$SRC/kube-rootfs lib=usr/lib/x86_64-linux-gnu
rm -rf "$kube"
mkdir -p "$kube"/{usr/sbin,usr/local/bin,usr/bin,usr/lib64,run,tmp,etc,$lib}
chmod 1777 "$kube/tmp"
for d in lib sbin bin lib64; do ln -s "usr/$d" "$kube/$d"; done
tools=(usr/sbin/{xtables-nft-multi,xtables-legacy-multi,nft,conntrack})
(cd "$ROOTFS" && cp -a --parents "${tools[@]}" "$lib/xtables" "$kube/")
for n in {iptables,ip6tables}{,-save,-restore}; do ln -s xtables-nft-multi "$kube/usr/sbin/$n"; done
cp -L "$ROOTFS/lib64/ld-linux-x86-64.so.2" "$kube/usr/lib64/"
# The xtables extensions count too: without libm, which one of them needs, iptables-restore fails.
(cd "$ROOTFS" && ls "${tools[@]}" "$lib"/xtables/*.so) |
  while read -r f; do chroot "$ROOTFS" ldd "/$f"; done |
  awk '/=> \//{print $3}' | sort -u |
  while read -r l; do cp -L "$ROOTFS$l" "$kube/$lib/"; done
cp "$K8S_BIN/kube-all" "$kube/usr/local/bin/"
for c in kube-apiserver kube-controller-manager kube-scheduler kube-proxy; do ln -s kube-all "$kube/usr/local/bin/$c"; done
for c in kube-apiserver kube-controller-manager kube-scheduler kube-proxy; do
  mkimage -o "$IMAGES/$c.tar" -t "${ref[$c]}" --rootfs "$kube" --entrypoint "[\"$c\"]"
done
