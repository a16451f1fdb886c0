// Package enclavereceiver is a receiver of OpenTelemetry data (OTLP over gRPC) that serves attested
// enclaves only. It demands, in the TLS handshake, a client certificate that carries an attestation
// document, checks it against a measurement set and one root, and marks everything that comes over the
// connection with what was proved: its senders cannot say who they are themselves.
package enclavereceiver
