// Package metadata says what metadata.yaml says, for the code.
package metadata

import "go.opentelemetry.io/collector/component"

// Type is the receiver's name in configurations.
var Type = component.MustNewType("enclave")

// ScopeName is the instrumentation scope of the receiver's own telemetry.
const ScopeName = "cloister.dev/cloister/collector/enclavereceiver"

// Stability of each signal.
const (
	TracesStability  = component.StabilityLevelAlpha
	MetricsStability = component.StabilityLevelAlpha
	LogsStability    = component.StabilityLevelAlpha
)
