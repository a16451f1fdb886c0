package enclavereceiver

import (
	"context"
	"sync"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/receiver"

	"cloister.dev/cloister/collector/enclavereceiver/internal/metadata"
)

// NewFactory returns the factory of the receiver.
func NewFactory() receiver.Factory {
	f := &factory{receivers: map[*Config]*enclaveReceiver{}}
	return receiver.NewFactory(metadata.Type, createDefaultConfig,
		receiver.WithTraces(f.traces, metadata.TracesStability),
		receiver.WithMetrics(f.metrics, metadata.MetricsStability),
		receiver.WithLogs(f.logs, metadata.LogsStability))
}

// factory makes one receiver for each configuration: the collector asks for each signal separately, but
// all of them come over one port.
type factory struct {
	mu        sync.Mutex
	receivers map[*Config]*enclaveReceiver
}

func (f *factory) traces(_ context.Context, set receiver.Settings, cfg component.Config, next consumer.Traces) (receiver.Traces, error) {
	return f.get(set, cfg, func(r *enclaveReceiver) { r.traces = next })
}

func (f *factory) metrics(_ context.Context, set receiver.Settings, cfg component.Config, next consumer.Metrics) (receiver.Metrics, error) {
	return f.get(set, cfg, func(r *enclaveReceiver) { r.metrics = next })
}

func (f *factory) logs(_ context.Context, set receiver.Settings, cfg component.Config, next consumer.Logs) (receiver.Logs, error) {
	return f.get(set, cfg, func(r *enclaveReceiver) { r.logs = next })
}

func (f *factory) get(set receiver.Settings, cfg component.Config, register func(*enclaveReceiver)) (*enclaveReceiver, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key := cfg.(*Config)
	r, ok := f.receivers[key]
	if !ok {
		var err error
		if r, err = newReceiver(key, set, func() { f.forget(key) }); err != nil {
			return nil, err
		}
		f.receivers[key] = r
	}
	register(r)
	return r, nil
}

// forget lets the next call of get make a new receiver.
func (f *factory) forget(key *Config) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.receivers, key)
}
