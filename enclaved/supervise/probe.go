package supervise

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

const (
	// maxRedirects and maxBody are the kubelet's (k8s.io/kubernetes, pkg/probe/http).
	maxRedirects = 10
	maxBody      = 10 << 10 // bytes
)

// probe is one probe of the manifest with its last answer.
type probe struct {
	spec *workload.Probe
	// turns hold one token each: who has it may run the probe. Which one it is depends on the time limit, so that
	// nobody waits for a run that may take more than twice as long as their own. Everybody who reaches the pod can
	// ask, with any limit, and a run that hangs must not hold up the kubelet's.
	turns [classes]chan struct{}

	mu    sync.Mutex
	last  *channel.ProbeResponse
	at    time.Time     // from when on it holds
	limit time.Duration // how long last could take
}

// classes is one more than the bits of the longest time limit in seconds.
const classes = 10

func newProbe(p *workload.Probe) *probe {
	n := &probe{spec: p}
	for i := range n.turns {
		n.turns[i] = make(chan struct{}, 1)
		n.turns[i] <- struct{}{}
	}
	return n
}

// turn is the one for a time limit of at most channel.MaxProbeTimeout.
func (p *probe) turn(timeout time.Duration) chan struct{} {
	return p.turns[bits.Len(uint(timeout/time.Second))]
}

// kept returns the last answer if it is one to a request with this time limit, and young enough.
func (p *probe) kept(timeout, age time.Duration) *channel.ProbeResponse {
	p.mu.Lock()
	defer p.mu.Unlock()
	// A failure within less time than this request allows may be a stranger's: it must not fail the kubelet's
	// probe.
	if p.last == nil || !p.last.GetOk() && timeout > p.limit || time.Since(p.at) >= age {
		return nil
	}
	return p.last
}

// keep remembers an answer. A failure says nothing of the time since the run began.
func (p *probe) keep(answer *channel.ProbeResponse, began time.Time, limit time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last, p.at, p.limit = answer, began, limit
	if answer.GetOk() {
		p.at = time.Now()
	}
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
	if e.hasEnded() {
		return &channel.ProbeResponse{Message: "the workload has ended"}, nil
	}
	timeout := min(time.Duration(r.GetTimeoutMs())*time.Millisecond, channel.MaxProbeTimeout)
	turn := p.turn(timeout)
	select {
	case <-turn:
		defer func() { turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if last := p.kept(timeout, time.Duration(r.GetMaxAgeMs())*time.Millisecond); last != nil {
		return last, nil
	}
	began := time.Now()
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
	p.keep(answer, began, timeout)
	return answer, nil
}

// run returns why the probe failed, without a word of the workload's own.
func (p *probe) run(ctx context.Context, w *process.Process) error {
	switch s := p.spec; {
	case s.HTTP != nil:
		return named("http probe", runHTTP(ctx, s.HTTP, "kube-probe", true))
	case s.TCP != nil:
		return named("tcp probe", runTCP(ctx, s.TCP))
	case s.GRPC != nil:
		return named("grpc probe", runGRPC(ctx, s.GRPC))
	default:
		return named("exec probe", runExec(ctx, w.ProbeArgs(s.Exec.Command), w))
	}
}

func named(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

func runExec(ctx context.Context, args []string, w *process.Process) error {
	code, err := w.Exec(ctx, args)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	case code != 0:
		return fmt.Errorf("the command ended with status %d", code)
	}
	return nil
}

// runTCP makes a connection and ends it, as the kubelet does (k8s.io/kubernetes, pkg/probe/tcp).
func runTCP(ctx context.Context, p *workload.TCP) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address(p.Port))
	if err != nil {
		return cause(ctx, err)
	}
	conn.Close()
	return nil
}

// runGRPC asks the health service, as the kubelet does (k8s.io/kubernetes, pkg/probe/grpc).
func runGRPC(ctx context.Context, p *workload.GRPC) error {
	stream, err := new(net.Dialer).DialContext(ctx, "tcp", address(p.Port))
	if err != nil {
		return cause(ctx, err)
	}
	defer stream.Close()
	once := make(chan net.Conn, 1)
	once <- stream
	conn, err := grpc.NewClient("passthrough:///"+address(p.Port),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUserAgent("kube-probe/cloister"),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the server has ended the connection")
			}
		}))
	if err != nil {
		return err
	}
	defer conn.Close()
	res, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: p.Service})
	switch code := status.Code(err); {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case code == codes.Unimplemented:
		return errors.New("the server has no health service (grpc.health.v1.Health)")
	case err != nil: // its message is the workload's
		return fmt.Errorf("the health service answers with status %s", code)
	case res.GetStatus() != healthpb.HealthCheckResponse_SERVING:
		return fmt.Errorf("the health service says %s", servingStatus(res.GetStatus()))
	}
	return nil
}

// servingStatus is a status of the health protocol; a number that it does not know is the workload's own.
func servingStatus(s healthpb.HealthCheckResponse_ServingStatus) string {
	if _, ok := healthpb.HealthCheckResponse_ServingStatus_name[int32(s)]; !ok {
		return "something else than SERVING"
	}
	return s.String()
}

// address is that of a port of the workload.
func address(port uint32) string {
	return net.JoinHostPort("127.0.0.1", strconv.FormatUint(uint64(port), 10))
}

// cause prefers the reason why ctx has ended.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// runHTTP does what the kubelet does (k8s.io/kubernetes, pkg/probe/http and pkg/kubelet/lifecycle), inside.
// Agent is the name by which servers know the kubelet. With judge only 200 to 399 is success, else any
// answer.
func runHTTP(ctx context.Context, p *workload.HTTPGet, agent string, judge bool) error {
	scheme := "http"
	if p.Scheme == "HTTPS" {
		scheme = "https"
	}
	u, err := url.Parse(p.Path)
	if err != nil { // as the kubelet: a path that is no URL is just a path
		u = &url.URL{Path: p.Path}
	}
	u.Scheme, u.Host = scheme, address(p.Port)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	for _, h := range p.Headers {
		req.Header.Add(h.Name, h.Value)
	}
	req.Host = req.Header.Get("Host")
	req.Header.Del("Host")
	setDefault(req.Header, "User-Agent", agent+"/cloister")
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
	if judge && (res.StatusCode < http.StatusOK || res.StatusCode >= http.StatusBadRequest) {
		return fmt.Errorf("status %d", res.StatusCode)
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
		return context.Cause(ctx)
	case errors.Is(err, errTooManyRedirects):
		return errTooManyRedirects
	case errors.As(err, &dial) && dial.Op == "dial":
		return dial
	default:
		return errors.New("the workload gave no valid answer")
	}
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
