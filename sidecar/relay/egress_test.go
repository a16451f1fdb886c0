package relay

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cloister.dev/cloister/internal/vsock"
	"go.uber.org/goleak"
)

// echoSocket is Envoy's end: it echoes to the end of what comes.
func echoSocket(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(shortDir(t), "egress.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return path
}

// hybrid is the target of an enclave without ports: only its sockets' folder matters.
func hybrid(t *testing.T, generation uint64) *Target {
	return &Target{Generation: generation, Address: "unix://" + filepath.Join(shortDir(t), vsock.HybridName), Secret: vsock.NewSecret()}
}

// dialHost connects as the enclave does.
func dialHost(t *Target, port uint32) (*net.UnixConn, error) {
	c, err := t.Secret.Dial(context.Background(), port, func(ctx context.Context, port uint32) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", vsock.HostPath(t.Address[len("unix://"):], port))
	})
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(deadline))
	return c.(*net.UnixConn), nil
}

func TestEgress(t *testing.T) {
	socket := echoSocket(t)
	before := goleak.IgnoreCurrent()
	e := NewEgress(socket)
	first := hybrid(t, 1)
	port, err := e.Set(first, 0)
	if err != nil || port < vsock.FirstHostPort {
		t.Fatalf("port %d, %v", port, err)
	}
	if again, err := e.Set(first, 0); again != port || err != nil {
		t.Errorf("the same generation again: port %d, %v; want %d", again, err, port)
	}
	c, err := dialHost(first, port)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(c, "there and back")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "there and back" {
		t.Errorf("got %q, %v", got, err)
	}

	open, err := dialHost(first, port)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	second := hybrid(t, 2)
	if port, err := e.Set(second, 1<<20); port != 1<<20 || err != nil {
		t.Errorf("port %d, %v; want the one that is known", port, err)
	}
	if n, err := open.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("a connection outlives its enclave: %d, %v", n, err)
	}
	if c, err := dialHost(first, port); err == nil {
		c.Close()
		t.Error("the port of the former enclave is open")
	}
	if c, err := dialHost(second, 1<<20); err != nil {
		t.Error(err)
	} else {
		c.Close()
	}

	if _, err := e.Set(nil, 0); err != nil {
		t.Error(err)
	}
	if c, err := dialHost(second, 1<<20); err == nil {
		c.Close()
		t.Error("the port is open without an enclave")
	}
	if _, err := e.Set(&Target{Generation: 3, Address: "unix:///nowhere/vsock.sock"}, 0); err == nil {
		t.Error("listens where there is no folder")
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
	goleak.VerifyNone(t, before, goleak.IgnoreAnyFunction("cloister.dev/cloister/sidecar/relay.echoSocket.func2.1"))
}

// Without Envoy the enclave sees its connection closed.
func TestEgressWithoutEnvoy(t *testing.T) {
	e := NewEgress("/nowhere/egress.sock")
	defer e.Close()
	target := hybrid(t, 1)
	port, err := e.Set(target, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := dialHost(target, port)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("read %d, %v", n, err)
	}
}
