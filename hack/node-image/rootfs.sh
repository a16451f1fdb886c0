#!/bin/bash
# Makes the node's root file system: Debian bookworm with the packages and files of kind's own base
# image. Bookworm (systemd 252) on purpose: systemd 256 and later refuse to boot on cgroup v1.
# Left out: fuse-overlayfs, nfs-common, open-iscsi (rootless engines and network storage only).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
packages=systemd,conntrack,iptables,nftables,iproute2,ethtool,util-linux,mount,kmod,libseccomp2,bash,ca-certificates,curl,jq,procps,e2fsprogs
kind=$(module_dir sigs.k8s.io/kind "$KIND_VERSION")/images/base/files
if [ ! -e "$ROOTFS/.complete" ]; then
  rm -rf "$ROOTFS"
  "$HACK/debian-rootfs.sh" minbase "$ROOTFS" "$packages"
fi
# Files of the module cache are read-only: the modes are set here.
cd "$ROOTFS"
mkdir -p kind/bin kind/manifests LICENSES etc/containerd etc/systemd/system/kubelet.service.d
install -m755 "$kind"/usr/local/bin/* usr/local/bin/
install -m644 "$kind"/kind/README.txt kind/
install -m755 "$kind"/kind/bin/* kind/bin/
install -m644 "$kind"/etc/crictl.yaml etc/
install -m644 "$kind"/etc/containerd/* etc/containerd/
install -m644 "$kind"/etc/default/* etc/default/
install -m644 "$kind"/etc/sysctl.d/* etc/sysctl.d/
install -m644 "$kind"/etc/systemd/system/*.{service,slice} etc/systemd/system/
install -m644 "$kind"/etc/systemd/system/kubelet.service.d/* etc/systemd/system/kubelet.service.d/
chroot "$ROOTFS" bash -euc '
  units=/lib/systemd/system
  rm -f $units/sysinit.target.wants/systemd-tmpfiles-setup.service $units/multi-user.target.wants/* \
    /etc/systemd/system/*.wants/* $units/local-fs.target.wants/* $units/sockets.target.wants/*udev* \
    $units/sockets.target.wants/*initctl* $units/basic.target.wants/*
  grep -q ^ReadKMsg=no /etc/systemd/journald.conf || echo ReadKMsg=no >>/etc/systemd/journald.conf
  ln -sf /usr/lib/systemd/systemd /sbin/init
  systemctl enable kubelet.service containerd.service undo-mount-hacks.service
  systemctl mask systemd-binfmt.service
  mkdir -p /etc/kubernetes/manifests /opt/cni/bin /etc/cni/net.d
  : >/etc/machine-id'
touch "$ROOTFS/.complete"
