package inject

import (
	"fmt"

	"cloister.dev/cloister/workload"
)

// HostAccess lists what the host of this workload can read and what it can change, one sentence of at
// most 120 characters each. Everything else is sealed from the host by the enclave.
func HostAccess(m *workload.Manifest) []string {
	out := []string{"the host can read: stdout, stderr and termination message of the workload, its exit code, results of probes and hooks"}
	if m.Logs == workload.LogsOTLP {
		out[0] = "the host can read: the workload's exit code and the results of its probes and hooks (logs: otlp)"
	}
	for _, p := range m.Ports {
		if p.Plaintext {
			out = append(out, fmt.Sprintf("the host can read and change: everything on port %d (plaintext: true)", p.Port))
		}
	}
	if len(m.Egress) > 0 {
		out = append(out,
			"the host can read: names, sizes and times of connections to egress",
			"the host can read and change: what the workload sends to egress without encryption of its own")
	}
	out = append(out, hostAccess(m)...)
	out = append(out, kmsAccess(m)...)
	if m.Plugin(workload.PluginAuthentication) != nil {
		out = append(out, "the host can read: stdout and stderr of plugins")
	}
	if m.Plugin(workload.PluginLogging) != nil || m.Plugin(workload.PluginTelemetry) != nil {
		out = append(out, "the host can change: the name, namespace and uid of the pod that logs and telemetry carry")
	}
	return out
}
