// Package podmetrics is what a sidecar says of its enclave on /metrics of its port, in Prometheus' text
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
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podsock"
)

// Path is where sidecars serve it, on podenv.SidecarPort.
const Path = "/metrics"

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
// all. It takes lines as Handler writes them, and no more of the format: expfmt.TextParser of
// prometheus/common v0.70.0 panics on some input, and every pod can send some.
func Parse(r io.Reader) (Snapshot, error) {
	limited := &io.LimitedReader{R: r, N: maxSize + 1}
	samples := map[string]float64{}
	for lines := bufio.NewScanner(limited); ; {
		if !lines.Scan() {
			if err := lines.Err(); err != nil {
				return Snapshot{}, fmt.Errorf("read metrics of the enclave: %w", err)
			}
			break
		}
		series, text, ok := strings.Cut(lines.Text(), " ")
		if !ok || !strings.HasPrefix(series, "cloister_enclave_") { // another metric, or a comment
			continue
		}
		v, err := strconv.ParseFloat(text, 64)
		if err != nil || !(v >= 0 && v < math.MaxInt64) {
			return Snapshot{}, fmt.Errorf("read metrics of the enclave: %q is not a count", series)
		}
		if _, twice := samples[series]; twice {
			return Snapshot{}, fmt.Errorf("read metrics of the enclave: %q is there twice", series)
		}
		samples[series] = v
	}
	if limited.N == 0 {
		return Snapshot{}, fmt.Errorf("read metrics of the enclave: more than %d bytes", maxSize)
	}
	s, err := snapshot(samples)
	if err != nil {
		return Snapshot{}, fmt.Errorf("read metrics of the enclave: %w", err)
	}
	return s, nil
}

func snapshot(samples map[string]float64) (s Snapshot, err error) {
	for _, name := range []string{generationName, attestedName, failedName} {
		if _, ok := samples[name]; !ok {
			return s, fmt.Errorf("%s is missing", name)
		}
	}
	s.Generation, s.Attested, s.StepFailed = uint64(samples[generationName]), samples[attestedName] == 1, samples[failedName] == 1
	for name, phase := range phases {
		v, ok := samples[phaseName+`{phase="`+name+`"}`]
		switch {
		case !ok:
			return Snapshot{}, fmt.Errorf("%s lacks the phase %s", phaseName, name)
		case v == 1 && s.Phase != podsock.EnclaveState_PHASE_UNSPECIFIED:
			return Snapshot{}, errors.New("the enclave is in two phases at once")
		case v == 1:
			s.Phase = phase
		}
	}
	stats := &channel.StatsResponse{}
	for _, c := range counters {
		v, ok := samples[c.name]
		if !ok {
			return s, nil
		}
		c.set(stats, v)
	}
	s.Stats = stats
	return s, nil
}
