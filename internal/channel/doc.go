// Package channel is the protocol between initboot and enclaved: the heartbeat that every Nitro enclave
// sends when it has booted, and the gRPC service Enclave on the same connection.
package channel
