package plugin

import (
	"context"
	"encoding/json"
	"net"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"cloister.dev/cloister/enclaved/plugins/logging"
	"cloister.dev/cloister/enclaved/plugins/oidc"
	"cloister.dev/cloister/enclaved/plugins/telemetry"
	"cloister.dev/cloister/workload"
)

// Server is the service of a built-in plugin that is a process.
type Server interface {
	authv3.AuthorizationServer
	// Run does what goes on beside requests, until ctx ends. It calls serving when the plugin becomes able
	// or unable to decide on requests; it is unable at first.
	Run(ctx context.Context, serving func(bool))
}

// Dial connects to "host:port" outside of the enclave.
type Dial func(ctx context.Context, address string) (net.Conn, error)

// builtin is a plugin that is part of this program: a subcommand, which runs as a process of its own, or
// something that runs inside enclaved itself. One of the two functions is set.
type builtin struct {
	pluginType, name string

	process   func(config json.RawMessage, dial Dial) (Server, error)
	inProcess func(s *InProcessSet, m *workload.Plugin) (InProcess, error)
}

// order lists the built-in plugins.
//
// Authentication comes first, so that nothing else sees, changes or counts a request that is refused. Among
// several of them the manifest's order rules, in which its author put a cheap check before a dear one; each
// is a process, since it parses what strangers send. Logging and telemetry parse nothing of strangers and
// run inside enclaved. They start and end in this order: the last metrics then say what the last log
// records have come to.
var order = []builtin{
	{pluginType: workload.PluginAuthentication, name: "oidc", process: func(config json.RawMessage, dial Dial) (Server, error) {
		return oidc.Setup(config, dial)
	}},
	{pluginType: workload.PluginLogging, name: "stdout", inProcess: setupLogging},
	{pluginType: workload.PluginLogging, name: "otlp", inProcess: setupLogging},
	{pluginType: workload.PluginTelemetry, name: "otlp", inProcess: func(s *InProcessSet, m *workload.Plugin) (p InProcess, err error) {
		s.Telemetry, err = telemetry.Setup(m, s.source, s.cfg.Usage, s.exporter)
		return s.Telemetry, err
	}},
}

func setupLogging(s *InProcessSet, m *workload.Plugin) (p InProcess, err error) {
	s.Logging, err = logging.Setup(m, s.cfg.Manifest.Logs == workload.LogsOTLP, s.source, s.exporter)
	return s.Logging, err
}
