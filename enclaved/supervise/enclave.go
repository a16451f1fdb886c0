package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/enclaved/gateway"
	"cloister.dev/cloister/enclaved/host"
	"cloister.dev/cloister/enclaved/plugin"
	"cloister.dev/cloister/enclaved/relay"
	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/enclaved/usage"
	"cloister.dev/cloister/enclaved/vault"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

// Config is what an Enclave works with.
type Config struct {
	Guest    vsock.Guest
	Children *process.Children
	// Self is the path of this program, Dir an empty directory for the image, Memory what may lie in
	// it, in bytes.
	Self   string
	Dir    string
	Memory int64
	// Sealed is what a sealed EIF holds; nil where manifest and images come from the host.
	Sealed *Sealed
	// OpenModule opens the security module; dial reaches the host's development module, where there is
	// one.
	OpenModule func(dial func(context.Context) (net.Conn, error)) (nsm.Provider, error)
}

// Enclave is the service at the enclave's end of the control channel.
type Enclave struct {
	channel.UnimplementedEnclaveServer
	cfg   Config
	usage *usage.Meter

	configuring sync.Mutex // one Configure at a time

	mu       sync.Mutex
	manifest *workload.Manifest // set by Configure, as the three below
	secret   vsock.Secret
	ports    *channel.HostPorts
	vault    *vault.Vault
	running  bool         // Run was called
	relay    *relay.Relay // set by Run, as the five below
	outlets  *relay.Listeners
	plugins  *plugin.Set
	pod      *channel.Pod
	values   *channel.HostValues // until the workload has them
	// credentialsPort is the host's.
	credentialsPort uint32
	// inProcess is set before the workload is started.
	inProcess *plugin.InProcessSet
	process   *process.Process
	files     *host.Files // set with the process
	gateway   *gateway.Gateway
	killed    string // why the workload did not end by itself, one sentence
	events    *events
	hooks     sync.WaitGroup // hooks under way; none is added when the workload has ended

	stopping context.Context // ends with the first Stop
	stop     context.CancelFunc
	ended    chan struct{} // closed when the workload has ended, or will never start
	preStop  sync.Once
	signal   sync.Once
	probes   map[channel.ProbeKind]*probe
}

// New returns an enclave that waits for Configure.
func New(cfg Config) *Enclave {
	e := &Enclave{cfg: cfg, usage: usage.New(Virtual(), "/", cfg.Dir), ended: make(chan struct{}), probes: map[channel.ProbeKind]*probe{}}
	e.stopping, e.stop = context.WithCancel(context.Background())
	return e
}

// Configure implements channel.EnclaveServer.
func (e *Enclave) Configure(ctx context.Context, r *channel.ConfigureRequest) (*channel.ConfigureResponse, error) {
	e.configuring.Lock()
	defer e.configuring.Unlock()
	e.mu.Lock()
	done := e.manifest != nil
	e.mu.Unlock()
	if done {
		return nil, status.Error(codes.FailedPrecondition, "the enclave has been configured already")
	}
	m, canonical, err := e.manifestOf(r.GetManifest())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if len(r.GetSecret()) != vsock.SecretSize {
		return nil, status.Errorf(codes.InvalidArgument, "the secret has %d bytes, %d are needed", len(r.GetSecret()), vsock.SecretSize)
	}
	if r.GetPorts().GetContent() == 0 && e.cfg.Sealed == nil {
		return nil, status.Error(codes.InvalidArgument, "the content server's port is missing")
	}
	secret := vsock.Secret(r.GetSecret())
	provider, err := e.cfg.OpenModule(func(ctx context.Context) (net.Conn, error) {
		if r.GetPorts().GetNsm() == 0 {
			return nil, errors.New("this enclave's EIF needs the development security module and the host has none: use the initboot-dev image or a release EIF")
		}
		return secret.Dial(ctx, r.GetPorts().GetNsm(), e.cfg.Guest.Dial)
	})
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	v := vault.New(nsm.New(provider))
	document, err := v.Measure(ctx, canonical)
	if err != nil {
		v.Close()
		provider.Close()
		return nil, status.Error(codes.Internal, err.Error())
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.manifest, e.secret, e.ports, e.vault = m, secret, r.GetPorts(), v
	for kind, p := range probesOf(m) {
		e.probes[kind] = newProbe(p)
	}
	return &channel.ConfigureResponse{Document: document}, nil
}

// Stop implements channel.EnclaveServer. What it has begun goes on when its caller is gone.
func (e *Enclave) Stop(ctx context.Context, r *channel.StopRequest) (*channel.StopResponse, error) {
	e.mu.Lock()
	e.stop()
	running, p, g := e.running, e.process, e.gateway
	e.mu.Unlock()
	if !running {
		return &channel.StopResponse{}, nil
	}
	if p != nil {
		go e.stopWorkload(p, g, time.Duration(r.GetDrainMs())*time.Millisecond, time.Duration(r.GetGraceMs())*time.Millisecond)
	}
	select {
	case <-e.ended:
		return &channel.StopResponse{}, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// stopWorkload drains and runs the preStop hook, asks and at last kills. A hook that takes longer than the
// drain takes it from the grace.
func (e *Enclave) stopWorkload(p *process.Process, g *gateway.Gateway, drain, grace time.Duration) {
	end := time.Now().Add(drain + grace)
	g.Drain()
	hook := e.startPreStop(p, drain+grace-min(leastGrace, grace))
	if e.endsWithin(drain) {
		return
	}
	select {
	case <-hook:
	case <-e.ended:
		return
	}
	e.signal.Do(func() {
		if err := p.Stop(); err != nil {
			slog.Error("ask the workload to stop", "error", err)
		}
	})
	left := max(time.Until(end), 0)
	if e.endsWithin(left) {
		return
	}
	e.kill(p, fmt.Sprintf("the workload did not end within %s of its stop signal and was killed", left.Round(10*time.Millisecond)))
}

func (e *Enclave) endsWithin(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-e.ended:
		return true
	case <-t.C:
		return false
	}
}

// kill kills the workload, and remembers why if it was the first to do so.
func (e *Enclave) kill(p *process.Process, why string) {
	e.because(why)
	if err := p.Kill(); err != nil {
		slog.Error("kill the workload", "error", err)
	}
}

// because remembers the first reason why the workload does not end by itself.
func (e *Enclave) because(why string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.killed == "" {
		e.killed = why
	}
}
