#!/bin/bash
# Builds Kubernetes from the Go module k8s.io/kubernetes as one binary with seven names (kube-all).
# The module requires its staging modules at v0.0.0; a wrapper module replaces each of them by the
# published v0.<minor>.<patch>.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
staging=v0.${K8S_VERSION#v1.}
minor=$(cut -d. -f2 <<<"$K8S_VERSION")
upstream=$(module_dir k8s.io/kubernetes "$K8S_VERSION")
wrapper=$SRC/kubernetes
mkdir -p "$wrapper/kube-all"
cd "$wrapper"
{
  printf 'module kubebuild\n\ngo %s\n\n' "$(awk '/^go /{print $2}' "$upstream/go.mod")"
  # A main module must repeat the GODEBUG defaults that Kubernetes pins.
  awk '/^godebug/{p=1} p{print} p&&/^\)/{exit}' "$upstream/go.mod"
  printf '\nrequire k8s.io/kubernetes %s\n' "$K8S_VERSION"
  # Every requirement is copied: with a pruned graph the indirect packages would not resolve.
  echo "require ("
  awk '/^require \(/{p=1;next} /^\)/{p=0} p' "$upstream/go.mod" |
    sed -E "s#// indirect##; s#^(\s+k8s.io/\S+) v0.0.0\s*\$#\1 $staging#"
  printf ')\nreplace (\n'
  awk '/=> \.\/staging/{print $1}' "$upstream/go.mod" | while read -r m; do echo "  $m => $m $staging"; done
  echo ")"
} >go.mod
cp "$upstream/go.sum" go.sum
chmod u+w go.sum
cp "$NODE/kube-all/main.go.txt" kube-all/main.go

ld="-s -w"
for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
  ld+=" -X $p.gitVersion=$K8S_VERSION -X $p.gitMajor=1 -X $p.gitMinor=$minor -X $p.gitTreeState=clean"
  ld+=" -X $p.gitCommit=gomodule -X $p.buildDate=1970-01-01T00:00:00Z"
done
go build -trimpath -ldflags "$ld" -o "$K8S_BIN/kube-all" ./kube-all
for b in kubelet kubeadm kubectl; do ln -sf kube-all "$K8S_BIN/$b"; done
