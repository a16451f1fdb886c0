package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/sidecar/envoy"
	"cloister.dev/cloister/sidecar/relay"
	"cloister.dev/cloister/sidecar/xds"
)

const (
	adminTimeout = 900 * time.Millisecond // less than the kubelet's shortest time-out of a probe, 1 s

	registerTimeout = 5 * time.Second // initboot answers at once

	// On SIGTERM: how long connections that are still open may go on, and how long Envoy may take.
	// When the kubelet sends it, the workload has ended and there are none.
	leaveTimeout = 5 * time.Second
	stopTimeout  = 5 * time.Second
)

// config is where the sidecar finds what it works with.
type config struct {
	ports          []uint16
	egress         []string // "host:port" that the enclave may reach
	awsRegion      string   // of the KMS that the enclave uses; empty when it uses none
	podSocket      string
	dir            string // on tmpfs
	envoyBinary    string
	maxConnections int64
	readyAddr      string // TCP address of /ready and /metrics
	envoyLog       io.Writer
}

func defaults() config {
	return config{
		podSocket:      podsock.Path,
		dir:            podenv.SidecarDir,
		envoyBinary:    "/envoy",
		maxConnections: envoy.MaxConnections(),
		readyAddr:      fmt.Sprintf(":%d", podenv.SidecarPort),
		envoyLog:       os.Stderr,
	}
}

func envoyDir(dir string) string { return filepath.Join(dir, "envoy") }

// sidecar is the state that the parts share.
type sidecar struct {
	log   *slog.Logger
	ports []uint16
	relay *relay.Relay
	// egress is nil where the enclave may reach nothing.
	egress *relay.Egress
	// credentials is nil where the enclave needs none.
	credentials *relay.Egress
	xds         *xds.Server
	pod         podsock.PodClient
	admin       *envoy.Admin

	mu       sync.Mutex
	state    *podsock.EnclaveState
	stopping bool

	askStats sync.Mutex // one question at a time
	stats    *channel.StatsResponse
	statsOf  *podsock.EnclaveState // the state that stats belong to
	statsAt  time.Time
}

// run serves until ctx ends, and then returns nil, or until a part fails.
func run(ctx context.Context, log *slog.Logger, c config) (err error) {
	relayDir := filepath.Join(c.dir, "relay")
	r, err := relay.Listen(relayDir, c.ports)
	if err != nil {
		return err
	}
	defer r.Close()
	var routes []xds.Route
	for _, port := range c.ports {
		routes = append(routes, xds.Route{Port: port, Socket: relay.SocketPath(relayDir, port)})
	}
	out := xds.Egress{Socket: filepath.Join(c.dir, "egress.sock"), Endpoints: c.egress}
	x, err := xds.NewServer(log, routes, out, listenAddress())
	if err != nil {
		return err
	}
	defer x.Stop()
	failed := make(chan error, 3)
	xdsSocket := filepath.Join(c.dir, "xds.sock")
	l, err := listenUnix(xdsSocket)
	if err != nil {
		return err
	}
	go func() { failed <- x.Serve(l) }()

	p, err := envoy.Start(envoy.Config{
		Binary:         c.envoyBinary,
		Dir:            envoyDir(c.dir),
		NodeID:         xds.NodeID,
		XDSSocket:      xdsSocket,
		Concurrency:    envoy.Concurrency(),
		MaxConnections: c.maxConnections,
		Log:            c.envoyLog,
	})
	if err != nil {
		return err
	}
	defer p.Stop(stopTimeout)

	pod, closePod := dialPod(c.podSocket)
	defer closePod()
	s := &sidecar{log: log, ports: c.ports, relay: r, xds: x, pod: pod, admin: envoy.NewAdmin(envoy.AdminSocket(envoyDir(c.dir)))}
	if len(c.egress) > 0 {
		s.egress = relay.NewEgress(out.Socket)
		defer s.egress.Close()
	}
	if c.awsRegion != "" {
		stop, err := s.serveCredentials(ctx, c, failed)
		if err != nil {
			return err
		}
		defer stop()
	}
	h := &http.Server{Handler: s.handler(), ReadHeaderTimeout: 5 * time.Second}
	hl, err := net.Listen("tcp", c.readyAddr)
	if err != nil {
		return fmt.Errorf("listen for probes: %w", err)
	}
	defer h.Close()
	go func() { failed <- h.Serve(hl) }()

	watching, endWatch := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { watch(watching, log, s.pod, s.apply) })
	defer wg.Wait()
	defer endWatch()

	select {
	case <-p.Done():
		return fmt.Errorf("Envoy ended by itself (%w): its last log lines say why, and the kubelet starts both again", exitError(p.Err()))
	case err := <-failed:
		return err
	case <-ctx.Done():
		s.leave(p.Done())
		return nil
	}
}

// exitError names also an exit with status 0.
func exitError(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// listenAddress returns the address for listeners: also IPv6 where the pod has it.
func listenAddress() string {
	l, err := net.Listen("tcp6", "[::]:0")
	if err != nil {
		return xds.IPv4
	}
	l.Close()
	return xds.DualStack
}

// listenUnix listens on a socket of mode 0600, in place of one that an earlier process left.
func listenUnix(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("create socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("create socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("create socket: %w", err)
	}
	return l, nil
}

// apply follows the enclave:
//
//	phase              connections            new connections
//	RUNNING, DRAINING  of this generation     carried to the enclave
//	any other          closed                 refused: no listener
//
// It fails when egress cannot follow; it must be called again then.
func (s *sidecar) apply(ctx context.Context, state *podsock.EnclaveState) error {
	s.applyIngress(state)
	return s.applyEgress(ctx, state)
}

func (s *sidecar) applyIngress(state *podsock.EnclaveState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return
	}
	phase := state.GetPhase()
	if s.state.GetPhase() != phase {
		s.log.Info("enclave", "generation", state.GetGeneration(), "phase", phaseName(phase))
	}
	s.state = state
	serving := phase == podsock.EnclaveState_PHASE_RUNNING || phase == podsock.EnclaveState_PHASE_DRAINING
	if serving {
		s.relay.Set(target(state))
	} else {
		s.relay.Set(nil)
	}
	if err := s.xds.SetListening(serving); err != nil {
		s.log.Error("change Envoy's listeners", "error", err)
	}
}

// applyEgress follows the enclave with what leaves it:
//
//	phase                                 connections         new connections
//	BOOTED, STARTING, RUNNING, DRAINING   of this generation  carried to Envoy
//	any other                             closed              refused
//
// The first time in a generation it tells initboot where it listens.
func (s *sidecar) applyEgress(ctx context.Context, state *podsock.EnclaveState) error {
	var t *relay.Target
	if state.GetTarget() != "" {
		t = target(state)
	}
	ports := &podsock.RegisterRequest{Generation: state.GetGeneration()}
	var err error
	if s.egress != nil {
		if ports.EgressPort, err = s.egress.Set(t, state.GetEgressPort()); err != nil {
			return err
		}
	}
	if s.credentials != nil {
		if ports.CredentialsPort, err = s.credentials.Set(t, state.GetCredentialsPort()); err != nil {
			return err
		}
	}
	if t == nil || ports.EgressPort == state.GetEgressPort() && ports.CredentialsPort == state.GetCredentialsPort() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	if _, err := s.pod.Register(ctx, ports); err != nil {
		return fmt.Errorf("register the ports for what leaves the enclave: %w", err)
	}
	return nil
}

func target(state *podsock.EnclaveState) *relay.Target {
	return &relay.Target{
		Generation: state.GetGeneration(),
		Address:    state.GetTarget(),
		Secret:     vsock.Secret(state.GetSecret()),
	}
}

// leave refuses new connections and gives those that are open a little time: when the workload has
// ended, clients may still be taking its last answers from Envoy.
func (s *sidecar) leave(envoyEnded <-chan struct{}) {
	s.mu.Lock()
	s.stopping = true
	err := s.xds.SetListening(false)
	s.mu.Unlock()
	if err != nil {
		s.log.Error("take Envoy's listeners away", "error", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaveTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if s.relay.Active() == 0 {
			if n, err := s.admin.Connections(ctx); err != nil || n == 0 {
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-envoyEnded:
			return
		case <-tick.C:
		}
	}
}

func (s *sidecar) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), adminTimeout)
		defer cancel()
		if err := s.ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.Handle("GET "+podmetrics.Path, podmetrics.Handler(s.snapshot))
	return mux
}

// ready returns nil when clients reach the workload: it runs, and Envoy, asked itself, has a listener
// for every port.
func (s *sidecar) ready(ctx context.Context) error {
	s.mu.Lock()
	phase, stopping := s.state.GetPhase(), s.stopping
	s.mu.Unlock()
	if stopping {
		return errors.New("the sidecar ends")
	}
	switch phase {
	case podsock.EnclaveState_PHASE_RUNNING:
	case podsock.EnclaveState_PHASE_UNSPECIFIED:
		return errors.New("initboot does not answer on the pod socket")
	default:
		return fmt.Errorf("the workload does not run: the enclave's phase is %s", phaseName(phase))
	}
	if err := s.admin.Live(ctx); err != nil {
		return err
	}
	names, err := s.admin.Listeners(ctx)
	if err != nil {
		return err
	}
	for _, port := range s.ports {
		if slices.Contains(names, xds.ListenerName(port)) {
			continue
		}
		if why := s.xds.Rejected(); why != "" {
			return fmt.Errorf("Envoy cannot listen on port %d: %s", port, why)
		}
		return fmt.Errorf("Envoy does not listen on port %d yet", port)
	}
	return nil
}

// phaseName is "RUNNING" and so on.
func phaseName(p podsock.EnclaveState_Phase) string { return strings.TrimPrefix(p.String(), "PHASE_") }
