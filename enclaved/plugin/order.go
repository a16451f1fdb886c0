package plugin

import (
	"context"
	"encoding/json"
	"net"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"cloister.dev/cloister/enclaved/plugins/oidc"
	"cloister.dev/cloister/workload"
)

// Server is the service of a built-in plugin.
type Server interface {
	authv3.AuthorizationServer
	// Run does what goes on beside requests, until ctx ends. It calls serving when the plugin becomes able
	// or unable to decide on requests; it is unable at first.
	Run(ctx context.Context, serving func(bool))
}

// Dial connects to "host:port" outside of the enclave.
type Dial func(ctx context.Context, address string) (net.Conn, error)

// builtin is a plugin that is a subcommand of this program.
type builtin struct {
	pluginType, name string
	setup            func(config json.RawMessage, dial Dial) (Server, error)
}

// order lists the built-in plugins that are processes. Within one request the manifest's order rules, in
// which its author put a cheap check before a dear one. Between types the order is fixed: authentication
// comes first, so that nothing else sees, changes or counts a request that is refused. Logging and
// telemetry are built in too, but run inside enclaved itself: they parse nothing that strangers send.
var order = []builtin{
	{workload.PluginAuthentication, "oidc", func(config json.RawMessage, dial Dial) (Server, error) { return oidc.Setup(config, dial) }},
}
