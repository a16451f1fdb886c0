#!/bin/bash
# Usage: firewall.sh add|remove|sweep. Keeps the cluster's packets on this machine: the address of a
# Service that kube-proxy has not programmed yet would otherwise be masqueraded out of the default
# device and be answered by whoever has it.
#
# Where our own dockerd runs, the rule holds for every container; elsewhere only for the kind bridge.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
use_engine
mark=cloister-keep-packets-here

remove() {
  { iptables -S DOCKER-USER 2>/dev/null || true; } | sed -n "/--comment $mark /s/^-A/-D/p" |
    while read -ra rule; do iptables "${rule[@]}"; done
}

add() {
  local device source=()
  device=$(ip -o route show default | awk '{print $5; exit}')
  [ -n "$device" ] || { echo "no default route: nothing can leave"; return; }
  # kind takes a network of this name as it finds it; made now, the rule stands before its first pod.
  docker network inspect kind >/dev/null 2>&1 ||
    docker network create -d bridge -o com.docker.network.bridge.enable_ip_masquerade=true kind >/dev/null
  if ! "$HACK/docker.sh" own; then
    source=(-s "$(docker network inspect kind -f '{{range .IPAM.Config}}{{.Subnet}} {{end}}' | tr ' ' '\n' | grep -m1 '\.')")
  fi
  local rule=("${source[@]}" -o "$device" -m comment --comment "$mark" -j REJECT)
  iptables -C DOCKER-USER "${rule[@]}" 2>/dev/null || iptables -I DOCKER-USER "${rule[@]}"
}

# sweep removes the chains that a stopped dockerd leaves and the rules that lead to them.
sweep() {
  local table chain rule
  for table in filter nat; do
    iptables -t $table -S | sed -n '/^-A [A-Z]* .*-j DOCKER/s/^-A/-D/p' |
      while read -ra rule; do iptables -t $table "${rule[@]}"; done
    for action in -F -X; do
      iptables -t $table -S | awk '/^-N DOCKER/{print $2}' |
        while read -r chain; do iptables -t $table $action "$chain"; done
    done
  done
}

case ${1:-} in
add) add ;;
remove) remove ;;
sweep) sweep ;;
*) die "usage: firewall.sh add|remove|sweep" ;;
esac
