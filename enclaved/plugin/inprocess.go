package plugin

import (
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"net/http"
	"strconv"

	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/enclaved/plugins/logging"
	"cloister.dev/cloister/enclaved/plugins/telemetry"
	"cloister.dev/cloister/workload"
)

// InProcess is a plugin that runs inside enclaved itself. None of its methods waits for anything outside
// of the enclave: telemetry never holds the workload up.
type InProcess interface {
	// Start begins its work.
	Start() error
	// Shutdown ends it, and hands what it still holds to its exporter.
	Shutdown()
}

// InProcessConfig is what the plugins inside enclaved are started with.
type InProcessConfig struct {
	Manifest *workload.Manifest
	Host     otlp.Host
	Usage    func() (telemetry.Usage, error)
}

// InProcessSet is the plugins inside enclaved. There is at most one of each type.
type InProcessSet struct {
	// Logging and Telemetry are nil where the manifest has none.
	Logging   *logging.Plugin
	Telemetry *telemetry.Plugin

	exporters map[workload.OTLP]*otlp.Exporter
	started   []InProcess
}

// StartInProcess starts the plugins that run inside enclaved. The set must be shut down.
func StartInProcess(cfg InProcessConfig) (*InProcessSet, error) {
	s := &InProcessSet{exporters: map[workload.OTLP]*otlp.Exporter{}}
	if err := s.start(cfg); err != nil {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Shutdown(ctx)
		return nil, err
	}
	return s, nil
}

func (s *InProcessSet) start(cfg InProcessConfig) error {
	source := telemetry.Resource(cfg.Manifest, rand.Text())
	for i := range cfg.Manifest.Plugins {
		m := &cfg.Manifest.Plugins[i]
		if m.Type != workload.PluginLogging && m.Type != workload.PluginTelemetry {
			continue
		}
		config, err := m.BuiltinConfig()
		if err != nil {
			return fmt.Errorf("plugin %s: %w", m.Name, err)
		}
		var p InProcess
		switch c := config.(type) {
		case *workload.LoggingStdout:
			redact, err := c.Expressions()
			if err != nil {
				return fmt.Errorf("plugin %s: %w", m.Name, err)
			}
			s.Logging = logging.New(logging.Config{Redact: redact})
			p = s.Logging
		case *workload.LoggingOTLP:
			redact, err := c.Expressions()
			if err != nil {
				return fmt.Errorf("plugin %s: %w", m.Name, err)
			}
			exporter, err := s.exporter(c.OTLP, cfg.Host)
			if err != nil {
				return fmt.Errorf("plugin %s: %w", m.Name, err)
			}
			s.Logging = logging.New(logging.Config{
				Redact: redact, Exporter: exporter, Silent: cfg.Manifest.Logs == workload.LogsOTLP, Resource: source,
			})
			p = s.Logging
		case *workload.TelemetryOTLP:
			exporter, err := s.exporter(c.OTLP, cfg.Host)
			if err != nil {
				return fmt.Errorf("plugin %s: %w", m.Name, err)
			}
			s.Telemetry = telemetry.New(telemetry.Config{Exporter: exporter, Resource: source, Usage: cfg.Usage, Listen: listenIntake})
			p = s.Telemetry
		}
		if err := p.Start(); err != nil {
			return fmt.Errorf("plugin %s: %w", m.Name, err)
		}
		s.started = append(s.started, p)
	}
	return nil
}

// exporter returns one exporter, with one connection, for each server.
func (s *InProcessSet) exporter(c workload.OTLP, host otlp.Host) (*otlp.Exporter, error) {
	e := s.exporters[c]
	if e == nil {
		var err error
		if e, err = otlp.NewExporter(c, host); err != nil {
			return nil, err
		}
		s.exporters[c] = e
	}
	return e, nil
}

func listenIntake() (net.Listener, error) {
	return net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(workload.TelemetryPort)))
}

// Observe is the gateway's hook: nil without a telemetry plugin.
func (s *InProcessSet) Observe() func(r *http.Request, port uint32) (end func(status int)) {
	if s.Telemetry == nil {
		return nil
	}
	return s.Telemetry.Observe
}

// Shutdown ends the plugins and sends what they hold, as long as ctx allows.
func (s *InProcessSet) Shutdown(ctx context.Context) {
	for _, p := range s.started {
		p.Shutdown()
	}
	for _, e := range s.exporters {
		e.Shutdown(ctx)
	}
}
