package supervise

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

// serveEgress is a sidecar that knows every name, on a port of the host.
func serveEgress(t *testing.T, e *enclave, port uint32) {
	t.Helper()
	l, err := net.Listen("unix", e.host(port))
	if err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Protocols: protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).Flush()
		said, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s heard %s", r.Host, said)
	})}
	go server.Serve(e.secret.Listen(l, port))
	t.Cleanup(func() { server.Close() })
}

// The workload reaches what the manifest names by its name, and finds nothing else.
func TestEgress(t *testing.T) {
	e := newEnclave(t)
	const port = 70002
	serveEgress(t, e, port)
	e.configure(t, &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, cmdConfig("visit", "peer.example:4711", "peer.example:4712", "third.invalid:4711", "other.example:4712"))},
		// In this test the addresses are the machine's own.
		Egress: []string{"other.example:4712", "peer.example:4711"},
	})
	s, err := e.Run(t.Context(), &channel.RunRequest{EgressPort: port})
	if err != nil {
		t.Fatal(err)
	}
	var out string
	for {
		ev, err := s.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		out += string(ev.GetOutput().GetData())
		if x := ev.GetExited(); x != nil && x.GetCode() != 0 {
			t.Errorf("exited: %v", x)
		}
	}
	lines := strings.Split(out, "\n")
	for i, want := range []string{"peer.example:4711 heard hello <nil>", "connection refused", "lookup third.invalid", "other.example:4712 heard hello <nil>", ""} {
		if i >= len(lines) || !strings.Contains(lines[i], want) {
			t.Fatalf("the workload printed:\n%s\nwant line %d with %q", out, i+1, want)
		}
	}
	// With the workload the way out is gone.
	if c, err := net.Dial("tcp", "127.64.0.2:4711"); err == nil {
		c.Close()
		t.Error("the listener outlives its workload")
	}
}

// An enclave that was promised a way out does not run without one.
func TestEgressWithoutSidecar(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))}, Egress: []string{"peer.example:443"}})
	s, err := e.Run(t.Context(), &channel.RunRequest{})
	if err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
}
