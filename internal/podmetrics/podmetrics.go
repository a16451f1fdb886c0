// Package podmetrics is what a sidecar says of its enclave on /metrics of port 14022, in Prometheus' text
// format: Handler writes it, Parse reads it. Nobody may trust it: the host can write what it likes.
//
//	cloister_enclave_phase{phase}            1 for the present phase, 0 for the others
//	cloister_enclave_generation              which enclave of this pod, from 1
//	cloister_enclave_attested                1 while an enclave lives that has shown the expected PCRs to initboot
//	cloister_enclave_step_failed             1 while the step under way has failed and is tried again
//	cloister_enclave_memory_used_bytes       memory in use
//	cloister_enclave_memory_total_bytes      memory that the enclave has
//	cloister_enclave_cpu_seconds_total       CPU time of everything in the enclave
//	cloister_enclave_requests_total          requests handed to the workload
//	cloister_enclave_requests_in_flight      those under way
//	cloister_enclave_nsm_calls_total         requests to the security module
//
// The last six are there while a workload runs. The counters begin anew with each generation.
package podmetrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podsock"
)

// Port is where sidecars serve Path.
const (
	Port = 14022
	Path = "/metrics"
)

// maxSize is the most that Parse reads, in bytes: a hundred times what Handler writes.
const maxSize = 256 << 10

// collectTimeout bounds the question to the enclave.
const collectTimeout = 2 * time.Second

// Snapshot is the state of one pod's enclave.
type Snapshot struct {
	Phase      podsock.EnclaveState_Phase // unspecified while initboot does not answer
	Generation uint64
	// Attested: there is an enclave, and the document that it gave to initboot shows the expected PCRs.
	Attested bool
	// StepFailed: what is under way has failed and is tried again.
	StepFailed bool
	// Stats are the enclave's counters, nil where there are none.
	Stats *channel.StatsResponse
}

// Of is what initboot says, with the enclave's counters.
func Of(s *podsock.EnclaveState, stats *channel.StatsResponse) Snapshot {
	return Snapshot{
		Phase:      s.GetPhase(),
		Generation: s.GetGeneration(),
		Attested:   s.GetPhase() >= podsock.EnclaveState_PHASE_BOOTED && s.GetPhase() < podsock.EnclaveState_PHASE_ENDED,
		StepFailed: s.GetPhase() < podsock.EnclaveState_PHASE_ENDED && s.GetProgress().GetError() != "",
		Stats:      stats,
	}
}

const (
	phaseName      = "cloister_enclave_phase"
	generationName = "cloister_enclave_generation"
	attestedName   = "cloister_enclave_attested"
	failedName     = "cloister_enclave_step_failed"
)

// phases are the values of the label phase.
var phases = func() map[string]podsock.EnclaveState_Phase {
	out := map[string]podsock.EnclaveState_Phase{}
	for n, name := range podsock.EnclaveState_Phase_name {
		if n != int32(podsock.EnclaveState_PHASE_UNSPECIFIED) {
			out[strings.ToLower(strings.TrimPrefix(name, "PHASE_"))] = podsock.EnclaveState_Phase(n)
		}
	}
	return out
}()

// counters are the fields of Stats.
var counters = []struct {
	name, help string
	kind       prometheus.ValueType
	get        func(*channel.StatsResponse) float64
	set        func(*channel.StatsResponse, float64)
}{
	{"cloister_enclave_memory_used_bytes", "Memory in use in the enclave.", prometheus.GaugeValue,
		func(s *channel.StatsResponse) float64 { return float64(s.GetMemoryUsed()) },
		func(s *channel.StatsResponse, v float64) { s.MemoryUsed = uint64(v) }},
	{"cloister_enclave_memory_total_bytes", "Memory that the enclave has.", prometheus.GaugeValue,
		func(s *channel.StatsResponse) float64 { return float64(s.GetMemoryTotal()) },
		func(s *channel.StatsResponse, v float64) { s.MemoryTotal = uint64(v) }},
	{"cloister_enclave_cpu_seconds_total", "CPU time of everything in the enclave.", prometheus.CounterValue,
		(*channel.StatsResponse).GetCpuSeconds,
		func(s *channel.StatsResponse, v float64) { s.CpuSeconds = v }},
	{"cloister_enclave_requests_total", "Requests handed to the workload.", prometheus.CounterValue,
		func(s *channel.StatsResponse) float64 { return float64(s.GetRequestsTotal()) },
		func(s *channel.StatsResponse, v float64) { s.RequestsTotal = uint64(v) }},
	{"cloister_enclave_requests_in_flight", "Requests of the workload that are under way.", prometheus.GaugeValue,
		func(s *channel.StatsResponse) float64 { return float64(s.GetInflight()) },
		func(s *channel.StatsResponse, v float64) { s.Inflight = uint64(v) }},
	{"cloister_enclave_nsm_calls_total", "Requests to the security module.", prometheus.CounterValue,
		func(s *channel.StatsResponse) float64 { return float64(s.GetNsmCallsTotal()) },
		func(s *channel.StatsResponse, v float64) { s.NsmCallsTotal = uint64(v) }},
}

// Handler serves what snapshot returns at that moment.
func Handler(snapshot func(context.Context) Snapshot) http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collector(snapshot))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}

type collector func(context.Context) Snapshot

// Describe describes nothing: what is there depends on the enclave.
func (collector) Describe(chan<- *prometheus.Desc) {}

func (c collector) Collect(out chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), collectTimeout)
	defer cancel()
	s := c(ctx)
	send := func(name, help string, kind prometheus.ValueType, value float64, labels prometheus.Labels) {
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, nil, labels), kind, value)
	}
	for name, phase := range phases {
		send(phaseName, "1 for the phase that the enclave is in.", prometheus.GaugeValue, number(phase == s.Phase), prometheus.Labels{"phase": name})
	}
	send(generationName, "Which enclave of this pod it is, from 1.", prometheus.GaugeValue, float64(s.Generation), nil)
	send(attestedName, "1 while an enclave lives that has shown the expected PCRs to initboot. No client trusts this.", prometheus.GaugeValue, number(s.Attested), nil)
	send(failedName, "1 while the step under way has failed and is tried again.", prometheus.GaugeValue, number(s.StepFailed), nil)
	if s.Stats == nil {
		return
	}
	for _, c := range counters {
		send(c.name, c.help, c.kind, c.get(s.Stats), nil)
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Parse reads what Handler has written. It refuses what lacks the state; the counters come all or not at
// all.
func Parse(r io.Reader) (Snapshot, error) {
	limited := &io.LimitedReader{R: r, N: maxSize + 1}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(limited)
	if limited.N == 0 {
		return Snapshot{}, fmt.Errorf("read metrics of the enclave: more than %d bytes", maxSize)
	}
	if err != nil {
		return Snapshot{}, fmt.Errorf("read metrics of the enclave: %w", err)
	}
	s, err := snapshot(families)
	if err != nil {
		return Snapshot{}, fmt.Errorf("read metrics of the enclave: %w", err)
	}
	return s, nil
}

func snapshot(families map[string]*dto.MetricFamily) (s Snapshot, err error) {
	if s.Phase, err = phase(families[phaseName]); err != nil {
		return Snapshot{}, err
	}
	values := map[string]float64{}
	for _, name := range []string{generationName, attestedName, failedName} {
		v, ok := value(families[name])
		if !ok {
			return Snapshot{}, fmt.Errorf("%s is missing or not a number", name)
		}
		values[name] = v
	}
	s.Generation, s.Attested, s.StepFailed = uint64(values[generationName]), values[attestedName] == 1, values[failedName] == 1
	stats := &channel.StatsResponse{}
	for _, c := range counters {
		v, ok := value(families[c.name])
		if !ok {
			return s, nil
		}
		c.set(stats, v)
	}
	s.Stats = stats
	return s, nil
}

// phase is the only one that is 1; unspecified when there is none.
func phase(f *dto.MetricFamily) (found podsock.EnclaveState_Phase, err error) {
	if f == nil {
		return 0, fmt.Errorf("%s is missing", phaseName)
	}
	for _, m := range f.GetMetric() {
		if numberOf(m) != 1 {
			continue
		}
		if found != podsock.EnclaveState_PHASE_UNSPECIFIED {
			return 0, errors.New("the enclave is in two phases at once")
		}
		for _, l := range m.GetLabel() {
			if l.GetName() == "phase" {
				found = phases[l.GetValue()]
			}
		}
		if found == podsock.EnclaveState_PHASE_UNSPECIFIED {
			return 0, fmt.Errorf("the enclave is in an unknown phase: known are %s", strings.Join(slices.Sorted(maps.Keys(phases)), ", "))
		}
	}
	return found, nil
}

// value is the only number of a family: finite, not negative and small enough for a uint64.
func value(f *dto.MetricFamily) (float64, bool) {
	if len(f.GetMetric()) != 1 {
		return 0, false
	}
	v := numberOf(f.GetMetric()[0])
	return v, v >= 0 && v < math.MaxInt64
}

func numberOf(m *dto.Metric) float64 {
	switch {
	case m.GetGauge() != nil:
		return m.GetGauge().GetValue()
	case m.GetCounter() != nil:
		return m.GetCounter().GetValue()
	}
	return m.GetUntyped().GetValue()
}
