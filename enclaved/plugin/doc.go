// Package plugin is the frame of the plugins. Authentication plugins, built in or of an image, are processes
// of their own. Each has a uid, pid, mount and network namespaces and a read-only root of its own, listens on
// a unix socket and speaks gRPC there: Envoy's ext_authz (envoy.service.auth.v3) and the health service
// (grpc.health.v1). One that ends or that does not answer is started again, with backoff. Logging and
// telemetry are built in and run inside enclaved.
//
// What a process finds in its environment is the contract of docs/plugins.md: the constants Env….
//
// A new built-in plugin is a folder of enclaved/plugins, a line of order, and a config in package workload,
// which webhook and client check too.
package plugin
