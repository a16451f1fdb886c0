package vsock

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func guest(t *testing.T) *hybridGuest {
	t.Helper()
	g, err := newHybridGuest(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.l.Close() })
	return g
}

// echo serves l until it is closed.
func echo(l net.Listener) {
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
}

func roundTrip(t *testing.T, c net.Conn) {
	t.Helper()
	defer c.Close()
	want := bytes.Repeat([]byte("ping"), 64<<10)
	go func() {
		c.Write(want)
		c.(*net.UnixConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read %d bytes, %v, want the %d bytes sent", len(got), err, len(want))
	}
}

func TestHybridHostToGuest(t *testing.T) {
	g := guest(t)
	l, err := g.Listen(80)
	if err != nil {
		t.Fatal(err)
	}
	go echo(l)
	c, err := Dial(t.Context(), "unix://"+g.path, 80)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c)

	if _, err := g.Listen(80); err == nil {
		t.Error("a second listener on the same port was accepted")
	}
	if _, err := Dial(t.Context(), "unix://"+g.path, 81); err == nil {
		t.Error("a port without a listener was connected")
	}
	l.Close()
	if _, err := Dial(t.Context(), "unix://"+g.path, 80); err == nil {
		t.Error("a closed port was connected")
	}
}

func TestHybridDialHonoursContext(t *testing.T) {
	path := t.TempDir() + "/mute"
	l, err := net.Listen("unix", path) // accepts and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		if c, err := l.Accept(); err == nil {
			cancel()
			io.Copy(io.Discard, c)
		}
	}()
	if _, err := Dial(ctx, "unix://"+path, 1); err == nil {
		t.Error("a guest that does not answer was connected")
	}
}

func TestHybridRefusesOtherPreambles(t *testing.T) {
	g := guest(t)
	l, _ := g.Listen(7)
	go echo(l)
	for _, preamble := range []string{"GET / HTTP/1.1\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT 7", string(bytes.Repeat([]byte("9"), 100))} {
		c, err := net.Dial("unix", g.path)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte(preamble))
		c.(*net.UnixConn).CloseWrite()
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		// A reset is a refusal too: the rest of a long preamble was never read.
		if b, err := io.ReadAll(c); len(b) != 0 || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("preamble %q was answered with %q, %v", preamble, b, err)
		}
		c.Close()
	}
}

func TestGuestToHost(t *testing.T) {
	g := guest(t)
	// The second takes the place of one that was killed, which leaves its socket.
	for range 2 {
		l, err := Listen("unix://"+g.path, 70000)
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		go echo(l)
		c, err := g.Dial(t.Context(), 70000)
		if err != nil {
			t.Fatal(err)
		}
		roundTrip(t, c)
		l.Close()
	}
	if _, err := Listen("tcp://127.0.0.1", 70000); err == nil {
		t.Error("another scheme was taken")
	}
}

func TestSecret(t *testing.T) {
	g := guest(t)
	secret := NewSecret()
	inner, _ := g.Listen(80)
	l := secret.Listen(inner, 80)
	go echo(l)
	dial := func(ctx context.Context, port uint32) (net.Conn, error) {
		return Dial(ctx, "unix://"+g.path, port)
	}
	c, err := secret.Dial(t.Context(), 80, dial)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c)

	if _, err := NewSecret().Dial(t.Context(), 80, dial); !errors.Is(err, ErrProof) {
		t.Errorf("a dialler with another secret got %v, want ErrProof", err)
	}

	// A stranger that sends whatever it likes never reaches Accept and is never echoed.
	raw, err := dial(t.Context(), 80)
	if err != nil {
		t.Fatal(err)
	}
	raw.Write(make([]byte, nonceSize+proofSize))
	b, _ := io.ReadAll(raw)
	if len(b) != nonceSize+proofSize {
		t.Errorf("a stranger read %d bytes, want the acceptor's %d and the end", len(b), nonceSize+proofSize)
	}
	raw.Close()

	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

func TestSecretIsBoundToItsPort(t *testing.T) {
	g := guest(t)
	secret := NewSecret()
	inner, _ := g.Listen(80)
	defer secret.Listen(inner, 81).Close() // the acceptor believes that it is port 81
	_, err := secret.Dial(t.Context(), 80, func(ctx context.Context, port uint32) (net.Conn, error) {
		return Dial(ctx, "unix://"+g.path, port)
	})
	if !errors.Is(err, ErrProof) {
		t.Errorf("got %v, want ErrProof", err)
	}
}

// Strangers that connect and say nothing must not take all descriptors.
func TestSecretBoundsStrangers(t *testing.T) {
	g := guest(t)
	secret := NewSecret()
	inner, _ := g.Listen(80)
	counted := &countingListener{Listener: inner}
	l := secret.Listen(counted, 80)
	defer l.Close()
	dial := func(ctx context.Context, port uint32) (net.Conn, error) {
		return Dial(ctx, "unix://"+g.path, port)
	}
	var strangers []net.Conn
	defer func() {
		for _, c := range strangers {
			c.Close()
		}
	}()
	// One is accepted and waits for its turn, the next ones are not even accepted.
	for range maxUnproven + 20 {
		c, err := dial(t.Context(), 80)
		if err != nil {
			t.Fatal(err)
		}
		strangers = append(strangers, c)
	}
	if n := counted.most.Load(); n > maxUnproven+1 {
		t.Errorf("%d connections without a proof were open at a time, at most %d may be", n, maxUnproven+1)
	}
	// When they leave, the enclave's own sidecar comes through.
	for _, c := range strangers {
		c.Close()
	}
	go echo(l)
	c, err := secret.Dial(t.Context(), 80, dial)
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c)
}

// countingListener counts the connections that it has accepted and that are open.
type countingListener struct {
	net.Listener
	open, most atomic.Int64 // most is written by Accept alone
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.most.Store(max(l.most.Load(), l.open.Add(1)))
	return &countedConn{Conn: c, closed: sync.OnceFunc(func() { l.open.Add(-1) })}, nil
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

// A stranger's first bytes lead to a port only in the one form, and are never taken for the knowledge of a
// secret at either end.
func FuzzStranger(f *testing.F) {
	f.Add([]byte("CONNECT 80\n"))
	f.Add([]byte("CONNECT 080\n"))
	f.Add([]byte("CONNECT +80\n"))
	f.Add([]byte("CONNECT 4294967376\nx"))
	f.Add(make([]byte, 2*(nonceSize+proofSize)))
	secret := NewSecret()
	f.Fuzz(func(t *testing.T, b []byte) {
		say := func(hear func(net.Conn)) {
			stranger, us := net.Pipe()
			go io.Copy(io.Discard, stranger)
			go func() {
				stranger.Write(b)
				stranger.Close()
			}()
			hear(us)
			us.Close()
		}
		g := &hybridGuest{ports: map[uint32]*portListener{}}
		reached := false
		l := newPortListener(addr{80}, func() {})
		l.conns = make(chan net.Conn, 1)
		g.ports[80] = l
		say(func(c net.Conn) { g.connect(c) })
		select {
		case <-l.conns:
			reached = true
		default:
		}
		if line, _, _ := bytes.Cut(b, []byte("\n")); reached && !regexp.MustCompile(`^CONNECT 0*80$`).Match(line) {
			t.Errorf("%q has reached port 80", b)
		}
		say(func(c net.Conn) {
			if secret.proveAcceptor(c, 80) == nil {
				t.Errorf("%q proves a secret to an acceptor", b)
			}
		})
		say(func(c net.Conn) {
			if secret.proveDialler(c, 80) == nil {
				t.Errorf("%q proves a secret to a dialler", b)
			}
		})
	})
}
