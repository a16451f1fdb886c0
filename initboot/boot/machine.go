package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

// Config is what a Machine needs.
type Config struct {
	// Invalid says why the rest cannot be used, or is nil. The boot then waits and says so, since a
	// native sidecar that exits while it starts can hang its pod.
	Invalid error

	// Manifest is the workload manifest in its RFC 8785 form, and Workload what it says.
	Manifest []byte
	Workload *workload.Manifest
	// Pod is what the enclave is told of its pod; nil when nothing needs it.
	Pod *channel.Pod

	// EIF is the path of the enclave image file.
	EIF string
	// Memory is the size of the enclave in bytes.
	Memory int64
	Driver driver.Driver
	// Console takes what the enclave's PID 1 prints.
	Console *os.File

	// Content serves the workload's image to the enclave.
	Content http.Handler
	// NSM returns the development NSM of a new enclave with these measurements, which serves one
	// connection. It is nil where there is none.
	NSM func(*eif.Measurements) (serve func(net.Conn))

	Log *slog.Logger
}

// Delays between boots that fail.
const (
	minDelay = time.Second
	maxDelay = 30 * time.Second
)

// exitStopped is the exit code of a workload that was told to stop before it was started: 128 and
// SIGTERM, as if it had been there.
const exitStopped = 128 + 15

// Machine is the state machine of a pod's enclave and the server of the pod socket.
type Machine struct {
	podsock.UnimplementedPodServer

	cfg    Config
	leases chan *lease   // from Serve to Run
	closed chan struct{} // Serve has ended

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every change of what follows
	state   state
	waiting int    // Runs that wait for an enclave
	stops   uint64 // counts Stops
	current *lease // the present run
}

// state is a podsock.EnclaveState with a point in time.
type state struct {
	generation uint64
	phase      podsock.EnclaveState_Phase
	target     string
	secret     []byte
	step       string
	lastError  string
	started    time.Time // of the workload; zero while it does not run
	ports      sidecarPorts
}

// sidecarPorts are the ports of the host on which the sidecar listens for the enclave.
type sidecarPorts struct{ egress, credentials uint32 }

func (s state) message() *podsock.EnclaveState {
	m := &podsock.EnclaveState{
		Generation: s.generation, Phase: s.phase, Target: s.target, Secret: s.secret,
		Progress:   &channel.Progress{Step: s.step, Error: s.lastError},
		EgressPort: s.ports.egress, CredentialsPort: s.ports.credentials,
	}
	if !s.started.IsZero() {
		m.RunningNs = uint64(time.Since(s.started))
	}
	return m
}

// lease is the right to use an enclave for the one run of its life.
type lease struct {
	enclave *enclave
	begun   chan struct{} // closed when the enclave has answered to Run
	done    chan struct{} // closed by Run when it needs the enclave no more
}

// New returns a machine that does nothing before Serve.
func New(cfg Config) *Machine {
	return &Machine{
		cfg:     cfg,
		leases:  make(chan *lease),
		closed:  make(chan struct{}),
		changed: make(chan struct{}),
		state:   state{phase: podsock.EnclaveState_PHASE_BOOTING},
	}
}

// Serve boots an enclave, lends it to one Run, and replaces it when another Run comes, until ctx ends.
// No enclave is left when it returns.
func (m *Machine) Serve(ctx context.Context) {
	defer close(m.closed)
	delay := minDelay
	for generation := uint64(1); ; generation++ {
		e := newEnclave(ctx, m.cfg, generation)
		used, err := m.serve(e)
		e.close()
		if ctx.Err() != nil {
			return
		}
		if used {
			delay = minDelay
			if m.waitForRun(ctx) != nil {
				return
			}
			continue
		}
		m.cfg.Log.Error("boot enclave", "generation", generation, "error", err, "retry", delay.String())
		m.update(func(s *state) {
			*s = state{generation: generation, phase: podsock.EnclaveState_PHASE_BOOTING, step: s.step, lastError: err.Error()}
		})
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
		delay = min(2*delay, maxDelay)
	}
}

// serve boots e and lends it to a Run. It returns when that has ended, or with why the enclave could not
// be used.
func (m *Machine) serve(e *enclave) (used bool, err error) {
	begin := time.Now()
	m.update(func(s *state) {
		lastError := s.lastError
		if s.phase == podsock.EnclaveState_PHASE_ENDED { // then it is about the run before
			lastError = ""
		}
		*s = state{generation: e.generation, phase: podsock.EnclaveState_PHASE_BOOTING, lastError: lastError}
	})
	if err := e.boot(func(step string) { m.update(func(s *state) { s.step = step }) }); err != nil {
		return false, err
	}
	m.cfg.Log.Info("enclave booted", "generation", e.generation, "duration", time.Since(begin).String())
	m.update(func(s *state) {
		*s = state{
			generation: e.generation, phase: podsock.EnclaveState_PHASE_BOOTED,
			target: e.driver.Target(), secret: e.secret, step: "wait for the sidecar",
		}
	})
	if err := m.waitForSidecar(e.ctx); err != nil {
		return false, err
	}
	m.update(func(s *state) { s.step = "wait for the console" })
	l := &lease{enclave: e, begun: make(chan struct{}), done: make(chan struct{})}
	select {
	case m.leases <- l:
		<-l.done
		return true, nil
	case <-e.ctx.Done():
		return false, context.Cause(e.ctx)
	}
}

// waitForSidecar returns when the sidecar has registered the ports that the workload needs.
func (m *Machine) waitForSidecar(ctx context.Context) error {
	if m.cfg.Workload == nil || len(m.cfg.Workload.Endpoints()) == 0 {
		return nil
	}
	for {
		m.mu.Lock()
		ports, changed := m.state.ports, m.changed
		m.mu.Unlock()
		if ports.egress != 0 && (m.cfg.Workload.KMS == nil || ports.credentials != 0) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Register implements podsock.PodServer. The enclave learns the ports once, so they cannot change.
func (m *Machine) Register(_ context.Context, r *podsock.RegisterRequest) (*podsock.RegisterResponse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.GetGeneration() != m.state.generation || m.state.target == "" {
		return nil, status.Errorf(codes.FailedPrecondition, "generation %d is not the one that has booted: watch the state and register again", r.GetGeneration())
	}
	for _, port := range []uint32{r.GetEgressPort(), r.GetCredentialsPort()} {
		if port != 0 && port < vsock.FirstHostPort {
			return nil, status.Errorf(codes.InvalidArgument, "port %d could be a containerPort: at least %d is needed", port, vsock.FirstHostPort)
		}
	}
	ports := sidecarPorts{r.GetEgressPort(), r.GetCredentialsPort()}
	if m.state.ports != (sidecarPorts{}) && m.state.ports != ports {
		return nil, status.Error(codes.FailedPrecondition, "other ports are registered for this enclave: listen on those")
	}
	m.state.ports = ports
	m.broadcast()
	return &podsock.RegisterResponse{}, nil
}

// waitForRun returns when some Run waits for an enclave.
func (m *Machine) waitForRun(ctx context.Context) error {
	for {
		m.mu.Lock()
		waiting, changed := m.waiting, m.changed
		m.mu.Unlock()
		if waiting > 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// broadcast tells everybody who waits for a change. The caller holds mu.
func (m *Machine) broadcast() {
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *Machine) update(f func(*state)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.state
	f(&m.state)
	if old.phase != m.state.phase {
		m.cfg.Log.Info("enclave state", "generation", m.state.generation, "phase", m.state.phase.String())
	}
	m.broadcast()
}

// updateRun is update for the run of generation: not after its end, nor after its enclave was replaced.
func (m *Machine) updateRun(generation uint64, f func(*state)) {
	m.update(func(s *state) {
		if s.generation == generation && s.phase != podsock.EnclaveState_PHASE_ENDED {
			f(s)
		}
	})
}

// end says that the run of generation is over: the enclave cannot be dialled any more.
func (m *Machine) end(generation uint64, lastError string) {
	m.updateRun(generation, func(s *state) {
		*s = state{generation: generation, phase: podsock.EnclaveState_PHASE_ENDED, step: "ended", lastError: lastError}
	})
}

// Watch implements podsock.PodServer.
func (m *Machine) Watch(_ *podsock.WatchRequest, stream podsock.Pod_WatchServer) error {
	for {
		m.mu.Lock()
		s, changed := m.state, m.changed
		m.mu.Unlock()
		if err := stream.Send(s.message()); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-m.closed:
			return errShutdown
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

var errShutdown = status.Error(codes.Unavailable, "initboot is shutting down")

// errStopped is returned by acquire when Stop was called.
var errStopped = errors.New("stopped")

// acquire waits for an enclave that no run has used yet.
func (m *Machine) acquire(ctx context.Context) (*lease, error) {
	m.mu.Lock()
	m.waiting++
	m.broadcast()
	stops := m.stops
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.waiting--
	}()
	for {
		m.mu.Lock()
		stopped, changed := m.stops != stops, m.changed
		m.mu.Unlock()
		if stopped {
			return nil, errStopped
		}
		select {
		case l := <-m.leases:
			m.mu.Lock()
			stopped := m.stops != stops
			if !stopped {
				m.current = l
			}
			m.mu.Unlock()
			if stopped {
				m.end(l.enclave.generation, "")
				close(l.done)
				return nil, errStopped
			}
			return l, nil
		case <-changed:
		case <-m.closed:
			return nil, errShutdown
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Run implements podsock.PodServer. The first event is sent when the enclave is asked to run the
// workload, not before: until then a Run that breaks may be tried again.
func (m *Machine) Run(r *podsock.RunRequest, stream podsock.Pod_RunServer) error {
	l, err := m.acquire(stream.Context())
	if errors.Is(err, errStopped) {
		return stream.Send(&channel.RunEvent{Event: &channel.RunEvent_Exited{Exited: &channel.Exited{
			Code: exitStopped, Message: "the pod was stopped before the workload was started",
		}}})
	}
	if err != nil {
		return err
	}
	e := l.enclave
	defer func() {
		m.end(e.generation, "the run was given up")
		m.mu.Lock()
		m.current = nil
		m.mu.Unlock()
		close(l.done)
	}()
	// Whatever this run is blocked in, the loss of the enclave shows at once.
	stop := context.AfterFunc(e.ctx, func() { m.end(e.generation, context.Cause(e.ctx).Error()) })
	defer stop()
	m.updateRun(e.generation, func(s *state) {
		s.phase, s.step = podsock.EnclaveState_PHASE_STARTING, "run the workload"
	})

	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(e.ctx, cancel)()
	if err := stream.Send(progress("run the workload")); err != nil {
		return err
	}
	m.mu.Lock()
	ports := m.state.ports
	m.mu.Unlock()
	events, err := e.client.Run(ctx, &channel.RunRequest{EgressPort: ports.egress, CredentialsPort: ports.credentials, Pod: m.cfg.Pod, Values: r.GetValues()})
	r.Values = nil // the enclave has them, and this call lasts as long as the workload
	for err == nil {
		var ev *channel.RunEvent
		if ev, err = events.Recv(); err != nil {
			break
		}
		if m.follow(l, ev) {
			m.cfg.Log.Info("workload ended", "generation", e.generation, "code", ev.GetExited().GetCode())
			return stream.Send(ev)
		}
		err = stream.Send(ev)
	}
	if stream.Context().Err() != nil {
		m.cfg.Log.Info("console is gone", "generation", e.generation)
		return stream.Context().Err()
	}
	if status.Code(err) == codes.Unavailable {
		// The control channel has broken, and why is about to be known.
		select {
		case <-e.ctx.Done():
		case <-time.After(2 * endTimeout):
		}
	}
	why := "the enclave ended the run without an exit code"
	switch {
	case e.ctx.Err() != nil:
		why = "the enclave was lost: " + context.Cause(e.ctx).Error()
	case !errors.Is(err, io.EOF):
		why = "the enclave ended the run: " + message(err)
	}
	m.cfg.Log.Error("run broke", "generation", e.generation, "error", why)
	m.end(e.generation, why)
	return status.Error(codes.Unavailable, why)
}

func progress(step string) *channel.RunEvent {
	return &channel.RunEvent{Event: &channel.RunEvent_Progress{Progress: &channel.Progress{Step: step}}}
}

// follow brings the state up to date with an event and reports whether it is the last one.
func (m *Machine) follow(l *lease, ev *channel.RunEvent) (last bool) {
	select {
	case <-l.begun:
	default:
		close(l.begun)
	}
	generation := l.enclave.generation
	switch ev := ev.Event.(type) {
	case *channel.RunEvent_Progress:
		if ev.Progress.GetError() != "" {
			m.cfg.Log.Error("run workload", "generation", generation, "step", ev.Progress.GetStep(), "error", ev.Progress.GetError())
		}
		m.updateRun(generation, func(s *state) { s.step, s.lastError = ev.Progress.GetStep(), ev.Progress.GetError() })
	case *channel.RunEvent_Started:
		m.updateRun(generation, func(s *state) {
			if s.phase == podsock.EnclaveState_PHASE_STARTING { // Stop may have been called
				s.phase = podsock.EnclaveState_PHASE_RUNNING
			}
			s.started, s.step, s.lastError = time.Now(), "run the workload", ""
		})
	case *channel.RunEvent_Exited:
		m.end(generation, ev.Exited.GetMessage())
		return true
	}
	return false
}

// Update implements podsock.PodServer.
func (m *Machine) Update(ctx context.Context, r *podsock.UpdateRequest) (*channel.UpdateResponse, error) {
	m.mu.Lock()
	l := m.current
	m.mu.Unlock()
	if l == nil {
		return nil, status.Error(codes.Unavailable, "no workload runs")
	}
	if problem := r.GetProblem(); problem != "" {
		m.cfg.Log.Error("changed files of the host cannot be read", "generation", l.enclave.generation, "error", problem)
		return &channel.UpdateResponse{}, nil
	}
	out, err := l.enclave.client.Update(ctx, &channel.UpdateRequest{Mount: r.GetMount()})
	if c := status.Code(err); c == codes.InvalidArgument || c == codes.ResourceExhausted {
		m.cfg.Log.Error("the enclave refuses changed files of the host", "generation", l.enclave.generation, "error", message(err))
	}
	return out, err
}

// Probe implements podsock.PodServer. A kind of which the manifest has no probe succeeds while the
// workload runs.
func (m *Machine) Probe(ctx context.Context, r *channel.ProbeRequest) (*podsock.ProbeResponse, error) {
	m.mu.Lock()
	l, s := m.current, m.state
	m.mu.Unlock()
	if l == nil || s.started.IsZero() {
		text := "the workload has not been started: " + s.step
		if s.lastError != "" {
			text += ": " + s.lastError
		}
		return &podsock.ProbeResponse{Message: text}, nil
	}
	out := &podsock.ProbeResponse{Started: true, RunningMs: uint64(time.Since(s.started).Milliseconds())}
	if !hasProbe(m.cfg.Workload, r.GetKind()) {
		out.Ok = true
		return out, nil
	}
	// The enclave keeps the time limit; a second more tells its answer from none.
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.GetTimeoutMs())*time.Millisecond+time.Second)
	defer cancel()
	answer, err := l.enclave.client.Probe(ctx, r)
	if err != nil {
		out.Message = "the enclave did not run the probe: " + message(err)
		return out, nil
	}
	out.Ok, out.Message = answer.GetOk(), answer.GetMessage()
	return out, nil
}

func hasProbe(w *workload.Manifest, kind channel.ProbeKind) bool {
	if w == nil || w.Probes == nil {
		return false
	}
	switch kind {
	case channel.ProbeKind_PROBE_KIND_STARTUP:
		return w.Probes.Startup != nil
	case channel.ProbeKind_PROBE_KIND_LIVENESS:
		return w.Probes.Liveness != nil
	case channel.ProbeKind_PROBE_KIND_READINESS:
		return w.Probes.Readiness != nil
	}
	return false
}

// Stats implements podsock.PodServer.
func (m *Machine) Stats(ctx context.Context, r *channel.StatsRequest) (*channel.StatsResponse, error) {
	m.mu.Lock()
	l := m.current
	m.mu.Unlock()
	if l == nil {
		return nil, status.Error(codes.Unavailable, "no workload runs")
	}
	return l.enclave.client.Stats(ctx, r)
}

// Stop implements podsock.PodServer: it ends the present run and those that wait. A workload without
// ports has no clients to drain, so it gets that time as grace.
func (m *Machine) Stop(ctx context.Context, r *channel.StopRequest) (*channel.StopResponse, error) {
	m.mu.Lock()
	m.stops++
	l := m.current
	m.broadcast()
	m.mu.Unlock()
	if l == nil {
		return &channel.StopResponse{}, nil
	}
	r = proto.CloneOf(r)
	if m.cfg.Workload != nil && len(m.cfg.Workload.Ports) == 0 {
		r.GraceMs += r.DrainMs
		r.DrainMs = 0
	}
	m.updateRun(l.enclave.generation, func(s *state) { s.phase, s.step = podsock.EnclaveState_PHASE_DRAINING, "stop the workload" })
	select {
	case <-l.begun: // the enclave knows of the run that it must stop
	case <-l.done:
		return &channel.StopResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if _, err := l.enclave.client.Stop(ctx, r); err != nil && l.enclave.ctx.Err() == nil {
		return nil, fmt.Errorf("stop workload: %w", err)
	}
	select {
	case <-l.done:
		return &channel.StopResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// message is what a gRPC error says, without its code.
func message(err error) string { return status.Convert(err).Message() }
