package supervise

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

const (
	// userAgent is as the kubelet's, which servers know by its beginning.
	userAgent = "kube-probe/cloister"
	// maxRedirects and maxBody are the kubelet's (k8s.io/kubernetes, pkg/probe/http).
	maxRedirects = 10
	maxBody      = 10 << 10 // bytes
)

// probe is one probe of the manifest with its last answer.
type probe struct {
	spec  *workload.Probe
	turn  chan struct{} // holds one token: who has it may run the probe and touch what follows
	last  *channel.ProbeResponse
	at    time.Time
	limit time.Duration // how long last could take
}

func newProbe(p *workload.Probe) *probe {
	n := &probe{spec: p, turn: make(chan struct{}, 1)}
	n.turn <- struct{}{}
	return n
}

func probesOf(m *workload.Manifest) map[channel.ProbeKind]*workload.Probe {
	probes := map[channel.ProbeKind]*workload.Probe{}
	if m.Probes == nil {
		return probes
	}
	for kind, p := range map[channel.ProbeKind]*workload.Probe{
		channel.ProbeKind_PROBE_KIND_STARTUP:   m.Probes.Startup,
		channel.ProbeKind_PROBE_KIND_LIVENESS:  m.Probes.Liveness,
		channel.ProbeKind_PROBE_KIND_READINESS: m.Probes.Readiness,
	} {
		if p != nil {
			probes[kind] = p
		}
	}
	return probes
}

// Probe implements channel.EnclaveServer.
func (e *Enclave) Probe(ctx context.Context, r *channel.ProbeRequest) (*channel.ProbeResponse, error) {
	e.mu.Lock()
	p, w := e.probes[r.GetKind()], e.process
	e.mu.Unlock()
	if p == nil {
		return nil, status.Errorf(codes.InvalidArgument, "the manifest has no probe of the kind %s", r.GetKind())
	}
	if w == nil {
		return &channel.ProbeResponse{Message: "the workload has not been started"}, nil
	}
	select {
	case <-e.ended:
		return &channel.ProbeResponse{Message: "the workload has ended"}, nil
	default:
	}
	select {
	case <-p.turn:
		defer func() { p.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	// Everybody who reaches the pod can ask. A failure within less time than this request allows may be
	// theirs: it must not fail the kubelet's probe.
	fits := p.last != nil && (p.last.GetOk() || timeout <= p.limit)
	if fits && time.Since(p.at) < time.Duration(r.GetMaxAgeMs())*time.Millisecond {
		return p.last, nil
	}
	run, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %s", timeout))
	defer cancel()
	err := p.run(run, w)
	if ctx.Err() != nil {
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	answer := &channel.ProbeResponse{Ok: err == nil}
	if err != nil {
		answer.Message = err.Error()
	}
	p.last, p.at, p.limit = answer, time.Now(), timeout
	return answer, nil
}

// run returns why the probe failed, without a word of the workload's own.
func (p *probe) run(ctx context.Context, w *process.Process) error {
	if p.spec.Exec != nil {
		return runExec(ctx, p.spec.Exec, w)
	}
	return runHTTP(ctx, p.spec.HTTP)
}

func runExec(ctx context.Context, p *workload.ExecProbe, w *process.Process) error {
	code, err := w.Exec(ctx, w.ProbeArgs(p.Command))
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("exec probe: %w", context.Cause(ctx))
	case err != nil:
		return fmt.Errorf("exec probe: %w", err)
	case code != 0:
		return fmt.Errorf("exec probe: the command ended with status %d", code)
	}
	return nil
}

// runHTTP does what the kubelet does (k8s.io/kubernetes, pkg/probe/http), inside.
func runHTTP(ctx context.Context, p *workload.HTTPProbe) error {
	host := net.JoinHostPort("127.0.0.1", strconv.FormatUint(uint64(p.Port), 10))
	scheme := "http"
	if p.Scheme == "HTTPS" {
		scheme = "https"
	}
	u, err := url.Parse(p.Path)
	if err != nil { // as the kubelet: a path that is no URL is just a path
		u = &url.URL{Path: p.Path}
	}
	u.Scheme, u.Host = scheme, host
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return fmt.Errorf("http probe: %w", err)
	}
	for _, h := range p.Headers {
		req.Header.Add(h.Name, h.Value)
		if http.CanonicalHeaderKey(h.Name) == "Host" {
			req.Host = h.Value
		}
	}
	req.Header.Del("Host")
	setDefault(req.Header, "User-Agent", userAgent)
	setDefault(req.Header, "Accept", "*/*")

	client := &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:    &tls.Config{InsecureSkipVerify: true}, // it goes to 127.0.0.1 only
			DisableKeepAlives:  true,
			DisableCompression: true,
		},
		CheckRedirect: func(next *http.Request, via []*http.Request) error {
			if next.URL.Hostname() != via[0].URL.Hostname() {
				return http.ErrUseLastResponse // another host is not asked; the redirect is an answer
			}
			if len(via) >= maxRedirects {
				return errTooManyRedirects
			}
			return nil
		},
	}
	res, err := client.Do(req)
	if err != nil {
		return httpError(ctx, err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(res.Body, maxBody)); err != nil {
		return httpError(ctx, err)
	}
	if res.StatusCode < http.StatusOK || res.StatusCode >= http.StatusBadRequest {
		return fmt.Errorf("http probe: status %d", res.StatusCode)
	}
	return nil
}

var errTooManyRedirects = fmt.Errorf("stopped after %d redirects", maxRedirects)

// httpError says why there is no whole answer. The host reads it, and errors of net/http may quote what
// the workload sent, so only those pass that cannot.
func httpError(ctx context.Context, err error) error {
	var dial *net.OpError
	switch {
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.Is(err, errTooManyRedirects):
		err = errTooManyRedirects
	case errors.As(err, &dial) && dial.Op == "dial":
		err = dial
	default:
		err = errors.New("the workload gave no valid answer")
	}
	return fmt.Errorf("http probe: %w", err)
}

// setDefault sets a header that is missing, and takes away one that was set to nothing.
func setDefault(h http.Header, name, value string) {
	switch v, ok := h[name]; {
	case !ok:
		h.Set(name, value)
	case len(v) == 1 && v[0] == "":
		if name == "User-Agent" {
			return // an empty one is not sent (net/http, Request.Write)
		}
		h.Del(name)
	}
}
