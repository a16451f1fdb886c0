package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/vsock"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	hostPort = 70000
	patience = 20 * time.Second
)

// allowed is what the tests' relays may reach; what is there says the name.
var allowed = []string{"closed.example:1", "echo.example:7", "late.example:9", "mute.example:9", "other.example:443", "reset.example:9", "speaker.example:19"}

const speech = 5 << 20 // bytes that the speaker sends

// sidecar is the other end of a relay: a forward proxy for HTTP/2 CONNECT with some targets of its own.
type sidecar struct {
	*Relay
	mu      sync.Mutex
	streams int // vsock streams that were accepted
}

func newSidecar(t *testing.T) *sidecar {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "relay") // a short path, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	guest, secret := socketGuest(filepath.Join(dir, vsock.HybridName)), vsock.NewSecret()
	l, err := vsock.Listen("unix://"+string(guest), hostPort)
	if err != nil {
		t.Fatal(err)
	}
	s := &sidecar{}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{Handler: http.HandlerFunc(s.connect), Protocols: protocols, ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.streams++
		}
	}}
	go server.Serve(secret.Listen(l, hostPort))
	t.Cleanup(func() { server.Close() })
	s.Relay = New(secret, guest, hostPort, allowed)
	return s
}

func (s *sidecar) accepted() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams
}

// socketGuest dials hybrid sockets of the host.
type socketGuest string

func (g socketGuest) Listen(uint32) (net.Listener, error) { return nil, errors.New("not here") }

func (g socketGuest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", vsock.HostPath(string(g), port))
}

// connect plays targets. What it does not read is not asked for.
func (s *sidecar) connect(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect || r.URL.Path != "" {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	flow := http.NewResponseController(w)
	switch r.Host {
	case "other.example:443":
		w.WriteHeader(http.StatusForbidden)
	case "closed.example:1":
		w.WriteHeader(http.StatusServiceUnavailable)
	case "late.example:9": // neither yes nor no
		<-r.Context().Done()
	case "mute.example:9":
		flow.Flush()
		<-r.Context().Done()
	case "reset.example:9":
		io.WriteString(w, "half of it")
		flow.Flush()
		panic(http.ErrAbortHandler)
	case "speaker.example:19": // ends first, without a look at what it was sent
		for range speech / len(chunk) {
			w.Write(chunk)
		}
	case "echo.example:7":
		flow.Flush()
		b := make([]byte, 32<<10)
		for {
			n, err := r.Body.Read(b)
			w.Write(b[:n])
			flow.Flush()
			if err != nil {
				fmt.Fprintf(w, "end: %v", err)
				return
			}
		}
	}
}

var chunk = bytes.Repeat([]byte("0123456789abcdef"), 1024)

func dial(t *testing.T, r *Relay, address string) *net.UnixConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel() // which must not end the connection
	c, err := r.Dial(ctx, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.UnixConn)
}

func TestDial(t *testing.T) {
	s := newSidecar(t)
	for range 3 {
		c := dial(t, s.Relay, "echo.example:7")
		sent := bytes.Repeat(chunk, 200)
		go func() {
			c.Write(sent)
			c.CloseWrite()
		}()
		got, err := io.ReadAll(c)
		if want := string(sent) + "end: EOF"; err != nil || string(got) != want {
			t.Fatalf("got %d bytes, %v; want %d", len(got), err, len(want))
		}
	}
	if n := s.accepted(); n != 3 {
		t.Errorf("%d vsock streams for 3 connections", n)
	}
}

// The end of one direction leaves the other open, for as long as it likes.
func TestHalfClose(t *testing.T) {
	s := newSidecar(t)
	c := dial(t, s.Relay, "echo.example:7")
	fmt.Fprint(c, "question")
	b := make([]byte, len("question"))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "question" {
		t.Fatalf("%q, %v", b, err)
	}
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "end: EOF" {
		t.Errorf("after the end of the client's direction: %q, %v", got, err)
	}
}

// A target that ends first is heard to its last byte, though the proxy ends the stream with it.
func TestTargetEndsFirst(t *testing.T) {
	s := newSidecar(t)
	for range 20 {
		c := dial(t, s.Relay, "speaker.example:19")
		fmt.Fprint(c, "nobody reads this")
		n, err := io.Copy(io.Discard, c)
		if err != nil || n != speech {
			t.Fatalf("heard %d bytes of %d, %v", n, speech, err)
		}
		c.Close()
	}
}

func TestDialRefuses(t *testing.T) {
	s := newSidecar(t)
	closed := New(vsock.NewSecret(), socketGuest("/nowhere"), hostPort, allowed)
	without := New(vsock.NewSecret(), socketGuest("/nowhere"), 0, allowed)
	for name, tt := range map[string]struct {
		relay   *Relay
		address string
		is      error
		text    string
	}{
		"not allowed":        {s.Relay, "third.example:443", ErrNotAllowed, "connect to third.example:443: it is not in the measured list"},
		"another port":       {s.Relay, "echo.example:8", ErrNotAllowed, "measured list"},
		"another spelling":   {s.Relay, "Echo.example:7", ErrNotAllowed, "measured list"},
		"refused":            {s.Relay, "other.example:443", ErrRefused, "connect to other.example:443"},
		"unreachable":        {s.Relay, "closed.example:1", ErrUnreachable, "connect to closed.example:1"},
		"late":               {s.Relay, "late.example:9", context.DeadlineExceeded, "connect to late.example:9"},
		"no sidecar":         {closed, "echo.example:7", os.ErrNotExist, "connect to echo.example:7"},
		"nothing registered": {without, "echo.example:7", nil, "no port for egress"},
	} {
		t.Run(name, func(t *testing.T) {
			limit := patience
			if tt.is == context.DeadlineExceeded {
				limit = 300 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			before := s.accepted()
			c, err := tt.relay.Dial(ctx, tt.address)
			if err == nil {
				c.Close()
				t.Fatal("connected")
			}
			if tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v and %q", err, tt.is, tt.text)
			}
			if s.accepted() != before && tt.is == ErrNotAllowed {
				t.Error("the sidecar heard of it")
			}
		})
	}
}

// A target that does not read stops its writer after what fits into the windows and sockets between.
func TestBackPressure(t *testing.T) {
	s := newSidecar(t)
	c := dial(t, s.Relay, "mute.example:9")
	c.SetWriteDeadline(time.Now().Add(time.Second))
	const most = 8 << 20
	n, err := c.Write(make([]byte, most))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("wrote %d bytes, %v; want to be stopped", n, err)
	}
}

func dialTCP(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

func TestListen(t *testing.T) {
	s := newSidecar(t)
	var log bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() { slog.SetDefault(old) })
	// The ports are those of the targets; the tests' machine has the same loopback addresses.
	hosts, err := Hosts([]string{"closed.example:1", "echo.example:7", "reset.example:9", "speaker.example:19"})
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.Listen(hosts)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	c := dialTCP(t, "127.64.0.2:7")
	fmt.Fprint(c, "hello")
	c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "helloend: EOF" {
		t.Errorf("echo: %q, %v", got, err)
	}
	c = dialTCP(t, "127.64.0.4:19")
	if n, err := io.Copy(io.Discard, c); err != nil || n != speech {
		t.Errorf("speaker: %d bytes, %v", n, err)
	}
	c = dialTCP(t, "127.64.0.3:9")
	if got, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a stream that was cut looks like one that has ended: %q, %v", got, err)
	}
	c = dialTCP(t, "127.64.0.1:1")
	if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("unreachable: %d, %v", n, err)
	}
	if _, err := net.DialTimeout("tcp", "127.64.0.1:7", patience); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a port that is not allowed: %v", err)
	}

	open := dialTCP(t, "127.64.0.2:7")
	fmt.Fprint(open, "x")
	if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if n, err := open.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection outlives its listeners: %d, %v", n, err)
	}
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 1 || !strings.Contains(lines[0], "target=closed.example:1") {
		t.Errorf("log:\n%s", log.String())
	}
}

func TestHosts(t *testing.T) {
	got, err := Hosts([]string{"10.0.0.1:80", "[2001:db8::1]:443", "a.example:443", "a.example:8443", "b.example:443"})
	if err != nil {
		t.Fatal(err)
	}
	want := []Host{
		{"10.0.0.1", netip.MustParseAddr("10.0.0.1"), []uint16{80}},
		{"2001:db8::1", netip.MustParseAddr("2001:db8::1"), []uint16{443}},
		{"a.example", netip.MustParseAddr("127.64.0.1"), []uint16{443, 8443}},
		{"b.example", netip.MustParseAddr("127.64.0.2"), []uint16{443}},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("hosts (-want +got):\n%s", diff)
	}
	lines := []string{"127.64.0.1\ta.example", "127.64.0.2\tb.example"}
	if diff := cmp.Diff(lines, Lines(got)); diff != "" {
		t.Errorf("/etc/hosts (-want +got):\n%s", diff)
	}
	if _, err := Hosts([]string{"a.example"}); err == nil {
		t.Error("an entry without a port was accepted")
	}
}

// An address in the list becomes the loopback device's own, so that nothing but the listener is at it.
func TestListenOnAddresses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: a network namespace")
	}
	s := newSidecar(t)
	s.allowed = []string{"203.0.113.9:7", "[2001:db8::9]:7"}
	hosts, err := Hosts(s.allowed)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { // on a thread of its own, which ends with it
		defer close(done)
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		// An address brings its device nothing while that is down.
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(fd)
		up, _ := unix.NewIfreq("lo")
		up.SetUint16(unix.IFF_UP)
		if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, up); err != nil {
			t.Error(err)
			return
		}
		for range 2 { // the addresses may be there
			l, err := s.Listen(hosts)
			if err != nil {
				t.Error(err)
				return
			}
			for _, target := range s.allowed {
				c, err := net.DialTimeout("tcp", target, patience)
				if err != nil {
					t.Error(err)
					continue
				}
				c.Close()
			}
			if _, err := net.DialTimeout("tcp", "203.0.113.9:8", patience); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("another port: %v", err)
			}
			if _, err := net.DialTimeout("tcp", "203.0.113.10:7", patience); !errors.Is(err, syscall.ENETUNREACH) {
				t.Errorf("another address: %v", err)
			}
			l.Close()
		}
	}()
	<-done
}
