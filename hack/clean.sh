#!/bin/bash
# `make clean`: no cluster, no dockerd of ours, no network rule, kernel settings as they were. Downloads stay in
# the cache folder.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
export CLUSTER=cloister # with CLUSTER=existing too: only what is ours goes
step "delete the cluster" "docker rm -f cloister-control-plane" "$HACK/cluster.sh" delete
step "remove the firewall rule" "iptables -S DOCKER-USER" "$HACK/firewall.sh" remove
step "stop our container engine" "kill \$(cat $RUN/docker.pid)" "$HACK/docker.sh" stop
rm -rf "$OUT"/install "$OUT"/*.env "$OUT"/nginx.yaml "$OUT"/nginx.digest "$OUT"/nginx.measurements.json
echo "Downloads and build results stay in $CACHE; delete that folder to start from nothing."
