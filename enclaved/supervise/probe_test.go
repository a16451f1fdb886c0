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
		probe workload.HTTPProbe
		err   string
	}{
		"root":                  {workload.HTTPProbe{Port: port(plain)}, ""},
		"200":                   {workload.HTTPProbe{Port: port(plain), Path: "/200"}, ""},
		"399":                   {workload.HTTPProbe{Port: port(plain), Path: "/399"}, ""},
		"400":                   {workload.HTTPProbe{Port: port(plain), Path: "/400"}, "http probe: status 400"},
		"503":                   {workload.HTTPProbe{Port: port(plain), Path: "/503?x=y"}, "http probe: status 503"},
		"https":                 {workload.HTTPProbe{Port: port(secure), Path: "/200", Scheme: "HTTPS"}, ""},
		"http to https":         {workload.HTTPProbe{Port: port(secure), Path: "/200"}, "http probe: status 400"},
		"https to http":         {workload.HTTPProbe{Port: port(plain), Path: "/200", Scheme: "HTTPS"}, "no valid answer"},
		"redirect elsewhere":    {workload.HTTPProbe{Port: port(plain), Path: "/away"}, ""},
		"redirect here":         {workload.HTTPProbe{Port: port(plain), Path: "/on"}, "http probe: status 500"},
		"redirect for ever":     {workload.HTTPProbe{Port: port(plain), Path: "/loop"}, "stopped after 10 redirects"},
		"redirect nowhere":      {workload.HTTPProbe{Port: port(plain), Path: "/nowhere"}, "no valid answer"},
		"another protocol":      {workload.HTTPProbe{Port: port(plain), Path: "/greeting"}, "no valid answer"},
		"nobody listens":        {workload.HTTPProbe{Port: closed}, "connection refused"},
		"takes too long":        {workload.HTTPProbe{Port: port(plain), Path: "/slow"}, "http probe: too long"},
		"a path that is no URL": {workload.HTTPProbe{Port: port(plain), Path: "/%zz"}, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			timeout := 10 * time.Second
			if test.probe.Path == "/slow" {
				timeout = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeoutCause(t.Context(), timeout, errors.New("too long"))
			defer cancel()
			err := runHTTP(ctx, &test.probe)
			if (err != nil) != (test.err != "") || (err != nil && !strings.Contains(err.Error(), test.err)) {
				t.Errorf("got %v, want %q", err, test.err)
			}
			if err != nil && strings.Contains(err.Error(), "secret words") {
				t.Errorf("%v has words of the workload", err)
			}
		})
	}

	headers := []workload.Header{{Name: "host", Value: "example.org"}, {Name: "X-A", Value: "1"}, {Name: "X-A", Value: "2"}, {Name: "accept", Value: ""}}
	if err := runHTTP(t.Context(), &workload.HTTPProbe{Port: port(plain), Path: "/200?a=b", Headers: headers}); err != nil {
		t.Fatal(err)
	}
	last := recorded.Load()
	if last.Host != "example.org" || strings.Join(last.Header["X-A"], ",") != "1,2" || last.Header.Get("User-Agent") != userAgent ||
		last.Header.Get("Accept") != "" || last.URL.RawQuery != "a=b" || last.Method != http.MethodGet {
		t.Errorf("request %v %v", last.Host, last.Header)
	}
	err := runHTTP(t.Context(), &workload.HTTPProbe{Port: port(plain)})
	if last = recorded.Load(); err != nil || last.Header.Get("Accept") != "*/*" || last.URL.Path != "/" {
		t.Errorf("request %v, %v", last.Header, err)
	}
}

func TestProbesOf(t *testing.T) {
	p := &workload.Probe{Exec: &workload.ExecProbe{Command: []string{"x"}}}
	if got := probesOf(&workload.Manifest{Probes: &workload.Probes{Liveness: p}}); len(got) != 1 || got[channel.ProbeKind_PROBE_KIND_LIVENESS] != p {
		t.Errorf("got %v", got)
	}
	if got := probesOf(&workload.Manifest{}); len(got) != 0 {
		t.Errorf("got %v", got)
	}
}
