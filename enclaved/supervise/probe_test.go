package supervise

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

func TestHTTPProbe(t *testing.T) {
	var recorded atomic.Pointer[http.Request]
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/slow" { // whose handler may come to run when its probe has given up
			recorded.Store(r)
		}
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, "http://elsewhere.invalid/", http.StatusFound)
		case "/on":
			http.Redirect(w, r, "/500", http.StatusFound)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/nowhere":
			w.Header().Set("Location", "http://%secret words")
			w.WriteHeader(http.StatusFound)
		case "/greeting":
			c, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(c, "220 secret words\r\n")
			c.Close()
		case "/slow":
			<-r.Context().Done()
		default:
			if code, err := strconv.Atoi(r.URL.Path[1:]); err == nil {
				w.WriteHeader(code)
			}
			w.Write([]byte("secret words of the workload"))
		}
	})
	plain, secure := httptest.NewServer(handler), httptest.NewTLSServer(handler)
	defer plain.Close()
	defer secure.Close()
	port := func(s *httptest.Server) uint32 { return uint32(s.Listener.Addr().(*net.TCPAddr).Port) }
	closed := freePort(t)

	tests := map[string]struct {
		probe workload.HTTPGet
		err   string
	}{
		"root":                  {workload.HTTPGet{Port: port(plain)}, ""},
		"200":                   {workload.HTTPGet{Port: port(plain), Path: "/200"}, ""},
		"399":                   {workload.HTTPGet{Port: port(plain), Path: "/399"}, ""},
		"400":                   {workload.HTTPGet{Port: port(plain), Path: "/400"}, "http probe: status 400"},
		"503":                   {workload.HTTPGet{Port: port(plain), Path: "/503?x=y"}, "http probe: status 503"},
		"https":                 {workload.HTTPGet{Port: port(secure), Path: "/200", Scheme: "HTTPS"}, ""},
		"http to https":         {workload.HTTPGet{Port: port(secure), Path: "/200"}, "http probe: status 400"},
		"https to http":         {workload.HTTPGet{Port: port(plain), Path: "/200", Scheme: "HTTPS"}, "no valid answer"},
		"redirect elsewhere":    {workload.HTTPGet{Port: port(plain), Path: "/away"}, ""},
		"redirect here":         {workload.HTTPGet{Port: port(plain), Path: "/on"}, "http probe: status 500"},
		"redirect for ever":     {workload.HTTPGet{Port: port(plain), Path: "/loop"}, "stopped after 10 redirects"},
		"redirect nowhere":      {workload.HTTPGet{Port: port(plain), Path: "/nowhere"}, "no valid answer"},
		"another protocol":      {workload.HTTPGet{Port: port(plain), Path: "/greeting"}, "no valid answer"},
		"nobody listens":        {workload.HTTPGet{Port: closed}, "connection refused"},
		"takes too long":        {workload.HTTPGet{Port: port(plain), Path: "/slow"}, "http probe: too long"},
		"a path that is no URL": {workload.HTTPGet{Port: port(plain), Path: "/%zz"}, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			timeout := 10 * time.Second
			if test.probe.Path == "/slow" {
				timeout = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), timeout, errors.New("too long"))
			defer cancel()
			err := (&probe{spec: &workload.Probe{HTTP: &test.probe}}).run(ctx, nil)
			if (err != nil) != (test.err != "") || (err != nil && !strings.Contains(err.Error(), test.err)) {
				t.Errorf("got %v, want %q", err, test.err)
			}
			if err != nil && strings.Contains(err.Error(), "secret words") {
				t.Errorf("%v has words of the workload", err)
			}
		})
	}

	headers := []workload.Header{{Name: "host", Value: "example.org"}, {Name: "Host", Value: "not the first"}, {Name: "X-A", Value: "1"}, {Name: "X-A", Value: "2"}, {Name: "accept", Value: ""}}
	if err := runHTTP(t.Context(), &workload.HTTPGet{Port: port(plain), Path: "/200?a=b", Headers: headers}, "kube-probe", true); err != nil {
		t.Fatal(err)
	}
	last := recorded.Load()
	if last.Host != "example.org" || strings.Join(last.Header["X-A"], ",") != "1,2" || last.Header.Get("User-Agent") != "kube-probe/cloister" ||
		last.Header.Get("Accept") != "" || last.URL.RawQuery != "a=b" || last.Method != http.MethodGet {
		t.Errorf("request %v %v", last.Host, last.Header)
	}
	err := runHTTP(t.Context(), &workload.HTTPGet{Port: port(plain)}, "kube-probe", true)
	if last = recorded.Load(); err != nil || last.Header.Get("Accept") != "*/*" || last.URL.Path != "/" {
		t.Errorf("request %v, %v", last.Header, err)
	}
}

// TestTCPAndGRPCProbe asks servers of this process.
func TestTCPAndGRPCProbe(t *testing.T) {
	serve := func(register func(*grpc.Server)) uint32 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer()
		register(s)
		go s.Serve(l)
		t.Cleanup(s.Stop)
		return uint32(l.Addr().(*net.TCPAddr).Port)
	}
	healthy := serve(func(s *grpc.Server) {
		h := health.NewServer()
		h.SetServingStatus("db", healthpb.HealthCheckResponse_NOT_SERVING)
		h.SetServingStatus("odd", 77)
		healthpb.RegisterHealthServer(s, h)
	})
	none := serve(func(*grpc.Server) {})
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	other := uint32(plain.Listener.Addr().(*net.TCPAddr).Port)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	mute := uint32(silent.Addr().(*net.TCPAddr).Port)
	closed := freePort(t)

	for name, test := range map[string]struct {
		probe workload.Probe
		err   string
	}{
		"tcp":                   {workload.Probe{TCP: &workload.TCP{Port: mute}}, ""},
		"tcp, nobody listens":   {workload.Probe{TCP: &workload.TCP{Port: closed}}, "tcp probe: dial tcp 127.0.0.1:"},
		"grpc":                  {workload.Probe{GRPC: &workload.GRPC{Port: healthy}}, ""},
		"grpc, one service":     {workload.Probe{GRPC: &workload.GRPC{Port: healthy, Service: "db"}}, "grpc probe: the health service says NOT_SERVING"},
		"grpc, unknown service": {workload.Probe{GRPC: &workload.GRPC{Port: healthy, Service: "other"}}, "grpc probe: the health service answers with status NotFound"},
		"grpc, unknown status":  {workload.Probe{GRPC: &workload.GRPC{Port: healthy, Service: "odd"}}, "grpc probe: the health service says something else than SERVING"},
		"grpc, no health":       {workload.Probe{GRPC: &workload.GRPC{Port: none}}, "grpc probe: the server has no health service"},
		"grpc, another server":  {workload.Probe{GRPC: &workload.GRPC{Port: other}}, "grpc probe: the health service answers with status Unavailable"},
		"grpc, nobody listens":  {workload.Probe{GRPC: &workload.GRPC{Port: closed}}, "grpc probe: dial tcp 127.0.0.1:"},
		"grpc, no answer":       {workload.Probe{GRPC: &workload.GRPC{Port: mute}}, "grpc probe: too long"},
	} {
		t.Run(name, func(t *testing.T) {
			timeout := 10 * time.Second
			if name == "grpc, no answer" {
				timeout = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), timeout, errors.New("too long"))
			defer cancel()
			err := (&probe{spec: &test.probe}).run(ctx, nil)
			if (err != nil) != (test.err != "") || (err != nil && !strings.HasPrefix(err.Error(), test.err)) {
				t.Errorf("got %v, want %q", err, test.err)
			}
		})
	}
}

// TestHeldProbe: a stranger whose run hangs, with all the time that there is, does not hold up the kubelet's, and
// its end is no answer for the kubelet.
func TestHeldProbe(t *testing.T) {
	hung := make(chan struct{})
	var calls atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if calls.Add(1) == 1 {
			close(hung)
			<-r.Context().Done()
		}
	}))
	defer server.Close()
	kind := channel.ProbeKind_PROBE_KIND_LIVENESS
	p := newProbe(&workload.Probe{HTTP: &workload.HTTPGet{Port: uint32(server.Listener.Addr().(*net.TCPAddr).Port)}})
	e := &Enclave{probes: map[channel.ProbeKind]*probe{kind: p}, process: &process.Process{}}
	ask := func(ctx context.Context, timeout, age time.Duration) (*channel.ProbeResponse, error) {
		return e.Probe(ctx, &channel.ProbeRequest{Kind: kind, TimeoutMs: uint32(timeout.Milliseconds()), MaxAgeMs: uint32(age.Milliseconds())})
	}
	stranger, leave := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, err := ask(stranger, 24*time.Hour, 0)
		left <- err
	}()
	<-hung
	for _, timeout := range []time.Duration{time.Second, 10 * time.Second, channel.MaxProbeTimeout / 2} {
		if r, err := ask(t.Context(), timeout, 0); err != nil || !r.GetOk() {
			t.Errorf("with %s: %v, %v", timeout, r, err)
		}
	}
	// Who asks for as long as the stranger waits for its turn.
	waiting, giveUp := context.WithCancel(t.Context())
	giveUp()
	if r, err := ask(waiting, channel.MaxProbeTimeout, 0); err == nil {
		t.Errorf("two runs of one kind: %v", r)
	}
	leave()
	if err := <-left; err == nil {
		t.Error("the stranger got an answer")
	}

	p.keep(&channel.ProbeResponse{Message: "no answer within 5m0s"}, time.Now().Add(-channel.MaxProbeTimeout), channel.MaxProbeTimeout)
	if r := p.kept(time.Second, 5*time.Second); r != nil {
		t.Errorf("what began 5 minutes ago counts as %v", r)
	}
	if r := p.kept(time.Second, time.Hour); r == nil {
		t.Error("no failure is kept")
	}
}

func TestProbesOf(t *testing.T) {
	p := &workload.Probe{Exec: &workload.Exec{Command: []string{"x"}}}
	if got := probesOf(&workload.Manifest{Probes: &workload.Probes{Liveness: p}}); len(got) != 1 || got[channel.ProbeKind_PROBE_KIND_LIVENESS] != p {
		t.Errorf("got %v", got)
	}
	if got := probesOf(&workload.Manifest{}); len(got) != 0 {
		t.Errorf("got %v", got)
	}
}
