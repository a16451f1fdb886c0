package boot

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/drivertest"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a machine that serves a pod socket.
type fixture struct {
	t      *testing.T
	driver *drivertest.Driver
	log    *bytes.Buffer
	pod    podsock.PodClient
	cancel context.CancelFunc // SIGTERM
	served <-chan struct{}
}

func manifest() *workload.Manifest {
	return &workload.Manifest{
		APIVersion: workload.APIVersion,
		Image:      workload.Image{Digest: "sha256:" + strings.Repeat("0", 64)},
		Ports:      []workload.Port{{Port: 80}},
	}
}

// start serves a machine whose enclaves run w.
func start(t *testing.T, w drivertest.Workload, change ...func(*Config, *drivertest.Driver)) *fixture {
	t.Helper()
	f := &fixture{t: t, driver: drivertest.New(t, w), log: &bytes.Buffer{}}
	cfg := Config{
		Workload: manifest(),
		EIF:      drivertest.WriteEIF(t, "console=ttyS0"),
		Memory:   64 << 20,
		Driver:   f.driver,
		Content: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "content of "+r.URL.Path)
		}),
		Log: slog.New(slog.NewTextHandler(f.log, nil)),
	}
	for _, c := range change {
		c(&cfg, f.driver)
	}
	var err error
	if cfg.Manifest, err = cfg.Workload.Canonical(); err != nil {
		t.Fatal(err)
	}
	m := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	f.cancel = cancel
	served := make(chan struct{})
	f.served = served
	go func() {
		defer close(served)
		m.Serve(ctx)
	}()
	socket := filepath.Join(drivertest.Dir(t), "pod.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	podsock.RegisterPodServer(server, m)
	go server.Serve(l)
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	f.pod = podsock.NewPodClient(conn)
	t.Cleanup(func() {
		cancel()
		<-served
		conn.Close()
		server.Stop()
		if left, _ := os.ReadDir(f.driver.Dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
		if t.Failed() {
			t.Log(f.log)
		}
	})
	return f
}

// wait returns the first state for which ok is true.
func (f *fixture) wait(ok func(*podsock.EnclaveState) bool) *podsock.EnclaveState {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 20*time.Second)
	defer cancel()
	stream, err := f.pod.Watch(ctx, &podsock.WatchRequest{})
	if err != nil {
		f.t.Fatal(err)
	}
	var last *podsock.EnclaveState
	for {
		s, err := stream.Recv()
		if err != nil {
			f.t.Fatalf("watch: %v; the last state was %v", err, last)
		}
		if last = s; ok(s) {
			return s
		}
	}
}

func (f *fixture) phase(generation uint64, phase podsock.EnclaveState_Phase) *podsock.EnclaveState {
	f.t.Helper()
	return f.wait(func(s *podsock.EnclaveState) bool { return s.GetGeneration() == generation && s.GetPhase() == phase })
}

// run collects the events of a Run until its end.
func (f *fixture) run(ctx context.Context) (events []*channel.RunEvent, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	stream, err := f.pod.Run(ctx, &podsock.RunRequest{})
	for err == nil {
		var ev *channel.RunEvent
		if ev, err = stream.Recv(); err == nil {
			events = append(events, ev)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return events, err
}

const (
	booting  = podsock.EnclaveState_PHASE_BOOTING
	booted   = podsock.EnclaveState_PHASE_BOOTED
	starting = podsock.EnclaveState_PHASE_STARTING
	running  = podsock.EnclaveState_PHASE_RUNNING
	draining = podsock.EnclaveState_PHASE_DRAINING
	ended    = podsock.EnclaveState_PHASE_ENDED
)

func exit(code int32) *channel.RunEvent {
	return &channel.RunEvent{Event: &channel.RunEvent_Exited{Exited: &channel.Exited{Code: code}}}
}

// hold is a workload that runs until it is stopped, and then exits with 3.
func hold(ctx context.Context, _ *drivertest.Enclave, send func(*channel.RunEvent) error) *channel.Exited {
	send(drivertest.Progress("fetch the image", ""))
	send(drivertest.Started())
	<-ctx.Done()
	return &channel.Exited{Code: 3}
}

func TestRun(t *testing.T) {
	step := make(chan struct{})
	f := start(t, func(ctx context.Context, e *drivertest.Enclave, send func(*channel.RunEvent) error) *channel.Exited {
		send(drivertest.Progress("fetch the image", "no route"))
		<-step
		send(drivertest.Started())
		send(drivertest.Output(channel.Output_STREAM_STDOUT, "out"))
		send(drivertest.Output(channel.Output_STREAM_STDERR, "err\x00"))
		<-step
		return &channel.Exited{Code: 7}
	})
	s := f.phase(1, booted)
	if !strings.HasPrefix(s.GetTarget(), "unix://") || len(s.GetSecret()) != vsock.SecretSize || s.GetRunningNs() != 0 {
		t.Errorf("booted: %v", s)
	}
	firstSecret := s.GetSecret()

	// What the enclave fetches from its host.
	c, err := f.driver.Last().DialHost(t.Context(), (*channel.HostPorts).GetContent)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "GET /blobs/x HTTP/1.0\r\n\r\n")
	if b, _ := io.ReadAll(c); !strings.HasSuffix(string(b), "content of /blobs/x") {
		t.Errorf("content: %q", b)
	}
	c.Close()

	for generation := range uint64(2) {
		generation++
		var events []*channel.RunEvent
		var runErr error
		var wg sync.WaitGroup
		wg.Go(func() { events, runErr = f.run(t.Context()) })
		s := f.wait(func(s *podsock.EnclaveState) bool {
			return s.GetGeneration() == generation && s.GetPhase() == starting && s.GetProgress().GetError() != ""
		})
		if diff := cmp.Diff(&channel.Progress{Step: "fetch the image", Error: "no route"}, s.GetProgress(), protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
		step <- struct{}{}
		s = f.phase(generation, running)
		if s.GetRunningNs() == 0 || s.GetTarget() == "" || s.GetProgress().GetError() != "" {
			t.Errorf("running: %v", s)
		}
		if got := bytes.Equal(s.GetSecret(), firstSecret); got != (generation == 1) {
			t.Errorf("generation %d has the secret of the first: %v", generation, got)
		}
		step <- struct{}{}
		s = f.phase(generation, ended)
		if s.GetTarget() != "" || len(s.GetSecret()) != 0 || s.GetRunningNs() != 0 {
			t.Errorf("ended: %v", s)
		}
		wg.Wait()
		want := []*channel.RunEvent{
			progress("run the workload"),
			drivertest.Progress("fetch the image", "no route"),
			drivertest.Started(),
			drivertest.Output(channel.Output_STREAM_STDOUT, "out"),
			drivertest.Output(channel.Output_STREAM_STDERR, "err\x00"),
			exit(7),
		}
		if diff := cmp.Diff(want, events, protocmp.Transform()); diff != "" || runErr != nil {
			t.Errorf("generation %d: %v\n%s", generation, runErr, diff)
		}
	}
}

func TestOneRunAtATime(t *testing.T) {
	f := start(t, hold)
	results := make(chan error, 2)
	for range 2 {
		go func() {
			events, err := f.run(t.Context())
			if err == nil && events[len(events)-1].GetExited().GetCode() != 3 {
				err = errors.New("no exit code")
			}
			results <- err
		}()
	}
	f.phase(1, running)
	first := f.driver.Last()
	first.Kill("the test says so")
	f.phase(2, running)
	if f.driver.Last() == first {
		t.Error("the second run has the enclave of the first")
	}
	if err := <-results; status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the test says so") {
		t.Errorf("the first run: %v", err)
	}
	if _, err := f.pod.Stop(t.Context(), &channel.StopRequest{}); err != nil {
		t.Error(err)
	}
	if err := <-results; err != nil {
		t.Errorf("the second run: %v", err)
	}
}

func TestLostInRun(t *testing.T) {
	f := start(t, hold)
	result := make(chan error)
	go func() {
		_, err := f.run(t.Context())
		result <- err
	}()
	socket := strings.TrimPrefix(f.phase(1, running).GetTarget(), "unix://")
	f.driver.Last().Kill("the enclave's PID 1 was killed")
	s := f.phase(1, ended)
	if s.GetTarget() != "" || !strings.Contains(s.GetProgress().GetError(), "PID 1 was killed") {
		t.Errorf("ended: %v", s)
	}
	if err := <-result; status.Code(err) != codes.Unavailable || message(err) != "the enclave was lost: the enclave's PID 1 was killed" {
		t.Errorf("Run: %v", err)
	}
	// No Run waits, so nothing boots, and the sockets go.
	for deadline := time.Now().Add(10 * time.Second); ; {
		if _, err := os.Stat(filepath.Dir(socket)); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the sockets of a dead enclave stay")
		}
		time.Sleep(time.Millisecond)
	}
	go func() {
		_, err := f.run(t.Context())
		result <- err
	}()
	f.phase(2, running)
	f.cancel()
	if err := <-result; status.Code(err) != codes.Unavailable {
		t.Errorf("Run at the end of initboot: %v", err)
	}
}

func TestLostBeforeRun(t *testing.T) {
	f := start(t, hold)
	f.phase(1, booted)
	f.driver.Last().Kill("out of memory")
	s := f.phase(1, booting)
	if s.GetTarget() != "" || !strings.Contains(s.GetProgress().GetError(), "out of memory") {
		t.Errorf("lost: %v", s)
	}
	if s := f.phase(2, booted); s.GetProgress().GetError() != "" {
		t.Errorf("booted again: %v", s)
	}
}

func TestConsoleDies(t *testing.T) {
	f := start(t, hold)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error)
	go func() {
		_, err := f.run(ctx)
		result <- err
	}()
	f.phase(1, running)
	first := f.driver.Last()
	cancel()
	<-result
	select {
	case <-first.Ended():
	case <-time.After(10 * time.Second):
		t.Fatal("the enclave outlives its console")
	}
	f.phase(1, ended)
	go func() {
		_, err := f.run(t.Context())
		result <- err
	}()
	f.phase(2, running)
	f.pod.Stop(t.Context(), &channel.StopRequest{})
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestStop(t *testing.T) {
	for name, tc := range map[string]struct {
		ports []workload.Port
		want  *channel.StopRequest
	}{
		"with clients":    {manifest().Ports, &channel.StopRequest{DrainMs: 1000, GraceMs: 500}},
		"without clients": {nil, &channel.StopRequest{GraceMs: 1500}},
	} {
		t.Run(name, func(t *testing.T) {
			drained := make(chan struct{})
			f := start(t, func(ctx context.Context, e *drivertest.Enclave, send func(*channel.RunEvent) error) *channel.Exited {
				send(drivertest.Started())
				<-ctx.Done()
				<-drained
				return &channel.Exited{Code: 0}
			}, func(c *Config, _ *drivertest.Driver) { c.Workload.Ports = tc.ports })
			var events []*channel.RunEvent
			var wg sync.WaitGroup
			wg.Go(func() { events, _ = f.run(t.Context()) })
			f.phase(1, running)
			stopped := make(chan error, 1)
			go func() {
				_, err := f.pod.Stop(t.Context(), &channel.StopRequest{DrainMs: 1000, GraceMs: 500})
				stopped <- err
			}()
			if s := f.phase(1, draining); s.GetTarget() == "" || s.GetRunningNs() == 0 {
				t.Errorf("draining: %v", s)
			}
			select {
			case err := <-stopped:
				t.Errorf("Stop returned before the workload had ended: %v", err)
			default:
			}
			close(drained)
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			wg.Wait()
			if len(events) == 0 || events[len(events)-1].GetExited() == nil {
				t.Errorf("events: %v", events)
			}
			if diff := cmp.Diff([]*channel.StopRequest{tc.want}, f.driver.Last().Stops(), protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
			// A stop without a run.
			if _, err := f.pod.Stop(t.Context(), &channel.StopRequest{}); err != nil {
				t.Error(err)
			}
		})
	}
}

// A workload with egress runs when the sidecar has said where it listens, in each generation anew.
func TestRegister(t *testing.T) {
	f := start(t, hold, func(c *Config, _ *drivertest.Driver) {
		c.Workload.KMS, c.Workload.Secrets = &workload.KMS{Region: "eu-central-1"}, []workload.Secret{{Name: "a", Ciphertext: "YQ==", Env: "A"}}
	})
	register := func(generation uint64, egress, credentials uint32) codes.Code {
		t.Helper()
		_, err := f.pod.Register(t.Context(), &podsock.RegisterRequest{Generation: generation, EgressPort: egress, CredentialsPort: credentials})
		return status.Code(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for generation := uint64(1); generation <= 2; generation++ {
		wg.Go(func() { f.run(t.Context()) })
		s := f.wait(func(s *podsock.EnclaveState) bool {
			return s.GetGeneration() == generation && s.GetPhase() == booted && s.GetProgress().GetStep() == "wait for the sidecar"
		})
		if s.GetEgressPort() != 0 || s.GetCredentialsPort() != 0 {
			t.Errorf("ports before registration: %v", s)
		}
		port := 70000 + uint32(generation)
		for name, got := range map[string]codes.Code{
			"former generation": register(generation-1, port, 0),
			"next generation":   register(generation+1, port, 0),
		} {
			if got != codes.FailedPrecondition {
				t.Errorf("%s: %v", name, got)
			}
		}
		if got := register(generation, 443, 0); got != codes.InvalidArgument {
			t.Errorf("a containerPort: %v", got)
		}
		if got := register(generation, port, 80001); got != codes.OK {
			t.Fatal(got)
		}
		if got := register(generation, port, 80001); got != codes.OK {
			t.Errorf("the same again: %v", got)
		}
		if got := register(generation, port+10, 80001); got != codes.FailedPrecondition {
			t.Errorf("other ports: %v", got)
		}
		s = f.phase(generation, running)
		if s.GetEgressPort() != port || s.GetCredentialsPort() != 80001 {
			t.Errorf("state of the run: %v", s)
		}
		want := &channel.RunRequest{EgressPort: port, CredentialsPort: 80001}
		if diff := cmp.Diff(want, f.driver.Last().Run(), protocmp.Transform()); diff != "" {
			t.Errorf("request to run (-want +got):\n%s", diff)
		}
		if _, err := f.pod.Stop(t.Context(), &channel.StopRequest{}); err != nil {
			t.Error(err)
		}
		f.phase(generation, ended)
		if got := register(generation, port, 80001); got != codes.FailedPrecondition {
			t.Errorf("after the end: %v", got)
		}
	}
}

// Stop does not wait for a sidecar that never comes.
func TestStopWithoutSidecar(t *testing.T) {
	f := start(t, hold, func(c *Config, _ *drivertest.Driver) { c.Workload.Egress = []string{"peer.example:443"} })
	f.phase(1, booted)
	var events []*channel.RunEvent
	done := make(chan struct{})
	go func() {
		defer close(done)
		events, _ = f.run(t.Context())
	}()
	for stop := true; stop; {
		f.pod.Stop(t.Context(), &channel.StopRequest{})
		select {
		case <-done:
			stop = false
		case <-time.After(10 * time.Millisecond):
		}
	}
	if len(events) != 1 || events[0].GetExited().GetCode() != exitStopped {
		t.Errorf("events %v", events)
	}
}

func TestStopBeforeBoot(t *testing.T) {
	f := start(t, hold, func(c *Config, _ *drivertest.Driver) { c.Invalid = errors.New("no such thing") })
	var events []*channel.RunEvent
	var err error
	var wg sync.WaitGroup
	wg.Go(func() { events, err = f.run(t.Context()) })
	// The stop may come before the run, so it is repeated, as the console does.
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for stop := true; stop; {
		f.pod.Stop(t.Context(), &channel.StopRequest{})
		select {
		case <-done:
			stop = false
		case <-time.After(10 * time.Millisecond):
		}
	}
	if err != nil || len(events) != 1 || events[0].GetExited().GetCode() != 143 {
		t.Errorf("%v, %v", events, err)
	}
}

func TestBootFails(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Config, *drivertest.Driver)
		err    string
	}{
		"configuration": {
			func(c *Config, _ *drivertest.Driver) { c.Invalid = errors.New("CLOISTER_MEMORY is not set") },
			"cannot read the configuration: CLOISTER_MEMORY is not set",
		},
		"no EIF": {
			func(c *Config, _ *drivertest.Driver) { c.EIF = "/nonexistent.eif" },
			"cannot check the enclave image: open /nonexistent.eif",
		},
		"development NSM in a release": {
			func(c *Config, _ *drivertest.Driver) { c.EIF = drivertest.WriteEIF(t, "quiet cloister.nsm=dev") },
			"asks for the development NSM",
		},
		"start": {
			func(_ *Config, d *drivertest.Driver) {
				d.Boot = func(uint64) error { return errors.New("no hugepages") }
			},
			"cannot start the enclave: no hugepages",
		},
		"dies before it connects": {
			func(_ *Config, d *drivertest.Driver) {
				d.Boot = func(uint64) error { d.Last().Kill("exited with status 1"); return nil }
			},
			"exited with status 1",
		},
		"another EIF": {
			func(_ *Config, d *drivertest.Driver) { d.OtherEIF = drivertest.WriteEIF(t, "other") },
			"cannot hand over the workload manifest: the enclave shows PCR0",
		},
		"sealed for another workload": {
			func(c *Config, _ *drivertest.Driver) { c.EIF = drivertest.WriteSealedEIF(t, []byte("{}")) },
			"cannot check the enclave image: the EIF is sealed with another workload manifest, of PCR16 ",
		},
		"larger than the enclave": {
			func(c *Config, _ *drivertest.Driver) { c.Memory = 5 },
			"cannot check the enclave image: what is sealed in it has 6 bytes, more than the enclave's memory of 5 bytes",
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := start(t, hold, tc.change)
			s := f.wait(func(s *podsock.EnclaveState) bool { return s.GetProgress().GetError() != "" })
			if s.GetPhase() != booting || !strings.Contains(s.GetProgress().GetError(), tc.err) {
				t.Errorf("got %v, want %q", s, tc.err)
			}
			// It does not give up, and does not forget why.
			s = f.wait(func(s *podsock.EnclaveState) bool { return s.GetGeneration() > 1 })
			if s.GetPhase() != booting || !strings.Contains(s.GetProgress().GetError(), tc.err) {
				t.Errorf("second try: %v", s)
			}
		})
	}
}

// A sealed enclave is not sent the manifest that it has.
func TestSealed(t *testing.T) {
	canonical, err := manifest().Canonical()
	if err != nil {
		t.Fatal(err)
	}
	f := start(t, hold, func(c *Config, _ *drivertest.Driver) { c.EIF = drivertest.WriteSealedEIF(t, canonical) })
	if s := f.phase(1, booted); s.GetProgress().GetError() != "" {
		t.Errorf("booted: %v", s)
	}
}

func TestBootRecovers(t *testing.T) {
	f := start(t, hold, func(_ *Config, d *drivertest.Driver) {
		d.Boot = func(generation uint64) error {
			if generation == 1 {
				return errors.New("not yet")
			}
			return nil
		}
	})
	if s := f.phase(2, booted); s.GetProgress().GetError() != "" {
		t.Errorf("booted: %v", s)
	}
}

func TestNSM(t *testing.T) {
	f := start(t, hold, func(c *Config, _ *drivertest.Driver) {
		c.EIF = drivertest.WriteEIF(t, "cloister.nsm=dev")
		c.NSM = func(m *eif.Measurements) func(net.Conn) {
			return func(c net.Conn) { c.Write(m.PCR0) }
		}
	})
	f.phase(1, booted)
	c, err := f.driver.Last().DialHost(t.Context(), (*channel.HostPorts).GetNsm)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || len(b) != workload.PCRSize {
		t.Errorf("%d bytes, %v", len(b), err)
	}
}

func TestProbe(t *testing.T) {
	asked := make(chan *channel.ProbeRequest, 1)
	f := start(t, hold, func(c *Config, d *drivertest.Driver) {
		c.Workload.Probes = &workload.Probes{Readiness: &workload.Probe{HTTP: &workload.HTTPGet{Port: 80}}}
		d.Probe = func(r *channel.ProbeRequest) *channel.ProbeResponse {
			asked <- r
			return &channel.ProbeResponse{Message: "503"}
		}
	})
	f.phase(1, booted)
	readiness := &channel.ProbeRequest{Kind: channel.ProbeKind_PROBE_KIND_READINESS, TimeoutMs: 1000, MaxAgeMs: 500}
	r, err := f.pod.Probe(t.Context(), readiness)
	if err != nil || r.GetOk() || r.GetStarted() || !strings.Contains(r.GetMessage(), "has not been started") {
		t.Errorf("before the run: %v, %v", r, err)
	}
	result := make(chan error)
	go func() {
		_, err := f.run(t.Context())
		result <- err
	}()
	f.phase(1, running)
	r, err = f.pod.Probe(t.Context(), readiness)
	if err != nil || r.GetOk() || !r.GetStarted() || r.GetMessage() != "503" {
		t.Errorf("readiness: %v, %v", r, err)
	}
	if diff := cmp.Diff(readiness, <-asked, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	r, err = f.pod.Probe(t.Context(), &channel.ProbeRequest{Kind: channel.ProbeKind_PROBE_KIND_LIVENESS})
	if err != nil || !r.GetOk() || !r.GetStarted() {
		t.Errorf("a kind without a probe: %v, %v", r, err)
	}
	f.pod.Stop(t.Context(), &channel.StopRequest{})
	<-result
}

func TestStats(t *testing.T) {
	want := &channel.StatsResponse{RequestsTotal: 7, MemoryUsed: 1 << 20}
	f := start(t, hold, func(_ *Config, d *drivertest.Driver) { d.Stats = want })
	f.phase(1, booted)
	if r, err := f.pod.Stats(t.Context(), &channel.StatsRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("before the run: %v, %v", r, err)
	}
	result := make(chan error)
	go func() {
		_, err := f.run(t.Context())
		result <- err
	}()
	f.phase(1, running)
	r, err := f.pod.Stats(t.Context(), &channel.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, r, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	f.pod.Stop(t.Context(), &channel.StopRequest{})
	<-result
}

// takenPort is a driver on whose node another process holds port 9000 until freed.
type takenPort struct {
	*drivertest.Driver
	tried chan struct{}
	freed atomic.Bool
}

func (d *takenPort) Create(generation uint64) (driver.Enclave, error) {
	e, err := d.Driver.Create(generation)
	return &takenEnclave{e, d}, err
}

type takenEnclave struct {
	driver.Enclave
	driver *takenPort
}

func (e *takenEnclave) Listen(port uint32) (net.Listener, error) {
	if port == channel.Port && !e.driver.freed.Load() {
		select {
		case e.driver.tried <- struct{}{}:
		default:
		}
		return nil, &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", syscall.EADDRINUSE)}
	}
	return e.Enclave.Listen(port)
}

// TestPortTaken: the port that enclaves dial first is the node's, and pods that boot at once wait in turn.
func TestPortTaken(t *testing.T) {
	tried := make(chan struct{})
	var taken *takenPort
	f := start(t, hold, func(c *Config, d *drivertest.Driver) {
		taken = &takenPort{Driver: d, tried: tried}
		c.Driver = taken
	})
	<-tried
	<-tried
	if s := f.wait(func(*podsock.EnclaveState) bool { return true }); s.GetGeneration() != 1 || s.GetProgress().GetStep() != "open the enclave's host ports" {
		t.Errorf("waiting: %v", s)
	}
	taken.freed.Store(true)
	f.phase(1, booted)
}
