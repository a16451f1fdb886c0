package console

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"google.golang.org/grpc/status"

	"cloister.dev/cloister/internal/channel"
)

// Defaults of a container's probe (k8s.io/api/core/v1, Probe).
const (
	defaultTimeout = time.Second
	defaultPeriod  = 10 * time.Second
	// least is the kubelet's least time-out and period. Everybody who reaches the pod can ask, and with less could
	// have the workload probed without end, while the kubelet's own probes wait for their turn.
	least = time.Second
)

// Handler answers the kubelet:
//
//	GET /probe/liveness?timeout=1s&period=10s&delay=5s
//	GET /probe/readiness?…
//
// The probe itself runs inside the enclave. Timeout is how long it may take, at most 5 minutes; an answer younger than half
// a period is used again; delay counts from the workload's start, not from the pod's. Until then the
// workload is alive, but not ready. The body of a failure is one sentence, never the workload's.
func (c *Console) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /probe/liveness", c.probe(channel.ProbeKind_PROBE_KIND_LIVENESS, http.StatusOK))
	mux.HandleFunc("GET /probe/readiness", c.probe(channel.ProbeKind_PROBE_KIND_READINESS, http.StatusServiceUnavailable))
	return mux
}

// probe answers early, the status, until the workload has run for the delay.
func (c *Console) probe(kind channel.ProbeKind, early int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		p := params{query: r.URL.Query()}
		timeout := p.duration("timeout", least, defaultTimeout)
		period := p.duration("period", least, defaultPeriod)
		delay := p.duration("delay", 0, 0)
		if p.err != nil {
			http.Error(w, p.err.Error(), http.StatusBadRequest)
			return
		}
		timeout = min(timeout, channel.MaxProbeTimeout)
		switch running, started := c.running(); {
		case !started:
			http.Error(w, "the workload has not been started", early)
			return
		case running < delay:
			http.Error(w, "the workload was started less than "+delay.String()+" ago", early)
			return
		}
		// The enclave keeps the time limit, and says so; the kubelet has its own.
		ctx, cancel := context.WithTimeout(r.Context(), timeout+time.Second)
		defer cancel()
		answer, err := c.Pod.Probe(ctx, &channel.ProbeRequest{
			Kind:      kind,
			TimeoutMs: uint32(timeout.Milliseconds()),
			MaxAgeMs:  uint32((period / 2).Milliseconds()),
		})
		switch {
		case err != nil:
			http.Error(w, "initboot did not run the probe: "+status.Convert(err).Message(), http.StatusServiceUnavailable)
		case !answer.GetOk():
			http.Error(w, answer.GetMessage(), http.StatusServiceUnavailable)
		}
	}
}

// params reads durations from a query and keeps the first error.
type params struct {
	query map[string][]string
	err   error
}

func (p *params) duration(name string, least, otherwise time.Duration) time.Duration {
	v := p.query[name]
	if len(v) == 0 {
		return otherwise
	}
	d, err := time.ParseDuration(v[0])
	if err == nil && (d < least || d > 24*time.Hour) {
		err = fmt.Errorf("%s is out of range", d)
	}
	if err != nil && p.err == nil {
		p.err = fmt.Errorf("read the query's %s: %w", name, err)
	}
	return d
}
