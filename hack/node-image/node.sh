#!/bin/bash
# Puts the node image together: root file system, binaries, and the control-plane images unpacked
# into containerd's own folders. containerd runs in a chroot for that, not in a container, so that
# its overlay snapshots lie on a real file system.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
node=$WS/node
rm -rf "$node"
cp -a "$ROOTFS" "$node"
rm -f "$node/.complete"
install -m755 "$K8S_BIN/kube-all" "$node/usr/bin/"
for c in kubelet kubeadm kubectl; do ln -sf kube-all "$node/usr/bin/$c"; done
install -m755 "$RUNTIME_BIN"/{containerd,ctr,containerd-shim-runc-v2} "$node/usr/local/bin/"
install -m755 -D "$RUNTIME_BIN/runc" "$node/usr/local/sbin/runc"
install -m755 "$RUNTIME_BIN"/{host-local,loopback,ptp,bridge,portmap} "$node/opt/cni/bin/"
printf %s "$K8S_VERSION" >"$node/kind/version"
# From 1.35 on the kubelet refuses cgroup v1 unless told otherwise; this file wins over kubeadm's.
echo 'KUBELET_EXTRA_ARGS="--runtime-cgroups=/system.slice/containerd.service --fail-cgroupv1=false"' >"$node/etc/default/kubelet"
# The engine may run without CAP_SYS_RESOURCE: then oom_score_adj cannot be lowered.
sed -i 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' "$node/etc/containerd/config.toml"
cp "$NODE"/10-bridge.conflist "$node/etc/cni/net.d/"
cp "$NODE"/default-cni.yaml "$NODE"/default-storage.yaml "$node/kind/manifests/"
# The base OCI spec with kind's hook, as in kind's own base image.
chroot "$node" sh -euc 'ctr oci spec |
  jq ".hooks.createContainer[.hooks.createContainer | length] |= . + {\"path\": \"/kind/bin/mount-product-files.sh\"} | del(.process.rlimits)" \
    >/etc/containerd/cri-base.json'

mkdir -p "$node/images"
cp "$NODE/import.sh" "$node/import.sh"
unshare -m -p -f --propagation private sh -euc \
  'mount --bind "$1" "$2/images"; exec chroot "$2" sh /import.sh' -- "$IMAGES" "$node" ||
  { cat "$node/var/log/containerd-build.log"; exit 1; }
rm -rf "$node/import.sh" "$node/images" "$node/var/log/containerd-build.log"

mkimage -o "$WS/node-image.tar" -t "kindest/node:$K8S_VERSION-local" --rootfs "$node" --keep-owner \
  --env container=docker --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
  --stop-signal SIGRTMIN+3 --entrypoint '["/usr/local/bin/entrypoint","/sbin/init"]'
