package telemetry

import (
	"fmt"
	"net"
	"strconv"

	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"

	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/workload"
)

// Setup reads the configuration of a plugin of a manifest, a workload.TelemetryOTLP. What the plugin says
// itself comes from source and goes, as everything else, to what exporter returns. The workload's intake is
// workload.TelemetryPort on the loopback device.
func Setup(m *workload.Plugin, source *resource.Resource, usage func() (Usage, error), exporter func(workload.OTLP) (*otlp.Exporter, error)) (*Plugin, error) {
	config, err := m.BuiltinConfig()
	if err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", m.Builtin, err)
	}
	c, ok := config.(*workload.TelemetryOTLP)
	if !ok {
		return nil, fmt.Errorf("%s is no telemetry plugin", m.Builtin)
	}
	e, err := exporter(c.OTLP)
	if err != nil {
		return nil, err
	}
	return New(Config{Exporter: e, Resource: source, Usage: usage, Listen: func() (net.Listener, error) {
		return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(workload.TelemetryPort)))
	}}), nil
}
