package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/sidecar/envoy"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
)

const (
	patience       = 20 * time.Second
	maxConnections = 1000
)

// envoyBinary finds a real Envoy: $CLOISTER_ENVOY, or where hack/envoy.sh puts it.
func envoyBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("CLOISTER_ENVOY")
	if path == "" {
		cache := os.Getenv("CLOISTER_CACHE")
		if cache == "" {
			user, err := os.UserCacheDir()
			if err != nil {
				t.Fatal(err)
			}
			cache = filepath.Join(user, "cloister")
		}
		path = filepath.Join(cache, "out", "envoy")
		if _, err := os.Stat(path); err != nil {
			t.Skip("no Envoy: set CLOISTER_ENVOY to one, or run hack/envoy.sh")
		}
	}
	return path
}

// pod is initboot's end of the pod socket: it streams what set is given.
type pod struct {
	podsock.UnimplementedPodServer
	socket string
	server *grpc.Server

	mu      sync.Mutex
	state   *podsock.EnclaveState
	stats   *channel.StatsResponse // nil: there is no run
	changed chan struct{}
	// asked is the number of calls of Stats.
	asked int
	// registered are the calls of Register.
	registered []*podsock.RegisterRequest
}

func newPod(t *testing.T, dir string) *pod {
	t.Helper()
	p := &pod{
		socket:  filepath.Join(dir, "pod.sock"),
		state:   &podsock.EnclaveState{Generation: 1, Phase: podsock.EnclaveState_PHASE_BOOTING},
		changed: make(chan struct{}),
	}
	p.listen(t)
	t.Cleanup(func() { p.server.Stop() })
	return p
}

func (p *pod) listen(t *testing.T) {
	t.Helper()
	os.Remove(p.socket)
	l, err := net.Listen("unix", p.socket)
	if err != nil {
		t.Fatal(err)
	}
	p.server = grpc.NewServer()
	podsock.RegisterPodServer(p.server, p)
	go p.server.Serve(l)
}

func (p *pod) set(s *podsock.EnclaveState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.state = s
	close(p.changed)
	p.changed = make(chan struct{})
}

// Register adds the ports to the state, as initboot does.
func (p *pod) Register(_ context.Context, r *podsock.RegisterRequest) (*podsock.RegisterResponse, error) {
	p.mu.Lock()
	s := proto.CloneOf(p.state)
	p.registered = append(p.registered, r)
	p.mu.Unlock()
	if s.GetGeneration() != r.GetGeneration() {
		return nil, status.Error(codes.FailedPrecondition, "another generation")
	}
	s.EgressPort, s.CredentialsPort = r.GetEgressPort(), r.GetCredentialsPort()
	p.set(s)
	return &podsock.RegisterResponse{}, nil
}

func (p *pod) Watch(_ *podsock.WatchRequest, stream grpc.ServerStreamingServer[podsock.EnclaveState]) error {
	for {
		p.mu.Lock()
		state, changed := p.state, p.changed
		p.mu.Unlock()
		if err := stream.Send(state); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (p *pod) Stats(context.Context, *channel.StatsRequest) (*channel.StatsResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked++
	if p.stats == nil {
		return nil, status.Error(codes.Unavailable, "no workload runs")
	}
	return p.stats, nil
}

// enclave answers every connection to port with its name and echoes the rest, to the end of file.
func enclave(t *testing.T, port uint16, generation uint64, name string) *podsock.EnclaveState {
	t.Helper()
	dir := shortDir(t)
	guest, err := vsock.NewHybridGuest(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := guest.Listen(uint32(port))
	if err != nil {
		t.Fatal(err)
	}
	secret := vsock.NewSecret()
	proven := secret.Listen(l, uint32(port))
	t.Cleanup(func() { proven.Close() })
	go func() {
		for {
			c, err := proven.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				fmt.Fprintln(c, name)
				io.Copy(c, c)
			}()
		}
	}()
	return &podsock.EnclaveState{
		Generation: generation,
		Phase:      podsock.EnclaveState_PHASE_RUNNING,
		Target:     "unix://" + filepath.Join(dir, vsock.HybridName),
		Secret:     secret,
	}
}

func phase(of *podsock.EnclaveState, p podsock.EnclaveState_Phase) *podsock.EnclaveState {
	return &podsock.EnclaveState{Generation: of.GetGeneration(), Phase: p, Target: of.GetTarget(), Secret: of.GetSecret()}
}

// shortDir is t.TempDir with a path that fits into a unix socket's address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sidecar")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// running is a sidecar under test.
type running struct {
	config config
	port   uint16
	pod    *pod
	log    *lockedBuffer
	stop   context.CancelFunc
	ended  chan error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t *testing.T, egress ...string) *running {
	t.Helper()
	return startWith(t, func(c *config) { c.egress = egress })
}

func startWith(t *testing.T, change func(*config)) *running {
	t.Helper()
	binary := envoyBinary(t)
	dir := shortDir(t)
	r := &running{port: freePort(t), pod: newPod(t, dir), log: &lockedBuffer{}, ended: make(chan error, 1)}
	r.config = config{
		ports:          []uint16{r.port},
		podSocket:      r.pod.socket,
		dir:            filepath.Join(dir, "run"),
		envoyBinary:    binary,
		maxConnections: maxConnections,
		readyAddr:      fmt.Sprintf("127.0.0.1:%d", freePort(t)),
		envoyLog:       r.log,
	}
	change(&r.config)
	if err := os.Mkdir(r.config.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(r.log.String())
		}
	})
	r.serve(t)
	return r
}

// serve runs the sidecar until stop or the end of the test.
func (r *running) serve(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	r.stop = cancel
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.ended <- run(ctx, slog.New(slog.NewJSONHandler(r.log, nil)), r.config)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	eventually(t, func() error { return probeStartup(envoy.AdminSocket(envoyDir(r.config.dir))) })
}

// eventually waits until f returns nil.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	within(t, patience, f)
}

func within(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	end := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %s: %v", limit, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (r *running) ready() error {
	res, err := http.Get("http://" + r.config.readyAddr + "/ready")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%d: %s", res.StatusCode, strings.TrimSpace(string(body)))
	}
	return nil
}

func (r *running) dial(host string) (*net.TCPConn, error) {
	c, err := net.DialTimeout("tcp", net.JoinHostPort(host, fmt.Sprint(r.port)), 2*time.Second)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn), nil
}

// ask sends a line, ends its direction and returns all that comes back.
func (r *running) ask(line string) (string, error) {
	c, err := r.dial("127.0.0.1")
	if err != nil {
		return "", err
	}
	defer c.Close()
	if _, err := fmt.Fprintln(c, line); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

func (r *running) wantAnswer(t *testing.T, name string) {
	t.Helper()
	got, err := r.ask("hello")
	if want := name + "\nhello\n"; err != nil || got != want {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

// refused returns nil if nobody listens.
func (r *running) refused() error {
	c, err := r.dial("127.0.0.1")
	if err == nil {
		c.Close()
		return errors.New("a connection was accepted")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return err
	}
	return nil
}

func (r *running) envoyPID(t *testing.T) int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range dirs {
		b, err := os.ReadFile(f)
		if err == nil && bytes.Contains(b, []byte(envoyDir(r.config.dir))) {
			var pid int
			fmt.Sscanf(f, "/proc/%d/cmdline", &pid)
			return pid
		}
	}
	t.Fatal("no Envoy runs")
	return 0
}

func TestPhases(t *testing.T) {
	r := start(t)
	first := enclave(t, r.port, 1, "first")
	for _, p := range []podsock.EnclaveState_Phase{
		podsock.EnclaveState_PHASE_BOOTING, podsock.EnclaveState_PHASE_BOOTED, podsock.EnclaveState_PHASE_STARTING,
	} {
		r.pod.set(phase(first, p))
		if err := r.refused(); err != nil {
			t.Errorf("%s: %v", p, err)
		}
		if err := r.ready(); err == nil || !strings.Contains(err.Error(), "503") {
			t.Errorf("%s: /ready gives %v", p, err)
		}
	}

	r.pod.set(first)
	eventually(t, r.ready)
	r.wantAnswer(t, "first")

	// Draining: not ready, but whoever comes is served, and whoever is there stays.
	kept, err := r.dial("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	read(t, kept, "first\n")
	r.pod.set(phase(first, podsock.EnclaveState_PHASE_DRAINING))
	eventually(t, func() error {
		if r.ready() == nil {
			return errors.New("still ready")
		}
		return nil
	})
	r.wantAnswer(t, "first")
	fmt.Fprint(kept, "on\n")
	read(t, kept, "on\n")

	// The end: connections die, nobody listens.
	r.pod.set(phase(first, podsock.EnclaveState_PHASE_ENDED))
	if n, err := kept.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("a connection outlives its enclave: %d, %v", n, err)
	}
	within(t, time.Second, r.refused)

	// The next generation serves on the same port, at once.
	second := enclave(t, r.port, 2, "second")
	r.pod.set(second)
	eventually(t, r.ready)
	r.wantAnswer(t, "second")
}

func read(t *testing.T, c net.Conn, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("got %q, %v; want %q", b, err, want)
	}
}

// A generation may follow another without a pause that the sidecar sees.
func TestNextGenerationWithoutPause(t *testing.T) {
	r := start(t)
	r.pod.set(enclave(t, r.port, 1, "first"))
	eventually(t, r.ready)
	kept, err := r.dial("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	read(t, kept, "first\n")
	for generation := uint64(2); generation < 6; generation++ {
		name := fmt.Sprint("generation ", generation)
		next := enclave(t, r.port, generation, name)
		if generation%2 == 0 {
			r.pod.set(phase(next, podsock.EnclaveState_PHASE_BOOTING))
		}
		r.pod.set(next)
		eventually(t, func() error {
			got, err := r.ask("x")
			if err == nil && got != name+"\nx\n" {
				err = fmt.Errorf("got %q", got)
			}
			return err
		})
		eventually(t, r.ready)
	}
	if n, err := kept.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("a connection outlives its enclave: %d, %v", n, err)
	}
}

func TestInitbootGoneAndBack(t *testing.T) {
	r := start(t)
	first := enclave(t, r.port, 1, "first")
	r.pod.set(first)
	eventually(t, r.ready)
	r.pod.server.Stop()
	within(t, time.Second, r.refused)
	if r.ready() == nil {
		t.Error("ready without initboot")
	}
	r.pod.set(enclave(t, r.port, 1, "after a restart generations count from 1 again"))
	r.pod.listen(t)
	eventually(t, r.ready)
	r.wantAnswer(t, "after a restart generations count from 1 again")
}

// A client that takes its answer slowly still gets all of it when the pod ends.
func TestSlowClientAtTheEnd(t *testing.T) {
	r := start(t)
	const size = 300 << 10 // what Envoy and the sockets hold between a relay that has sent and a silent client
	first := enclave(t, r.port, 1, strings.Repeat("x", size))
	r.pod.set(first)
	eventually(t, r.ready)
	c, err := r.dial("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetReadBuffer(32 << 10); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil { // the enclave sends its name and closes
		t.Fatal(err)
	}
	read(t, c, "x")
	r.pod.set(phase(first, podsock.EnclaveState_PHASE_ENDED))
	within(t, time.Second, r.refused)
	r.stop()
	time.Sleep(300 * time.Millisecond) // a slow client, not a wait
	if n, err := io.Copy(io.Discard, c); err != nil || n != size {
		t.Errorf("%d bytes arrived after the end, %v; %d were outstanding", n, err, size)
	}
}

func TestIPv6(t *testing.T) {
	r := start(t)
	if l, err := net.Listen("tcp6", "[::1]:0"); err != nil {
		t.Skip("this machine has no IPv6")
	} else {
		l.Close()
	}
	r.pod.set(enclave(t, r.port, 1, "first"))
	eventually(t, r.ready)
	c, err := r.dial("::1")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	read(t, c, "first\n")
}

func TestPortInUse(t *testing.T) {
	r := start(t)
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", r.port))
	if err != nil {
		t.Fatal(err)
	}
	r.pod.set(enclave(t, r.port, 1, "first"))
	eventually(t, func() error {
		err := r.ready()
		if err == nil || !strings.Contains(err.Error(), "Address already in use") {
			return fmt.Errorf("/ready gives %v", err)
		}
		return nil
	})
	l.Close()
	eventually(t, r.ready) // by itself, when the port is free
	r.wantAnswer(t, "first")
}

// As many as allowed work; one more is closed, and the others go on.
func TestThousandConnections(t *testing.T) {
	r := start(t)
	r.pod.set(enclave(t, r.port, 1, "first"))
	eventually(t, r.ready)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	for range maxConnections {
		c, err := r.dial("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	for _, c := range conns {
		read(t, c, "first\n")
	}
	more, err := r.dial("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer more.Close()
	if n, err := more.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("one connection more than allowed gives %d bytes, %v", n, err)
	}
	for _, c := range conns {
		fmt.Fprint(c, "x")
		read(t, c, "x")
	}
}

func TestEnvoyKilled(t *testing.T) {
	r := start(t)
	if err := syscall.Kill(r.envoyPID(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-r.ended:
		if err == nil || !strings.Contains(err.Error(), "Envoy ended by itself (signal: killed)") {
			t.Errorf("got %v", err)
		}
	case <-time.After(patience):
		t.Fatal("the sidecar goes on without Envoy")
	}
}

// On SIGTERM nobody new is let in, who is there may finish, and the result is success.
func TestStop(t *testing.T) {
	r := start(t)
	r.pod.set(enclave(t, r.port, 1, "first"))
	eventually(t, r.ready)
	kept, err := r.dial("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	read(t, kept, "first\n")
	pid := r.envoyPID(t)

	r.stop()
	within(t, time.Second, r.refused)
	fmt.Fprint(kept, "last words\n")
	read(t, kept, "last words\n")
	kept.Close()
	select {
	case err := <-r.ended:
		if err != nil {
			t.Errorf("got %v", err)
		}
	case <-time.After(leaveTimeout + stopTimeout):
		t.Fatal("the sidecar does not end")
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("Envoy is still there: %v", err)
	}
}

// Whatever Envoy logs is a JSON line, and no secret lies where others read it.
func TestTraces(t *testing.T) {
	r := start(t)
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", r.port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r.pod.set(enclave(t, r.port, 1, "first"))
	eventually(t, func() error { // Envoy warns about the port
		if !strings.Contains(r.log.String(), `"component":"envoy"`) {
			return errors.New("Envoy logs nothing")
		}
		return nil
	})
	for line := range strings.Lines(r.log.String()) {
		if !json.Valid([]byte(line)) {
			t.Errorf("not JSON: %s", line)
		}
	}
	for _, name := range []string{"bootstrap.json", "admin.sock"} {
		info, err := os.Stat(filepath.Join(envoyDir(r.config.dir), name))
		if err != nil {
			t.Fatal(err)
		}
		if mode := info.Mode().Perm(); mode != 0o600 {
			t.Errorf("%s has mode %o", name, mode)
		}
	}
}

func TestParsePorts(t *testing.T) {
	tests := map[string]struct {
		want string
		ok   bool
	}{
		"[80]":      {"[80]", true},
		"[8443,80]": {"[80 8443]", true},
		"[]":        {"[]", true},
		"":          {"", false},
		"[80,80]":   {"", false},
		"[0]":       {"", false},
		"[65536]":   {"", false},
		"80":        {"", false},
	}
	for in, test := range tests {
		ports, err := parsePorts(in)
		if ok := err == nil; ok != test.ok || ok && fmt.Sprint(ports) != test.want {
			t.Errorf("parsePorts(%q) = %v, %v", in, ports, err)
		}
	}
}

// metrics scrapes the sidecar.
func (r *running) metrics() (podmetrics.Snapshot, error) {
	res, err := http.Get("http://" + r.config.readyAddr + podmetrics.Path)
	if err != nil {
		return podmetrics.Snapshot{}, err
	}
	defer res.Body.Close()
	return podmetrics.Parse(res.Body)
}

// /metrics shows the state that initboot reports, and the enclave's counters where it has any.
func TestMetrics(t *testing.T) {
	r := start(t)
	first := enclave(t, r.port, 4, "first")
	stats := &channel.StatsResponse{RequestsTotal: 9, MemoryUsed: 1, MemoryTotal: 2}
	for _, tt := range []struct {
		phase podsock.EnclaveState_Phase
		stats *channel.StatsResponse
		want  podmetrics.Snapshot
	}{
		{podsock.EnclaveState_PHASE_BOOTING, nil, podmetrics.Snapshot{}},
		{podsock.EnclaveState_PHASE_BOOTED, nil, podmetrics.Snapshot{Attested: true}},
		{podsock.EnclaveState_PHASE_RUNNING, stats, podmetrics.Snapshot{Attested: true, Stats: stats}},
		{podsock.EnclaveState_PHASE_DRAINING, nil, podmetrics.Snapshot{Attested: true}},
		{podsock.EnclaveState_PHASE_ENDED, nil, podmetrics.Snapshot{}},
	} {
		tt.want.Phase, tt.want.Generation = tt.phase, 4
		r.pod.mu.Lock()
		r.pod.stats = tt.stats
		r.pod.mu.Unlock()
		r.pod.set(phase(first, tt.phase))
		eventually(t, func() error {
			got, err := r.metrics()
			if err != nil {
				return err
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				return errors.New(diff)
			}
			return nil
		})
	}
}

// Strangers that scrape do not keep the enclave busy.
func TestMetricsAreAskedForSeldom(t *testing.T) {
	r := start(t)
	r.pod.mu.Lock()
	r.pod.stats = &channel.StatsResponse{RequestsTotal: 9}
	r.pod.mu.Unlock()
	r.pod.set(phase(enclave(t, r.port, 4, "first"), podsock.EnclaveState_PHASE_RUNNING))
	eventually(t, func() error {
		if got, err := r.metrics(); err != nil || got.Stats.GetRequestsTotal() != 9 {
			return fmt.Errorf("%v, %v", got, err)
		}
		return nil
	})
	begin := time.Now()
	var strangers sync.WaitGroup
	for range 20 {
		strangers.Go(func() {
			for range 10 {
				if got, err := r.metrics(); err != nil || got.Stats.GetRequestsTotal() != 9 {
					t.Errorf("%v, %v", got, err)
				}
			}
		})
	}
	strangers.Wait()
	most := 2 + int(time.Since(begin)/statsAge)
	r.pod.mu.Lock()
	defer r.pod.mu.Unlock()
	if r.pod.asked > most {
		t.Errorf("the enclave was asked %d times, want at most %d", r.pod.asked, most)
	}
}
