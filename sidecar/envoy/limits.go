package envoy

import (
	"math"
	"os"
	"strconv"
	"strings"
)

// The container's limits (Linux, Documentation/admin-guide/cgroup-v2.rst).
const (
	cpuMax    = "/sys/fs/cgroup/cpu.max"
	memoryMax = "/sys/fs/cgroup/memory.max"
)

// What memory is needed for, measured with Envoy 1.40: 15 MiB of Envoy and as much of the sidecar
// without connections, and 30 KiB in both together for an idle connection.
const (
	baseMemory       = 48 << 20
	connectionMemory = 40 << 10
)

// Concurrency returns the number of workers for the container's CPU limit: the limit in CPUs, rounded
// up, or 1 where there is none, since a sidecar without a limit is not meant to use the whole node.
func Concurrency() int {
	b, err := os.ReadFile(cpuMax)
	if err != nil {
		return 1
	}
	return workers(string(b))
}

// workers reads "$MAX $PERIOD", in microseconds, or "max $PERIOD".
func workers(limit string) int {
	quota, period, _ := strings.Cut(strings.TrimSpace(limit), " ")
	q, qErr := strconv.Atoi(quota)
	p, pErr := strconv.Atoi(period)
	if qErr != nil || pErr != nil || q <= 0 || p <= 0 {
		return 1
	}
	return (q + p - 1) / p
}

// MaxConnections returns how many connections the container's memory limit allows. One too many is
// closed; without this limit the kernel would end Envoy, and with it all connections.
func MaxConnections() int64 {
	b, err := os.ReadFile(memoryMax)
	if err != nil {
		return math.MaxInt64
	}
	return connections(string(b))
}

// connections reads a number of bytes or "max".
func connections(limit string) int64 {
	bytes, err := strconv.ParseInt(strings.TrimSpace(limit), 10, 64)
	if err != nil {
		return math.MaxInt64
	}
	return max(1, (bytes-baseMemory)/connectionMemory)
}
