// Package plugin is the frame of the plugins that are processes of their own: authentication plugins,
// built in or of an image. Each has a uid, pid, mount and network namespaces and a read-only root of its
// own, listens on a unix socket and speaks gRPC there: Envoy's ext_authz (envoy.service.auth.v3) and the
// health service (grpc.health.v1). One that ends or that does not answer is started again, with backoff.
//
// What a process finds in its environment is the contract of docs/plugins.md: the constants Env….
package plugin
