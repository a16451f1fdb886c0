package relay

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"cloister.dev/cloister/internal/vsock"
	"go.uber.org/goleak"
)

const (
	port     = 80
	deadline = 10 * time.Second
)

// enclave is a guest with hybrid sockets whose port serves each connection with serve.
func enclave(t *testing.T, generation uint64, serve func(net.Conn)) *Target {
	t.Helper()
	dir := shortDir(t)
	guest, err := vsock.NewHybridGuest(dir)
	if err != nil {
		t.Fatal(err)
	}
	l, err := guest.Listen(port)
	if err != nil {
		t.Fatal(err)
	}
	secret := vsock.NewSecret()
	proven := secret.Listen(l, port)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := proven.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		proven.Close()
		wg.Wait()
	})
	return &Target{Generation: generation, Address: "unix://" + filepath.Join(dir, vsock.HybridName), Secret: secret}
}

// shortDir is t.TempDir with a path that fits into a unix socket's address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "relay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// start returns a relay that leaves no goroutine behind, and a function that connects to it.
func start(t *testing.T, target *Target) (*Relay, func() *net.UnixConn) {
	t.Helper()
	before := goleak.IgnoreCurrent() // a guest lives as long as the process
	dir := shortDir(t)
	r, err := Listen(dir, []uint16{port})
	if err != nil {
		t.Fatal(err)
	}
	r.Set(target)
	t.Cleanup(func() {
		r.Close()
		if n := r.Active(); n != 0 {
			t.Errorf("%d connections are counted after the end", n)
		}
		// The guest's own end of a connection may take a moment longer.
		goleak.VerifyNone(t, before, goleak.IgnoreAnyFunction("cloister.dev/cloister/sidecar/relay.enclave.func1.1"))
	})
	return r, func() *net.UnixConn {
		t.Helper()
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: SocketPath(dir, port), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(deadline))
		t.Cleanup(func() { c.Close() })
		return c
	}
}

func echo(c net.Conn) { io.Copy(c, c) }

func TestBothWays(t *testing.T) {
	_, dial := start(t, enclave(t, 1, echo))
	sent := make([]byte, 5<<20+17)
	rand.Read(sent)
	c := dial()
	go func() {
		c.Write(sent)
		c.CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back, sent %d, and they differ", len(got), len(sent))
	}
}

// The client's end of file arrives while the answer can still go back.
func TestHalfCloseOfTheClient(t *testing.T) {
	_, dial := start(t, enclave(t, 1, func(c net.Conn) {
		sum := sha256.New()
		if _, err := io.Copy(sum, c); err == nil {
			c.Write(sum.Sum(nil))
		}
	}))
	c := dial()
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256([]byte("question"))
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want[:]) {
		t.Errorf("got %x, %v; want %x", got, err, want)
	}
}

// The enclave's end of file arrives while the client can still send.
func TestHalfCloseOfTheEnclave(t *testing.T) {
	received := make(chan []byte, 1)
	_, dial := start(t, enclave(t, 1, func(c net.Conn) {
		c.Write([]byte("hello"))
		c.(*net.UnixConn).CloseWrite()
		b, _ := io.ReadAll(c)
		received <- b
	}))
	c := dial()
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
		t.Fatalf("got %q, %v", got, err)
	}
	if _, err := c.Write([]byte("still here")); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if got := <-received; string(got) != "still here" {
		t.Errorf("the enclave received %q", got)
	}
}

// A client that is gone ends the connection even though the enclave neither reads an error nor writes.
func TestClientGone(t *testing.T) {
	ended := make(chan struct{})
	_, dial := start(t, enclave(t, 1, func(c net.Conn) {
		io.Copy(io.Discard, c) // until the client's end of file
		awaitHangup(c.(*net.UnixConn))
		close(ended)
	}))
	c := dial()
	c.Write([]byte("x"))
	c.CloseWrite()
	select {
	case <-ended:
		t.Fatal("the end of one direction ended the other")
	case <-time.After(50 * time.Millisecond):
	}
	c.Close()
	select {
	case <-ended:
	case <-time.After(deadline):
		t.Fatal("the enclave's end stays open")
	}
}

func TestNewGeneration(t *testing.T) {
	name := func(s string) func(net.Conn) {
		return func(c net.Conn) {
			c.Write([]byte(s))
			io.Copy(io.Discard, c)
		}
	}
	first, second := enclave(t, 1, name("first ")), enclave(t, 2, name("second"))
	r, dial := start(t, first)
	read := func(c net.Conn) string {
		b := make([]byte, 6)
		n, _ := io.ReadFull(c, b)
		return string(b[:n])
	}
	old := dial()
	if got := read(old); got != "first " {
		t.Fatalf("got %q", got)
	}
	r.Set(&Target{Generation: 1, Address: first.Address, Secret: first.Secret})
	other := dial()
	if got := read(other); got != "first " {
		t.Fatalf("got %q", got)
	}

	r.Set(nil)
	for _, c := range []net.Conn{old, other, dial()} {
		if n, err := c.Read(make([]byte, 1)); n != 0 || !ended(err) {
			t.Errorf("without a target a connection gives %d bytes, %v", n, err)
		}
	}
	r.Set(second)
	if got := read(dial()); got != "second" {
		t.Errorf("got %q", got)
	}
}

// ended reports whether err says that the other end closed the connection.
func ended(err error) bool {
	var timeout net.Error
	return err != nil && !(errors.As(err, &timeout) && timeout.Timeout())
}

func TestEnclaveThatCannotBeReached(t *testing.T) {
	stranger := enclave(t, 1, echo)
	stranger.Secret = vsock.NewSecret()
	dir := shortDir(t)
	tests := map[string]*Target{
		"no socket":    {Generation: 1, Address: "unix://" + filepath.Join(dir, "none")},
		"bad address":  {Generation: 1, Address: "tcp://127.0.0.1:1"},
		"other secret": stranger,
	}
	for name, target := range tests {
		t.Run(name, func(t *testing.T) {
			_, dial := start(t, target)
			c := dial()
			c.Write([]byte("hello"))
			if n, err := c.Read(make([]byte, 1)); n != 0 || !ended(err) {
				t.Errorf("the client got %d bytes, %v; it should see a closed connection", n, err)
			}
		})
	}
}

// What the enclave sent before its end arrives, also when nobody had read it yet.
func TestLastWords(t *testing.T) {
	sent := bytes.Repeat([]byte("last words "), 10_000)
	gone := make(chan struct{})
	r, dial := start(t, enclave(t, 1, func(c net.Conn) {
		c.Write(sent)
		close(gone)
	}))
	c := dial()
	go func() {
		<-gone
		r.Set(nil)
	}()
	<-gone
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes arrived, %v; %d were sent", len(got), err, len(sent))
	}
}

// A connection that is being dialled when its generation ends does not outlive it.
func TestEndWhileDialling(t *testing.T) {
	dir := shortDir(t)
	l, err := net.Listen("unix", filepath.Join(dir, "silent"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c // and no answer
		}
	}()
	r, dial := start(t, &Target{Generation: 1, Address: "unix://" + filepath.Join(dir, "silent"), Secret: vsock.NewSecret()})
	c := dial()
	silent := <-accepted
	defer silent.Close()
	begin := time.Now()
	r.Set(nil)
	if n, err := c.Read(make([]byte, 1)); n != 0 || !ended(err) {
		t.Errorf("the client got %d bytes, %v", n, err)
	}
	if took := time.Since(begin); took > dialTimeout/2 {
		t.Errorf("it took %s", took)
	}
}

// A reader that stops reading stops its writer: the relay holds little.
func TestBackPressure(t *testing.T) {
	release := make(chan struct{})
	_, dial := start(t, enclave(t, 1, func(c net.Conn) {
		<-release
		io.Copy(io.Discard, c)
	}))
	c := dial()
	c.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
	n, err := c.Write(make([]byte, 64<<20))
	close(release)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("writing gives %v; it should block", err)
	}
	if n > 4<<20 {
		t.Errorf("%d bytes were taken while nobody read", n)
	}
}

func TestManyConnections(t *testing.T) {
	const many = 1000
	r, dial := start(t, enclave(t, 1, echo))
	conns := make([]net.Conn, many)
	for i := range conns {
		conns[i] = dial()
	}
	for round := range 2 {
		for i, c := range conns {
			if _, err := c.Write([]byte{byte(i), byte(round)}); err != nil {
				t.Fatal(err)
			}
		}
		for i, c := range conns {
			b := make([]byte, 2)
			if _, err := io.ReadFull(c, b); err != nil || b[0] != byte(i) || b[1] != byte(round) {
				t.Fatalf("connection %d: got %v, %v", i, b, err)
			}
		}
	}
	if got := r.Active(); got != many {
		t.Errorf("%d connections are counted, not %d", got, many)
	}
}

func TestStaleSocket(t *testing.T) {
	dir := shortDir(t)
	path := SocketPath(dir, port)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false) // as after a crash
	l.Close()
	r, err := Listen(dir, []uint16{port})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var d net.Dialer
	c, err := d.DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}
