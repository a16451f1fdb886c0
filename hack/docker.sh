#!/bin/bash
# Usage: docker.sh start|stop|own. Starts an engine of our own when none answers: own socket, data and
# pid file in the cache folder, so that nothing else on the machine is disturbed; stops only that one;
# tells by the exit status whether that one runs.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
pidfile=$RUN/docker.pid data=$CACHE/docker

own_pid() {
  local pid
  pid=$(cat "$pidfile" 2>/dev/null) && grep -qz dockerd "/proc/$pid/cmdline" 2>/dev/null && echo "$pid"
}

# raise SETTING VALUE: a kernel setting is at least this, until the engine is stopped.
raise() {
  local old
  old=$(sysctl -n "$1")
  if [ "$old" -lt "$2" ]; then
    echo "$1=$old" >>"$RUN/sysctl"
    sysctl -qw "$1=$2"
  fi
}

# restore undoes what start has done to the machine, also where the engine has ended by itself.
restore() {
  if [ -e "$RUN/forward-policy" ]; then
    iptables -P FORWARD "$(cat "$RUN/forward-policy")"
  fi
  if [ -e "$RUN/sysctl" ]; then
    sysctl -qp "$RUN/sysctl"
  fi
  if [ -e "$RUN/mounted-cgroup" ]; then
    umount /sys/fs/cgroup/systemd 2>/dev/null || true
  fi
  rm -f "$RUN"/{forward-policy,sysctl,mounted-cgroup}
}

start() {
  use_engine
  if docker info >/dev/null 2>&1; then
    echo "an engine answers"
    return
  fi
  [ "$(id -u)" = 0 ] || die "no container engine answers and only root can start one: start Docker, or run this as root"
  rm -f "$pidfile" "$OWN_SOCKET"
  raise net.ipv4.ip_forward 1
  # systemd and the kubelet in the node need many inotify instances.
  raise fs.inotify.max_user_instances 1024 || true
  raise fs.inotify.max_user_watches 524288 || true
  # On a cgroup v1 host systemd in the node expects a hierarchy of its own name.
  if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ] && ! mountpoint -q /sys/fs/cgroup/systemd; then
    mkdir -p /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd systemd /sys/fs/cgroup/systemd
    touch "$RUN/mounted-cgroup"
  fi
  # No default bridge: kind makes a network of its own, which can be removed again without a trace.
  [ -e "$RUN/forward-policy" ] || iptables -S FORWARD | awk '/^-P/{print $3}' >"$RUN/forward-policy"
  setsid dockerd -H "unix://$OWN_SOCKET" --bridge none --data-root "$data" --exec-root "$RUN/docker" --pidfile "$pidfile" \
    --storage-driver overlay2 --exec-opt native.cgroupdriver=cgroupfs \
    --add-runtime "boundcaps=$HACK/runc-boundcaps" --default-runtime boundcaps \
    --log-opt max-size=20m >"$LOGS/dockerd.log" 2>&1 </dev/null &
  export DOCKER_HOST=unix://$OWN_SOCKET
  for _ in $(seq 120); do
    ! docker info >/dev/null 2>&1 || return 0
    sleep 0.5
  done
  tail -n 20 "$LOGS/dockerd.log"
  die "dockerd did not start: read $LOGS/dockerd.log"
}

stop() {
  local pid
  if pid=$(own_pid); then
    docker -H "unix://$OWN_SOCKET" network rm kind >/dev/null 2>&1 || true
    kill "$pid"
    timeout 60 tail --pid="$pid" -f /dev/null || die "dockerd ($pid) does not end: kill it by hand"
    "$HACK/firewall.sh" sweep
  fi
  restore
  rm -f "$pidfile" "$OWN_SOCKET"
}

case ${1:-} in
start) start ;;
stop) stop ;;
own) own_pid >/dev/null ;;
*) die "usage: docker.sh start|stop|own" ;;
esac
