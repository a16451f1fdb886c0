package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"cloister.dev/cloister/workload"
)

// lines is a stderr that can be read while it is written.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // gets a value after a write
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case l.more <- struct{}{}:
	default:
	}
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// wait waits for a line with part in it and returns the line.
func (l *lines) wait(t *testing.T, part string) string {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		for line := range strings.Lines(l.String()) {
			if strings.Contains(line, part) && strings.HasSuffix(line, "\n") {
				return strings.TrimSpace(line)
			}
		}
		select {
		case <-l.more:
		case <-deadline:
			t.Fatalf("no line with %q; stderr:\n%s", part, l)
		}
	}
}

// startProxy runs `cloister proxy` until stop, which returns the exit code.
func startProxy(t *testing.T, args ...string) (addr string, stderr *lines, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stderr = &lines{more: make(chan struct{}, 1)}
	root := newRoot()
	root.SetArgs(append([]string{"proxy", "--listen", "127.0.0.1:0"}, args...))
	root.SetErr(stderr)
	code := make(chan int, 1)
	go func() { code <- execute(ctx, root) }()
	stop = sync.OnceValue(func() int {
		cancel()
		select {
		case c := <-code:
			return c
		case <-time.After(10 * time.Second):
			t.Error("the proxy does not end")
			return -1
		}
	})
	t.Cleanup(func() { stop() })
	fields := strings.Fields(stderr.wait(t, "listening on "))
	return fields[2], stderr, stop
}

func dialTCP(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

func TestProxyHTTP(t *testing.T) {
	e := startEnclave(t, enclaveOptions{}, describe)
	addr, stderr, stop := startProxy(t, "--root", e.root, "--measurements", writeSet(t, entry("1.4.0", nil)), "--connect-to", e.addr, "https://shop.example")
	for want, set := range map[string]func(*http.Protocols){
		"HTTP/1.1": func(p *http.Protocols) { p.SetHTTP1(true) },
		"HTTP/2.0": func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) },
	} {
		t.Run(want, func(t *testing.T) {
			protocols := new(http.Protocols)
			set(protocols)
			transport := &http.Transport{Protocols: protocols}
			defer transport.CloseIdleConnections()
			res, err := (&http.Client{Transport: transport}).Post("http://"+addr+"/a", "text/plain", strings.NewReader("x"))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			body, err := io.ReadAll(res.Body)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%s POST %s /a a= type=text/plain body=x", want, addr); string(body) != got {
				t.Errorf("got %q, want %q", body, got)
			}
		})
	}
	idle := dialTCP(t, addr) // says nothing; must not keep the proxy
	if code := stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if _, err := idle.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an open connection is not closed at the end: %v", err)
	}
	if n := strings.Count(stderr.String(), "verified  module"); n != 1 || !strings.Contains(stderr.String(), development) {
		t.Errorf("the enclave is reported %d times, want once, as a development one:\n%s", n, stderr)
	}
	if _, err := net.Dial("tcp", addr); err == nil {
		t.Error("the port is still open")
	}
}

// tunnel serves one connection at a time with TLS, as a tcp port of a gateway does.
func tunnel(t *testing.T, handle func(*tls.Conn)) *fakeEnclave {
	t.Helper()
	return startEnclave(t, enclaveOptions{tunnel: handle}, nil)
}

// Either side can end first, and the other then still gets everything.
func TestProxyHalfClose(t *testing.T) {
	e := tunnel(t, func(c *tls.Conn) {
		io.WriteString(c, "hello") // the server speaks first
		all, err := io.ReadAll(c)
		if err != nil {
			return
		}
		fmt.Fprintf(c, ", %d bytes", len(all))
		c.CloseWrite()
	})
	addr, _, _ := startProxy(t, "--root", e.root, "--measurements", writeSet(t, entry("", nil)), "tcp://"+e.addr)
	c := dialTCP(t, addr)
	greeting := make([]byte, 5)
	if _, err := io.ReadFull(c, greeting); err != nil || string(greeting) != "hello" {
		t.Fatalf("got %q, %v", greeting, err)
	}
	big := bytes.Repeat([]byte("x"), 1<<20)
	if _, err := c.Write(big); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	rest, err := io.ReadAll(c)
	if err != nil || string(rest) != ", 1048576 bytes" {
		t.Errorf("got %q, %v", rest, err)
	}
}

// A connection that the host cuts must not look like one that has ended.
func TestProxyBrokenOff(t *testing.T) {
	e := tunnel(t, func(c *tls.Conn) {
		io.ReadFull(c, make([]byte, len("go on"))) // the proxy's client has connected
		io.WriteString(c, "half of it")
		c.NetConn().(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
	})
	addr, stderr, _ := startProxy(t, "--root", e.root, "--measurements", writeSet(t, entry("", nil)), "tcp://"+e.addr)
	c := dialTCP(t, addr)
	if _, err := io.WriteString(c, "go on"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %q and a clean end, %v", got, err)
	}
	stderr.wait(t, "without TLS's close_notify")
}

func TestProxyRefuses(t *testing.T) {
	wrong := entry("1.4.0", func(m *workload.Measurement) { m.PCR16 = "f" + m.PCR16[1:] })
	tests := map[string]struct {
		enclave enclaveOptions
		set     workload.Measurement
		scheme  string
		down    bool
		want    string
	}{
		"register":       {set: wrong, scheme: "tcp", want: `attestation refused (measurement): the registers do not match measurement "1.4.0": PCR16 expected f0b0`},
		"register, http": {set: wrong, scheme: "https", want: "attestation refused (measurement)"},
		"other key":      {set: entry("", nil), enclave: enclaveOptions{otherKey: true}, scheme: "https", want: "attestation refused (public_key)"},
		"no document":    {set: entry("", nil), enclave: enclaveOptions{plain: true}, scheme: "tcp", want: "without an attestation document"},
		"nobody there":   {set: entry("", nil), down: true, scheme: "tcp", want: "connection refused"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if test.scheme == "tcp" {
				test.enclave.tunnel = func(*tls.Conn) {}
			}
			e := startEnclave(t, test.enclave, nil)
			target := e.addr
			if test.down {
				target = "127.0.0.1:1"
			}
			addr, stderr, stop := startProxy(t, "--root", e.root, "--measurements", writeSet(t, test.set), test.scheme+"://"+target)
			before := stderr.String()
			c := dialTCP(t, addr)
			io.WriteString(c, "GET /secret HTTP/1.1\r\n\r\n")
			got, err := io.ReadAll(c)
			if len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the client got %q, %v", got, err)
			}
			stderr.wait(t, test.want)
			if code := stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			said := strings.TrimPrefix(stderr.String(), before)
			if strings.Count(said, "\n") != 1 || !strings.HasPrefix(said, "refused 127.0.0.1:") {
				t.Errorf("a refusal is not one line:\n%s", said)
			}
			e.received.mu.Lock()
			defer e.received.mu.Unlock()
			if e.received.n != 0 || e.received.handshakes != 0 {
				t.Errorf("the server got %d bytes and %d handshakes", e.received.n, e.received.handshakes)
			}
		})
	}
}

func TestProxyUsage(t *testing.T) {
	set := writeSet(t, entry("", nil))
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	tests := map[string]struct {
		args []string
		code int
		want string
	}{
		"no measurements": {[]string{"https://a"}, 2, "--measurements"},
		"no URL":          {[]string{"--measurements", set}, 2, "name URL and nothing else"},
		"http":            {[]string{"--measurements", set, "http://a"}, 2, "neither https://HOST[:PORT] nor tcp://HOST:PORT"},
		"path":            {[]string{"--measurements", set, "https://a/b"}, 2, "neither https://HOST[:PORT] nor tcp://HOST:PORT"},
		"tcp port":        {[]string{"--measurements", set, "tcp://a"}, 2, "names no port"},
		"connect-to":      {[]string{"--measurements", set, "--connect-to", "x", "https://a"}, 2, "HOST:PORT"},
		"everybody":       {[]string{"--measurements", set, "--listen", ":8080", "https://a"}, 2, "no loopback address"},
		"other address":   {[]string{"--measurements", set, "--listen", "192.0.2.1:8080", "https://a"}, 2, "no loopback address"},
		"listen":          {[]string{"--measurements", set, "--listen", "8080", "https://a"}, 2, "--listen takes HOST:PORT"},
		"no such set":     {[]string{"--measurements", "/nonexistent", "https://a"}, 1, "no such file"},
		"busy":            {[]string{"--measurements", set, "--listen", busy.Addr().String(), "https://a"}, 1, "address already in use"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			call(t, "", append([]string{"proxy"}, test.args...)...).want(t, test.code, "cloister: ", test.want)
		})
	}
}

func TestProxyTarget(t *testing.T) {
	tests := map[string]struct {
		web      bool
		upstream string
	}{
		"https://shop.example":       {true, "shop.example:443"},
		"https://shop.example:8443/": {true, "shop.example:8443"},
		"tcp://[::1]:6379":           {false, "[::1]:6379"},
	}
	for arg, want := range tests {
		var p proxy
		if err := p.target(arg); err != nil || p.web != want.web || p.upstream != want.upstream {
			t.Errorf("%s: %v %s, %v", arg, p.web, p.upstream, err)
		}
	}
}

// The first bytes decide the protocol, and none of them is lost however slowly they come.
func TestProxySlowStart(t *testing.T) {
	e := startEnclave(t, enclaveOptions{}, describe)
	addr, _, _ := startProxy(t, "--root", e.root, "--measurements", writeSet(t, entry("", nil)), "https://"+e.addr)
	c := dialTCP(t, addr)
	c.SetNoDelay(true)
	for _, b := range []byte("PROPFIND /a HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n") {
		if _, err := c.Write([]byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if body, err := io.ReadAll(res.Body); err != nil || !strings.HasPrefix(string(body), "HTTP/1.1 PROPFIND h /a") {
		t.Errorf("got %q, %v", body, err)
	}
}
