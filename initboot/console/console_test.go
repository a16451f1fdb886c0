package console

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"cloister.dev/cloister/initboot/boot"
	"cloister.dev/cloister/initboot/driver/drivertest"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/workload"
)

// initboot is what the console talks to: the real server, with enclaves in this process.
type initboot struct {
	driver *drivertest.Driver
	socket string
	cfg    boot.Config
	kill   context.CancelFunc
	done   chan struct{}
}

func newInitboot(t *testing.T, w drivertest.Workload) *initboot {
	t.Helper()
	m := &workload.Manifest{
		APIVersion: workload.APIVersion,
		Image:      workload.Image{Digest: "sha256:" + strings.Repeat("0", 64)},
		Ports:      []workload.Port{{Port: 80}},
		Probes: &workload.Probes{
			Liveness:  &workload.Probe{HTTP: &workload.HTTPGet{Port: 80}},
			Readiness: &workload.Probe{HTTP: &workload.HTTPGet{Port: 80}},
		},
	}
	canonical, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	i := &initboot{driver: drivertest.New(t, w), socket: filepath.Join(drivertest.Dir(t), "pod.sock")}
	i.cfg = boot.Config{
		Manifest: canonical, Workload: m,
		EIF: drivertest.WriteEIF(t, "quiet"), Memory: 1 << 20, Driver: i.driver,
		Content: http.NotFoundHandler(),
		Log:     slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	return i
}

// start serves until kill is called, or the test ends.
func (i *initboot) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", i.socket)
	if err != nil {
		t.Error(err)
		return
	}
	machine := boot.New(i.cfg)
	server := grpc.NewServer(grpc.MaxRecvMsgSize(channel.MaxMessage))
	podsock.RegisterPodServer(server, machine)
	ctx, cancel := context.WithCancel(context.Background())
	context.AfterFunc(ctx, server.Stop)
	go server.Serve(l)
	done := make(chan struct{})
	go func() {
		defer close(done)
		machine.Serve(ctx)
	}()
	i.kill, i.done = cancel, done
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// running is a console under way.
type running struct {
	*Console
	stdout, stderr bytes.Buffer
	stop           context.CancelFunc // SIGTERM
	result         chan result
}

type result struct {
	code int
	LastWord
}

func (i *initboot) console(t *testing.T, grace time.Duration) *running {
	t.Helper()
	return i.consoleWith(t, grace, Supplied{})
}

func (i *initboot) consoleWith(t *testing.T, grace time.Duration, supplied Supplied) *running {
	t.Helper()
	conn, err := podsock.Dial(i.socket)
	if err != nil {
		t.Fatal(err)
	}
	r := &running{result: make(chan result, 1)}
	r.Console = &Console{Pod: podsock.NewPodClient(conn), Stdout: &r.stdout, Stderr: &r.stderr, Grace: grace, Supplied: supplied}
	stop, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	t.Cleanup(func() {
		cancel()
		conn.Close()
	})
	go func() {
		code, last := r.Run(stop)
		r.result <- result{code, last}
	}()
	return r
}

func (r *running) wait(t *testing.T) result {
	t.Helper()
	select {
	case got := <-r.result:
		return got
	case <-time.After(20 * time.Second):
		t.Fatal("the console does not end")
		panic("unreachable")
	}
}

// until waits for a condition.
func until(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not within 20 s")
		}
	}
}

func hold(ctx context.Context, _ *drivertest.Enclave, send func(*channel.RunEvent) error) *channel.Exited {
	send(drivertest.Started())
	<-ctx.Done()
	send(drivertest.Output(channel.Output_STREAM_STDOUT, "bye"))
	return &channel.Exited{Code: 3}
}

func (r *running) started() bool { _, ok := r.running(); return ok }

func TestOutputAndCode(t *testing.T) {
	i := newInitboot(t, func(_ context.Context, _ *drivertest.Enclave, send func(*channel.RunEvent) error) *channel.Exited {
		send(drivertest.Started())
		for range 1000 {
			send(drivertest.Output(channel.Output_STREAM_STDOUT, "a\x00\xff\r\n"))
			send(drivertest.Output(channel.Output_STREAM_STDERR, "no newline"))
		}
		return &channel.Exited{Code: 7, Message: "so be it"}
	})
	i.start(t)
	r := i.console(t, 30*time.Second)
	if got := r.wait(t); got != (result{7, LastWord{Message: "so be it"}}) {
		t.Errorf("got %v", got)
	}
	if r.stdout.String() != strings.Repeat("a\x00\xff\r\n", 1000) || r.stderr.String() != strings.Repeat("no newline", 1000) {
		t.Errorf("%d bytes of stdout, %d of stderr", r.stdout.Len(), r.stderr.Len())
	}
}

func TestEnclaveLost(t *testing.T) {
	i := newInitboot(t, hold)
	i.start(t)
	r := i.console(t, 30*time.Second)
	until(t, r.started)
	i.driver.Last().Kill("PID 1 was killed")
	if got := r.wait(t); got != (result{ExitLost, LastWord{Message: "the enclave was lost: PID 1 was killed"}}) {
		t.Errorf("got %v", got)
	}
	// The kubelet starts another console.
	r = i.console(t, 30*time.Second)
	until(t, r.started)
	r.stop()
	if got := r.wait(t); got.code != 3 {
		t.Errorf("the next run: %v", got)
	}
}

func TestInitbootDies(t *testing.T) {
	i := newInitboot(t, hold)
	i.start(t)
	r := i.console(t, 30*time.Second)
	until(t, r.started)
	i.kill()
	if got := r.wait(t); got.code != ExitLost || got.Message == "" {
		t.Errorf("got %v", got)
	}
}

func TestWaitsForInitboot(t *testing.T) {
	i := newInitboot(t, hold)
	r := i.console(t, 30*time.Second)
	until(t, func() bool { // at least one try has failed
		_, err := r.Pod.Probe(t.Context(), &channel.ProbeRequest{})
		return err != nil
	})
	i.start(t)
	until(t, r.started)
	r.stop()
	if got := r.wait(t); got.code != 3 || r.stdout.String() != "bye" {
		t.Errorf("got %v, %q", got, r.stdout.String())
	}
}

func TestStop(t *testing.T) {
	i := newInitboot(t, hold)
	i.start(t)
	r := i.console(t, 30*time.Second)
	until(t, r.started)
	e := i.driver.Last()
	r.stop()
	if got := r.wait(t); got != (result{code: 3}) || r.stdout.String() != "bye" {
		t.Errorf("got %v, %q", got, r.stdout.String())
	}
	stops := e.Stops()
	if len(stops) != 1 || stops[0].GetDrainMs() != 10_000 || stops[0].GetGraceMs() != 18_000 {
		t.Errorf("stops: %v", stops)
	}
}

// TestProbeGrace: a probe that has failed may be why the console is stopped, and how long it may take then.
func TestProbeGrace(t *testing.T) {
	failing := map[channel.ProbeKind]bool{}
	for name, test := range map[string]struct {
		failing map[channel.ProbeKind]bool
		grace   map[channel.ProbeKind]time.Duration
		want    time.Duration
	}{
		"none of its own":  {failing, nil, 30 * time.Second},
		"all is well":      {failing, map[channel.ProbeKind]time.Duration{liveness: 6 * time.Second}, 30 * time.Second},
		"liveness failed":  {map[channel.ProbeKind]bool{liveness: true}, map[channel.ProbeKind]time.Duration{liveness: 6 * time.Second}, 6 * time.Second},
		"longer is no use": {map[channel.ProbeKind]bool{liveness: true}, map[channel.ProbeKind]time.Duration{liveness: time.Minute}, 30 * time.Second},
		"both failed":      {map[channel.ProbeKind]bool{liveness: true, startup: true}, map[channel.ProbeKind]time.Duration{liveness: 9 * time.Second, startup: 6 * time.Second}, 6 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			i := newInitboot(t, hold)
			i.cfg.Workload.Probes.Startup = i.cfg.Workload.Probes.Liveness
			i.driver.Probe = func(r *channel.ProbeRequest) *channel.ProbeResponse {
				return &channel.ProbeResponse{Ok: !test.failing[r.GetKind()]}
			}
			i.start(t)
			r := i.console(t, 30*time.Second)
			r.ProbeGrace = test.grace
			until(t, r.started)
			e := i.driver.Last()
			r.stop()
			r.wait(t)
			stops := e.Stops()
			if len(stops) != 1 || time.Duration(stops[0].GetDrainMs())*time.Millisecond != test.want/3 {
				t.Errorf("stops: %v, want a third of %s", stops, test.want)
			}
		})
	}
}

const (
	startup  = channel.ProbeKind_PROBE_KIND_STARTUP
	liveness = channel.ProbeKind_PROBE_KIND_LIVENESS
)

func TestLastWord(t *testing.T) {
	for name, test := range map[string]struct {
		last LastWord
		want string
	}{
		"nothing":      {LastWord{}, ""},
		"ours":         {LastWord{Message: "lost"}, "lost\n"},
		"theirs":       {LastWord{Workload: "out of\nmemory"}, "out of\nmemory"},
		"both":         {LastWord{Message: "killed", Workload: "busy"}, "killed\nbusy"},
		"too much":     {LastWord{Message: "killed", Workload: strings.Repeat("x", 5000) + "end"}, "killed\n" + strings.Repeat("x", 4096-7-3) + "end"},
		"a whole page": {LastWord{Message: strings.Repeat("x", 5000), Workload: "busy"}, strings.Repeat("x", 5000) + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "log")
			if err := test.last.Write(file); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(file)
			if (err != nil) != (test.want == "") || string(got) != test.want {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

func TestStopBeforeTheRun(t *testing.T) {
	for name, started := range map[string]bool{"initboot is not there": false, "the enclave does not boot": true} {
		t.Run(name, func(t *testing.T) {
			i := newInitboot(t, hold)
			i.driver.Boot = func(uint64) error { return io.ErrUnexpectedEOF }
			if started {
				i.start(t)
			}
			r := i.console(t, 30*time.Second)
			r.stop()
			if got := r.wait(t); got.code != 143 || !strings.Contains(got.Message, "before the workload was started") {
				t.Errorf("got %v", got)
			}
		})
	}
}

func TestOverdue(t *testing.T) {
	release := make(chan struct{})
	var once sync.Once
	free := func() { once.Do(func() { close(release) }) }
	i := newInitboot(t, func(_ context.Context, e *drivertest.Enclave, send func(*channel.RunEvent) error) *channel.Exited {
		send(drivertest.Started())
		<-release
		return &channel.Exited{}
	})
	i.start(t)
	t.Cleanup(free) // before initboot's, which waits for the enclave
	r := i.console(t, time.Second)
	until(t, r.started)
	begin := time.Now()
	r.stop()
	if got := r.wait(t); got.code != 137 || !strings.Contains(got.Message, "grace period") {
		t.Errorf("got %v", got)
	}
	if took := time.Since(begin); took > time.Second {
		t.Errorf("the console took %s of a grace period of 1 s", took)
	}
	free()
}

func TestProbes(t *testing.T) {
	var (
		mu    sync.Mutex
		asked []*channel.ProbeRequest
		ok    = true
	)
	proceed := make(chan struct{})
	i := newInitboot(t, func(ctx context.Context, e *drivertest.Enclave, send func(*channel.RunEvent) error) *channel.Exited {
		<-proceed
		return hold(ctx, e, send)
	})
	i.driver.Probe = func(r *channel.ProbeRequest) *channel.ProbeResponse {
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r)
		if !ok {
			return &channel.ProbeResponse{Message: "GET /ready: status 503"}
		}
		return &channel.ProbeResponse{Ok: true}
	}
	r := i.console(t, 30*time.Second)
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		r.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		return w.Code, strings.TrimSpace(w.Body.String())
	}
	check := func(when, path string, want int) {
		t.Helper()
		if code, body := get(path); code != want {
			t.Errorf("%s: GET %s: %d %q, want %d", when, path, code, body, want)
		}
	}
	check("without initboot", "/probe/liveness", 200)
	check("without initboot", "/probe/readiness", 503)
	i.start(t)
	until(t, func() bool { e := i.driver.Last(); return e != nil })
	check("before the start", "/probe/liveness", 200)
	check("before the start", "/probe/readiness", 503)
	close(proceed)
	until(t, r.started)
	check("within the delay", "/probe/liveness?delay=1h", 200)
	check("within the delay", "/probe/readiness?delay=1h", 503)
	if len(asked) != 0 {
		t.Errorf("the enclave was asked too early: %v", asked)
	}
	check("running", "/probe/liveness?timeout=3s&period=20s&delay=0s", 200)
	check("running", "/probe/readiness", 200)
	mu.Lock()
	ok = false
	mu.Unlock()
	check("broken", "/probe/liveness", 503)
	if code, body := get("/probe/readiness"); code != 503 || body != "GET /ready: status 503" {
		t.Errorf("broken: %d %q", code, body)
	}
	check("bad query", "/probe/liveness?timeout=soon", 400)
	check("bad query", "/probe/liveness?delay=-1s", 400)
	check("flood", "/probe/liveness?period=0s", 400)
	check("flood", "/probe/liveness?period=999ms", 400)
	check("flood", "/probe/readiness?timeout=1ms", 400)
	check("too long", "/probe/readiness?timeout=24h", 503)
	check("other", "/probe/exec", 404)
	if len(asked) != 5 || asked[4].GetTimeoutMs() != 300_000 || asked[0].GetKind() != channel.ProbeKind_PROBE_KIND_LIVENESS || asked[0].GetTimeoutMs() != 3000 || asked[0].GetMaxAgeMs() != 10_000 ||
		asked[1].GetKind() != channel.ProbeKind_PROBE_KIND_READINESS || asked[1].GetTimeoutMs() != 1000 || asked[1].GetMaxAgeMs() != 5000 {
		t.Errorf("the enclave was asked: %v", asked)
	}
	r.stop()
	r.wait(t)
	i.kill()
	<-i.done
	check("initboot is gone", "/probe/readiness", 503)
}
