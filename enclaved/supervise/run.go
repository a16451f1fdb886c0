package supervise

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/enclaved/gateway"
	"cloister.dev/cloister/enclaved/host"
	"cloister.dev/cloister/enclaved/plugins/logging"
	"cloister.dev/cloister/enclaved/relay"
	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
)

const (
	// statusStopped is the exit status of a workload that was told to stop before it was started: that
	// of one that SIGTERM has ended.
	statusStopped = 128 + 15

	// chunk is the size of one piece of output in bytes.
	chunk = 32 << 10

	// lastAnswers is how long the gateway may take to hand out what the workload answered at its end.
	lastAnswers = 2 * time.Second
	// lastTelemetry is how long sending what the plugins still hold may take.
	lastTelemetry = 3 * time.Second
)

var errStopped = errors.New("the workload was stopped before it had been started")

// Run implements channel.EnclaveServer.
func (e *Enclave) Run(r *channel.RunRequest, stream channel.Enclave_RunServer) error {
	e.mu.Lock()
	configured, running := e.manifest != nil, e.running
	e.running = e.running || configured
	e.mu.Unlock()
	if !configured {
		return status.Error(codes.FailedPrecondition, "the enclave has not been configured")
	}
	if running {
		return status.Error(codes.FailedPrecondition, "the enclave has run its workload already")
	}
	endpoints := e.manifest.Endpoints()
	if len(endpoints) > 0 && r.GetEgressPort() == 0 {
		return status.Error(codes.InvalidArgument, "the manifest has egress, and the sidecar's port for it is missing")
	}
	if e.manifest.KMS != nil && r.GetCredentialsPort() == 0 {
		return status.Error(codes.InvalidArgument, "the manifest has kms, and the sidecar's port for credentials is missing")
	}
	e.credentialsPort = r.GetCredentialsPort()
	e.relay = relay.New(e.secret, e.cfg.Guest, r.GetEgressPort(), endpoints)
	e.pod, e.values, r.Values = r.GetPod(), r.GetValues(), nil
	exited := e.run(stream.Context(), &events{stream: stream})
	slog.Info("the workload has ended", "code", exited.GetCode(), "message", exited.GetMessage())
	return stream.Send(&channel.RunEvent{Event: &channel.RunEvent_Exited{Exited: exited}})
}

// events sends the events of a run, from several goroutines.
type events struct {
	mu     sync.Mutex
	stream channel.Enclave_RunServer
}

func (s *events) send(e *channel.RunEvent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream.Send(e)
}

// progress tells a step. A stream that has ended ends the run's context, so its error says nothing new.
func (s *events) progress(step, failure string) {
	if failure == "" {
		slog.Info("run", "step", step)
	} else {
		slog.Warn("run", "step", step, "error", failure)
	}
	s.send(&channel.RunEvent{Event: &channel.RunEvent_Progress{Progress: &channel.Progress{Step: step, Error: failure}}})
}

func failed(err error) *channel.Exited {
	if start, ok := errors.AsType[*process.StartError](err); ok {
		return &channel.Exited{Code: int32(start.Status), Message: start.Message}
	}
	if errors.Is(err, errStopped) {
		return &channel.Exited{Code: statusStopped, Message: err.Error()}
	}
	return &channel.Exited{Code: process.StatusFailed, Message: err.Error()}
}

// run is the life of the workload, from fetching its image to its exit.
func (e *Enclave) run(ctx context.Context, out *events) *channel.Exited {
	defer func() {
		if e.outlets != nil {
			e.outlets.Close()
		}
	}()
	// Last of all, since the others' ends are told too, but before the exit: then the pod ends.
	defer func() {
		if e.inProcess == nil {
			return
		}
		flush, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTelemetry)
		defer cancel()
		e.inProcess.Shutdown(flush)
	}()
	// After the gateway, which asks them.
	defer func() {
		if e.plugins != nil {
			e.plugins.Close()
		}
	}()
	p, pipes, err := e.start(ctx, out)
	if err != nil {
		close(e.ended)
		return failed(err)
	}
	// A run that nobody follows any more has no reason to go on.
	stop := context.AfterFunc(ctx, func() { e.kill(p, "initboot has left the run") })
	e.hooks.Go(func() { e.afterStart(p, out) })
	code, err := p.Wait()
	stop()
	e.mu.Lock()
	close(e.ended)
	e.mu.Unlock()
	e.hooks.Wait()
	p.Close()
	pipes.Wait() // nothing is left that could write: what remains is in the pipes
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastAnswers)
	defer cancel()
	if err := e.gateway.Close(last); err != nil {
		slog.Warn("the workload has ended with clients connected", "error", err)
	}
	if err != nil {
		return failed(err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return &channel.Exited{Code: int32(code), Message: e.killed, TerminationMessage: e.terminationMessage()}
}

// start gets the image and starts workload and gateway.
func (e *Enclave) start(ctx context.Context, out *events) (*process.Process, *sync.WaitGroup, error) {
	supplied, err := host.Check(e.manifest, e.values)
	if err != nil {
		return nil, nil, err
	}
	out.progress("preparing the image", "")
	root, scratch := filepath.Join(e.cfg.Dir, "root"), filepath.Join(e.cfg.Dir, "layers")
	for _, dir := range []string{root, scratch} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, nil, err
		}
	}
	fetch, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(e.stopping, func() { cancel(errStopped) })()
	f, limit := e.fetcher(out.progress)
	config, err := f.Image(fetch, e.manifest.Image, root, scratch, limit)
	f.Close()
	if err != nil {
		return nil, nil, err
	}
	secrets, err := e.openSecrets(fetch, out.progress)
	if err != nil {
		return nil, nil, err
	}
	defer erase(secrets) // the workload has its own copies then, or there will be none
	if e.plugins, err = e.startPlugins(fetch, out.progress); err != nil {
		return nil, nil, err
	}
	if err := e.dropLayout(); err != nil {
		return nil, nil, err
	}
	if e.inProcess, err = e.startInProcess(); err != nil {
		return nil, nil, err
	}
	out.progress("starting the workload", "")
	spec, err := process.NewSpec(e.manifest, config, root, e.cfg.Memory, supplied)
	if err != nil {
		return nil, nil, err
	}
	files, err := e.deliverFiles(spec)
	if err != nil {
		return nil, nil, err
	}
	if err := e.deliver(secrets, spec); err != nil {
		return nil, nil, err
	}
	if err := e.takeTerminationMessage(spec); err != nil {
		return nil, nil, err
	}
	hosts, err := relay.Hosts(e.manifest.Egress)
	if err != nil {
		return nil, nil, err
	}
	spec.Hosts = append(relay.Lines(hosts), e.manifest.HostLines()...)
	if e.outlets, err = e.relay.Listen(hosts); err != nil {
		return nil, nil, err
	}
	served := gateway.Config{Manifest: e.manifest, Listen: e.listen, Vault: e.vault, Observe: e.inProcess.Observe()}
	if e.plugins != nil {
		served.Authorize, served.Reserved = e.plugins.Authorize, e.plugins.Headers()
	}
	g, err := gateway.New(served)
	if err != nil {
		return nil, nil, err
	}

	// A Stop waits here until there is something to stop, or finds that nothing will be started.
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stopping.Err() != nil {
		return nil, nil, errStopped
	}
	p, pipes, err := e.startProcess(spec, out)
	if err != nil {
		return nil, nil, err
	}
	if err := g.Start(); err != nil {
		p.Kill()
		p.Wait()
		p.Close()
		pipes.Wait()
		return nil, nil, err
	}
	e.process, e.gateway, e.events, e.files = p, g, out, files
	return p, pipes, nil
}

// dialContent connects to the host's content server.
func (e *Enclave) dialContent(ctx context.Context) (net.Conn, error) {
	return e.secret.Dial(ctx, e.ports.GetContent(), e.cfg.Guest.Dial)
}

// listen accepts from this enclave's own sidecar on the vsock port that is called as the workload's.
func (e *Enclave) listen(port uint32) (net.Listener, error) {
	l, err := e.cfg.Guest.Listen(port)
	if err != nil {
		return nil, err
	}
	return e.secret.Listen(l, port), nil
}

// startProcess starts the workload and forwards what it writes. The group is done when everything that
// was written has been sent.
func (e *Enclave) startProcess(spec *process.Spec, out *events) (*process.Process, *sync.WaitGroup, error) {
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		outR.Close()
		outW.Close()
		return nil, nil, err
	}
	p, err := process.Start(e.cfg.Self, e.cfg.Children, spec, outW, errW)
	outW.Close()
	errW.Close()
	if err != nil {
		outR.Close()
		errR.Close()
		return nil, nil, err
	}
	var pipes sync.WaitGroup
	pipes.Go(func() { out.forward(outR, channel.Output_STREAM_STDOUT, e.inProcess.Logging) })
	pipes.Go(func() { out.forward(errR, channel.Output_STREAM_STDERR, e.inProcess.Logging) })
	return p, &pipes, nil
}

// forward sends what comes from r, through the logging plugin where there is one. A slow reader at the
// other end slows the workload down; when there is none any more, the output goes nowhere but to the
// plugin, so that the workload can end.
func (s *events) forward(r *os.File, stream channel.Output_Stream, log *logging.Plugin) {
	defer r.Close()
	w := io.WriteCloser(&output{events: s, stream: stream})
	if log != nil {
		name := logging.Stdout
		if stream == channel.Output_STREAM_STDERR {
			name = logging.Stderr
		}
		w = log.Lines(name, w)
	}
	defer w.Close()
	b := make([]byte, chunk)
	for {
		n, err := r.Read(b)
		w.Write(b[:n])
		if err != nil {
			return
		}
	}
}

// output is one stream of the workload on the console.
type output struct {
	events *events
	stream channel.Output_Stream
	gone   bool // nobody reads any more
}

// Write sends b. gRPC has encoded the bytes when it returns.
func (o *output) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0 && !o.gone; {
		n := min(len(rest), chunk)
		out := &channel.Output{Stream: o.stream, Data: rest[:n]}
		o.gone = o.events.send(&channel.RunEvent{Event: &channel.RunEvent_Output{Output: out}}) != nil
		rest = rest[n:]
	}
	return len(b), nil
}

func (o *output) Close() error { return nil }
