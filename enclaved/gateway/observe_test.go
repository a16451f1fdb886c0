package gateway_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"cloister.dev/cloister/enclaved/gateway"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/workload"
)

// TestObserve: the hook sees what the workload gets, changes its header, and is told how it ended.
func TestObserve(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/status":
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusTeapot)
		case "/broken":
			panic(http.ErrAbortHandler)
		case "/upgrade":
			c, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
			c.Close()
		default:
			io.WriteString(w, r.Header.Get("Traceparent"))
		}
	}))
	closed := closedPort(t)
	type end struct {
		path   string
		status int
	}
	ended := make(chan end, 1)
	e := newEnclaveWith(t, nsmtest.New(t), gateway.Config{
		Manifest: &workload.Manifest{Ports: []workload.Port{{Port: port}, {Port: closed}}},
		Authorize: func(r *http.Request) *gateway.Verdict {
			if r.URL.Path == "/refused" {
				return &gateway.Verdict{Status: 401}
			}
			return &gateway.Verdict{}
		},
		Observe: func(r *http.Request, on uint32) func(int) {
			if on != port && on != closed {
				t.Errorf("seen on port %d", on)
			}
			r.Header.Set("Traceparent", "observed")
			path := r.URL.Path
			return func(status int) { ended <- end{path, status} }
		},
	})
	for _, http2 := range []bool{false, true} {
		client := e.client(t, port, http2)
		if _, body := get(t, client, url(port, "/")); body != "observed" {
			t.Errorf("the workload got the header %q", body)
		}
		want := func(path string, status int) {
			t.Helper()
			if got := <-ended; got != (end{path, status}) {
				t.Errorf("got %v, want %s to end with %d", got, path, status)
			}
		}
		want("/", 200)
		get(t, client, url(port, "/status"))
		want("/status", 418)
		get(t, client, url(port, "/broken"))
		want("/broken", 502)
		get(t, e.client(t, closed, http2), url(closed, "/nobody"))
		want("/nobody", 502)
		get(t, client, url(port, "/refused"))
		get(t, client, url(port, "/.well-known/cloister/attestation?nonce=00"))
	}
	c := e.dial(t, port, "http/1.1")
	io.WriteString(c, "GET /upgrade HTTP/1.1\r\nHost: app\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	answer := make([]byte, len("HTTP/1.1 101 "))
	if _, err := io.ReadFull(c, answer); err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 101 ") {
		t.Errorf("got %q, %v", answer, err)
	}
	c.Close() // it lives as long as both ends want
	if got := <-ended; got != (end{"/upgrade", 101}) {
		t.Errorf("got %v", got)
	}
	select {
	case got := <-ended:
		t.Errorf("%v was observed: what is refused, and what the gateway answers itself, is not the workload's", got)
	default:
	}
}
