package logging

import (
	"fmt"

	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"

	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/workload"
)

// Setup reads the configuration of a plugin of a manifest, a workload.LoggingStdout or a
// workload.LoggingOTLP. The latter's records come from source and go to what exporter returns; silent keeps
// its lines from the console.
func Setup(m *workload.Plugin, silent bool, source *resource.Resource, exporter func(workload.OTLP) (*otlp.Exporter, error)) (*Plugin, error) {
	config, err := m.BuiltinConfig()
	if err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", m.Builtin, err)
	}
	var cfg Config
	var redaction workload.Redaction
	switch c := config.(type) {
	case *workload.LoggingStdout:
		redaction = c.Redaction
	case *workload.LoggingOTLP:
		redaction = c.Redaction
		cfg.Silent, cfg.Resource = silent, source
		if cfg.Exporter, err = exporter(c.OTLP); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%s is no logging plugin", m.Builtin)
	}
	if cfg.Redact, err = redaction.Expressions(); err != nil {
		return nil, err
	}
	return New(cfg), nil
}
