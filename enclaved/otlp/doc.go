// Package otlp sends and takes OpenTelemetry data (OTLP over gRPC, opentelemetry-proto
// docs/specification.md). An Exporter sends it over attested TLS to what the manifest names; a Server
// takes that of the workload. Neither ever waits for the other end while somebody waits for it: what
// cannot be sent is kept within bounds, and then dropped and counted.
package otlp
