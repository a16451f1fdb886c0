package supervise

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/enclaved/image/imagetest"
	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

// app is the test's workload program.
var app []byte

func TestMain(m *testing.M) {
	process.Helper()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "app")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		build := exec.Command("go", "build", "-o", dir+"/app", "./process/testdata/app")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the test's workload: %v\n%s", err, out)
			return 1
		}
		if app, err = os.ReadFile(dir + "/app"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// sockets is a guest and its host on unix sockets.
type sockets struct{ dir string }

func (s sockets) guest(port uint32) string { return filepath.Join(s.dir, fmt.Sprint(port)) }
func (s sockets) host(port uint32) string  { return filepath.Join(s.dir, fmt.Sprint("host", port)) }

func (s sockets) Listen(port uint32) (net.Listener, error) { return net.Listen("unix", s.guest(port)) }

func (s sockets) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", s.host(port))
}

const contentPort = 70000

// enclave is an Enclave with everything that initboot would be to it.
type enclave struct {
	channel.EnclaveClient
	sockets
	secret vsock.Secret
	module *nsmtest.Module
	served *Enclave

	mu     sync.Mutex
	images imagetest.Content
	broken bool // the content server flips a byte of each blob
}

func newEnclave(t *testing.T) *enclave {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a workload has namespaces and a root of its own")
	}
	dir, err := os.MkdirTemp("/tmp", "e") // a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	e := &enclave{sockets: sockets{dir}, secret: vsock.NewSecret(), module: nsmtest.New(t), images: imagetest.Content{}}
	served := New(Config{
		Guest: e.sockets, Children: process.NewChildren(), Self: self, Dir: t.TempDir(), Memory: 64 << 20,
		OpenModule: func(func(context.Context) (net.Conn, error)) (nsm.Provider, error) {
			return nsm.NewDevelopment(e.module.Dial), nil
		},
	})
	host, guest := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		channel.ServeEnclave(guest, func(r grpc.ServiceRegistrar) { channel.RegisterEnclaveServer(r, served) })
	}()
	conn, _, err := channel.NewClient(host)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", e.host(contentPort))
	if err != nil {
		t.Fatal(err)
	}
	content := &http.Server{Handler: http.HandlerFunc(e.content)}
	go content.Serve(e.secret.Listen(l, contentPort))
	t.Cleanup(func() {
		conn.Close()
		<-done
		content.Close()
		if v := served.vault; v != nil {
			v.Close()
		}
	})
	e.EnclaveClient, e.served = channel.NewEnclaveClient(conn), served
	return e
}

func (e *enclave) content(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, ok := e.images[r.URL.Path]
	if !ok {
		http.Error(w, "no such image", http.StatusNotFound)
		return
	}
	if e.broken && strings.HasPrefix(r.URL.Path, "/blobs/") {
		b = bytes.Clone(b)
		b[len(b)-1] ^= 1
	}
	w.Write(b)
}

// addImage serves an image with the app and returns its digest.
func (e *enclave) addImage(t *testing.T, config map[string]any) string {
	t.Helper()
	return e.addImageOf(t, app, config)
}

// addImageOf serves an image with one program, /app.
func (e *enclave) addImageOf(t *testing.T, program []byte, config map[string]any) string {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.images.Add(t, program, config)
}

func (e *enclave) configure(t *testing.T, m *workload.Manifest) {
	t.Helper()
	m.APIVersion = workload.APIVersion
	b, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	r, err := e.Configure(t.Context(), &channel.ConfigureRequest{Manifest: b, Secret: e.secret, Ports: &channel.HostPorts{Content: contentPort}})
	if err != nil || len(r.GetDocument()) == 0 {
		t.Fatalf("Configure: %v", err)
	}
}

// result is what a run tells.
type result struct {
	stdout, stderr string
	failures       []string
	started        bool
	exited         *channel.Exited
}

// follow runs the workload; on is called after each event and may be nil.
func (e *enclave) follow(t *testing.T, on func(*result, *channel.RunEvent)) *result {
	t.Helper()
	return e.followRun(t, &channel.RunRequest{}, on)
}

func (e *enclave) followRun(t *testing.T, request *channel.RunRequest, on func(*result, *channel.RunEvent)) *result {
	t.Helper()
	s, err := e.Run(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	var r result
	for {
		ev, err := s.Recv()
		if err == io.EOF {
			if r.exited == nil {
				t.Fatal("the run ended without an exit")
			}
			return &r
		}
		if err != nil {
			t.Fatal(err)
		}
		if r.exited != nil {
			t.Errorf("%v after the exit", ev)
		}
		switch ev := ev.Event.(type) {
		case *channel.RunEvent_Progress:
			if ev.Progress.Error != "" {
				r.failures = append(r.failures, ev.Progress.Error)
			}
		case *channel.RunEvent_Output:
			if ev.Output.Stream == channel.Output_STREAM_STDOUT {
				r.stdout += string(ev.Output.Data)
			} else {
				r.stderr += string(ev.Output.Data)
			}
		case *channel.RunEvent_Started:
			r.started = true
		case *channel.RunEvent_Exited:
			r.exited = ev.Exited
		}
		if on != nil {
			on(&r, ev)
		}
	}
}

func (r *result) check(t *testing.T, code int32, message string) {
	t.Helper()
	if r.exited.Code != code || !strings.Contains(r.exited.Message, message) || (message == "") != (r.exited.Message == "") {
		t.Errorf("exited with %d, %q, want %d, %q", r.exited.Code, r.exited.Message, code, message)
	}
}

func cmdConfig(args ...string) map[string]any {
	return map[string]any{"Entrypoint": append([]string{"/app"}, args...)}
}

func TestRun(t *testing.T) {
	tests := map[string]struct {
		manifest workload.Manifest
		args     []string
		code     int32
		message  string
		started  bool
	}{
		"success":     {workload.Manifest{}, []string{"exit", "0"}, 0, "", true},
		"status":      {workload.Manifest{}, []string{"exit", "7"}, 7, "", true},
		"not found":   {workload.Manifest{Command: []string{"/nowhere"}}, nil, 127, "/nowhere", false},
		"not started": {workload.Manifest{User: &workload.User{NonRoot: true}}, []string{"exit", "0"}, 125, "runAsNonRoot", false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			e := newEnclave(t)
			test.manifest.Image.Digest = e.addImage(t, cmdConfig(test.args...))
			e.configure(t, &test.manifest)
			r := e.follow(t, nil)
			r.check(t, test.code, test.message)
			if r.started != test.started {
				t.Errorf("started is %v", r.started)
			}
			if s, err := e.Run(t.Context(), &channel.RunRequest{}); err == nil {
				if _, err = s.Recv(); status.Code(err) != codes.FailedPrecondition {
					t.Errorf("a second run: %v", err)
				}
			}
			if _, err := e.Stop(t.Context(), &channel.StopRequest{GraceMs: 60_000, DrainMs: 60_000}); err != nil {
				t.Errorf("Stop after the end: %v", err)
			}
		})
	}
}

func TestOutputBeforeExit(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig("flood", "4194304"))}})
	r := e.follow(t, nil)
	r.check(t, 0, "")
	if want := strings.Repeat(strings.Repeat("x", 1023)+"\n", 4096); r.stdout != want || r.stderr != "the last word" {
		t.Errorf("got %d bytes and %q", len(r.stdout), r.stderr)
	}
}

func TestConfigure(t *testing.T) {
	e := newEnclave(t)
	m := &workload.Manifest{APIVersion: workload.APIVersion, Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))}}
	good, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	ports := &channel.HostPorts{Content: contentPort}
	for name, r := range map[string]*channel.ConfigureRequest{
		"not canonical": {Manifest: append([]byte(" "), good...), Secret: e.secret, Ports: ports},
		"no manifest":   {Secret: e.secret, Ports: ports},
		"short secret":  {Manifest: good, Secret: e.secret[1:], Ports: ports},
		"no ports":      {Manifest: good, Secret: e.secret},
	} {
		if _, err := e.Configure(t.Context(), r); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	s, err := e.Run(t.Context(), &channel.RunRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.FailedPrecondition {
		t.Errorf("Run before Configure: %v", err)
	}
	e.configure(t, m)
	if _, err := e.Configure(t.Context(), &channel.ConfigureRequest{Manifest: good, Secret: e.secret, Ports: ports}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a second Configure: %v", err)
	}
	e.follow(t, nil).check(t, 0, "")
}

func (e *enclave) stopLater(t *testing.T, drain, grace time.Duration) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := e.Stop(t.Context(), &channel.StopRequest{DrainMs: uint32(drain.Milliseconds()), GraceMs: uint32(grace.Milliseconds())})
		done <- err
	}()
	return done
}

func TestStop(t *testing.T) {
	tests := map[string]struct {
		args    []string
		signal  string
		grace   time.Duration
		stdout  string
		code    int32
		message string
	}{
		"by signal":       {[]string{"stop"}, "", time.Minute, "ready\ngot terminated\n", 3, ""},
		"image's signal":  {[]string{"stop"}, "SIGUSR1", time.Minute, "ready\ngot user defined signal 1\n", 3, ""},
		"killed at last":  {[]string{"deaf"}, "", 50 * time.Millisecond, "ready\n", 137, "did not end within 50ms"},
		"killed, no time": {[]string{"deaf"}, "", 0, "ready\n", 137, "did not end within 0s"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			e := newEnclave(t)
			config := cmdConfig(test.args...)
			config["StopSignal"] = test.signal
			e.configure(t, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, config)}})
			var stopped <-chan error
			r := e.follow(t, func(r *result, _ *channel.RunEvent) {
				if stopped == nil && r.started && r.stdout == "ready\n" {
					stopped = e.stopLater(t, 10*time.Millisecond, test.grace)
				}
			})
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			r.check(t, test.code, test.message)
			if r.stdout != test.stdout {
				t.Errorf("stdout %q, want %q", r.stdout, test.stdout)
			}
		})
	}
}

// TestBrokenImage: nothing of an image with a wrong byte runs, the run says why and tries on until it
// is stopped.
func TestBrokenImage(t *testing.T) {
	t.Run("stopped", func(t *testing.T) {
		e := newEnclave(t)
		e.broken = true
		e.configure(t, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))}})
		var stopped <-chan error
		r := e.follow(t, func(r *result, _ *channel.RunEvent) {
			if stopped == nil && len(r.failures) > 0 {
				stopped = e.stopLater(t, time.Minute, time.Minute)
			}
		})
		if err := <-stopped; err != nil {
			t.Error(err)
		}
		r.check(t, 143, "stopped before")
		if r.started || !strings.Contains(r.failures[0], "came with other bytes") {
			t.Errorf("got %+v", r)
		}
	})
	t.Run("not found, then something else", func(t *testing.T) {
		e := newEnclave(t)
		e.configure(t, &workload.Manifest{Image: workload.Image{Digest: "sha256:" + strings.Repeat("0", 64)}})
		r := e.follow(t, func(r *result, _ *channel.RunEvent) {
			if len(r.failures) == 1 {
				e.mu.Lock()
				// Not what was asked for either, so it must be refused too.
				e.images["/manifests/sha256:"+strings.Repeat("0", 64)] = []byte("{}")
				e.mu.Unlock()
			}
			if len(r.failures) == 2 {
				e.stopLater(t, 0, 0)
			}
		})
		if len(r.failures) < 2 || !strings.Contains(r.failures[0], "no such image (status 404)") || !strings.Contains(r.failures[1], "other bytes") {
			t.Errorf("failures %q", r.failures)
		}
		r.check(t, 143, "stopped before")
	})
}

func freePort(t *testing.T) uint32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

func TestServeAndProbe(t *testing.T) {
	e := newEnclave(t)
	port := freePort(t)
	e.configure(t, &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, cmdConfig("serve", strconv.Itoa(int(port)), "204 No Content"))},
		Ports: []workload.Port{{Port: port}},
		Env:   []workload.EnvVar{{Name: "CODE", Value: "5"}},
		Probes: &workload.Probes{
			Startup:   &workload.Probe{HTTP: &workload.HTTPGet{Port: port}},
			Liveness:  &workload.Probe{Exec: &workload.Exec{Command: []string{"/app", "exit", "$(CODE)"}}},
			Readiness: &workload.Probe{Exec: &workload.Exec{Command: []string{"/app", "sleep"}}},
		},
	})
	probe := func(kind channel.ProbeKind, timeout, age time.Duration) *channel.ProbeResponse {
		t.Helper()
		r, err := e.Probe(t.Context(), &channel.ProbeRequest{Kind: kind, TimeoutMs: uint32(timeout.Milliseconds()), MaxAgeMs: uint32(age.Milliseconds())})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	expect := func(r *channel.ProbeResponse, ok bool, message string) {
		t.Helper()
		if r.Ok != ok || r.Message != message {
			t.Errorf("probe: %v, %q, want %v, %q", r.Ok, r.Message, ok, message)
		}
	}
	startup, liveness, readiness := channel.ProbeKind_PROBE_KIND_STARTUP, channel.ProbeKind_PROBE_KIND_LIVENESS, channel.ProbeKind_PROBE_KIND_READINESS
	expect(probe(startup, time.Second, 0), false, "the workload has not been started")

	done := false
	r := e.follow(t, func(r *result, _ *channel.RunEvent) {
		if done || !r.started || r.stdout != "serving\n" {
			return
		}
		done = true
		expect(probe(startup, 10*time.Second, 0), true, "")
		expect(probe(liveness, 10*time.Second, 0), false, "exec probe: the command ended with status 5")
		expect(probe(readiness, 50*time.Millisecond, 0), false, "exec probe: no answer within 50ms")
		// Young enough: no command runs, so that no time passes.
		expect(probe(readiness, 50*time.Millisecond, time.Hour), false, "exec probe: no answer within 50ms")
		// With more time it might have succeeded.
		expect(probe(readiness, 60*time.Millisecond, time.Hour), false, "exec probe: no answer within 60ms")

		tlsConn := e.dialTLS(t, port)
		fmt.Fprintf(tlsConn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if b, err := io.ReadAll(tlsConn); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 204") {
			t.Errorf("answer %q, %v", b, err)
		}
		stats, err := e.Stats(t.Context(), &channel.StatsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		// The probes went to the workload past the gateway.
		if stats.RequestsTotal != 1 || stats.MemoryUsed == 0 || stats.MemoryTotal == 0 || stats.CpuSeconds == 0 || stats.NsmCallsTotal == 0 {
			t.Errorf("stats: %v", stats)
		}
		e.stopLater(t, 0, 0)
	})
	r.check(t, 137, "killed")
	expect(probe(startup, time.Second, time.Hour), false, "the workload has ended")
	if _, err := e.Probe(t.Context(), &channel.ProbeRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a probe of no kind: %v", err)
	}
}

// dialTLS comes as a client through the sidecar; what the certificate proves is tested elsewhere.
func (e *enclave) dialTLS(t *testing.T, port uint32) net.Conn {
	t.Helper()
	c, err := e.secret.Dial(t.Context(), port, func(ctx context.Context, port uint32) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", e.guest(port))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"cloister/1", "http/1.1"}})
}

// TestRunLeft: a run that nobody follows kills its workload.
func TestRunLeft(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig("sleep"))}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s, err := e.Run(ctx, &channel.RunRequest{})
	for err == nil {
		var ev *channel.RunEvent
		if ev, err = s.Recv(); ev.GetStarted() != nil {
			cancel()
		}
	}
	// Stop returns when the workload has ended, and does not end it itself before the hour is over.
	if _, err := e.Stop(t.Context(), &channel.StopRequest{DrainMs: 3_600_000}); err != nil {
		t.Error(err)
	}
}

func TestModuleOf(t *testing.T) {
	tests := map[string]string{
		"":                                     "device",
		"console=ttyS0 panic=-1":               "device",
		"a cloister.nsm=dev b\n":               "dev",
		"cloister.nsm=device":                  "device",
		"cloister.nsm=":                        "",
		"cloister.nsm=none":                    "",
		"cloister.nsm=dev cloister.nsm=dev":    "",
		"cloister.nsm=device cloister.nsm=dev": "",
	}
	for cmdline, want := range tests {
		got, err := moduleOf(cmdline)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("moduleOf(%q) = %q, %v, want %q", cmdline, got, err, want)
		}
	}
}

func TestMemAvailable(t *testing.T) {
	for meminfo, want := range map[string]int64{
		"MemTotal: 100 kB\nMemAvailable:   12345 kB\n": 12345 << 10,
		"MemTotal: 100 kB\n":                           0,
		"MemAvailable: x kB\n":                         0,
	} {
		got, err := memAvailable(meminfo)
		if got != want || (err != nil) != (want == 0) {
			t.Errorf("memAvailable(%q) = %d, %v, want %d", meminfo, got, err, want)
		}
	}
}

func TestModuleParameters(t *testing.T) {
	const cmdline = "console=ttyS0 virtio_mmio.device=512@0xfeb00e00:12 nsm.x=1 virtio_mmio.device=512@0xfeb00c00:11 cloister.nsm=dev"
	for file, want := range map[string]string{
		"00-virtio_mmio.ko": "device=512@0xfeb00e00:12 device=512@0xfeb00c00:11",
		"04-nsm.ko":         "x=1",
		"01-vsock.ko":       "",
	} {
		if got := moduleParameters(file, cmdline); got != want {
			t.Errorf("moduleParameters(%q) = %q, want %q", file, got, want)
		}
	}
}
