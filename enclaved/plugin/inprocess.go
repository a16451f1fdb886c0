package plugin

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"

	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"

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

	cfg       InProcessConfig
	source    *resource.Resource // what their telemetry comes from
	exporters map[workload.OTLP]*otlp.Exporter
	started   []InProcess
}

// StartInProcess starts the plugins that run inside enclaved. The set must be shut down.
func StartInProcess(cfg InProcessConfig) (*InProcessSet, error) {
	s := &InProcessSet{
		cfg: cfg, source: telemetry.Resource(cfg.Manifest, rand.Text()), exporters: map[workload.OTLP]*otlp.Exporter{},
	}
	if err := s.start(); err != nil {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Shutdown(ctx)
		return nil, err
	}
	return s, nil
}

func (s *InProcessSet) start() error {
	for _, b := range order {
		m := s.cfg.Manifest.Plugin(b.pluginType)
		if b.inProcess == nil || m == nil || m.Builtin != b.name {
			continue
		}
		p, err := b.inProcess(s, m)
		if err == nil {
			err = p.Start()
		}
		if err != nil {
			return fmt.Errorf("plugin %s: %w", m.Name, err)
		}
		s.started = append(s.started, p)
	}
	wanted := 0
	for _, m := range s.cfg.Manifest.Plugins {
		if m.Type != workload.PluginAuthentication {
			wanted++
		}
	}
	if len(s.started) != wanted {
		return fmt.Errorf("%d of %d logging and telemetry plugins are part of this program", len(s.started), wanted)
	}
	return nil
}

// exporter returns one exporter, with one connection, for each server.
func (s *InProcessSet) exporter(c workload.OTLP) (*otlp.Exporter, error) {
	e := s.exporters[c]
	if e == nil {
		var err error
		if e, err = otlp.NewExporter(c, s.cfg.Host); err != nil {
			return nil, err
		}
		s.exporters[c] = e
	}
	return e, nil
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
