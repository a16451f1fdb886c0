package envoy

import (
	"os"
	"strconv"
	"strings"
)

// cpuMax is the container's CPU limit (Linux, Documentation/admin-guide/cgroup-v2.rst, "cpu.max").
const cpuMax = "/sys/fs/cgroup/cpu.max"

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
