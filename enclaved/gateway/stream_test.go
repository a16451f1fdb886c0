package gateway_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"cloister.dev/cloister/enclaved/gateway"
	"cloister.dev/cloister/enclaved/vault"
	"cloister.dev/cloister/workload"
)

// tcpPorts is a tcp port with TLS, and the same without.
func tcpPorts(t *testing.T, serve func(*net.TCPConn)) (dials map[string]func(*testing.T) stream, e *enclave) {
	t.Helper()
	secure, plain := serveStreams(t, serve), serveStreams(t, serve)
	e = newEnclave(t,
		workload.Port{Port: secure, Protocol: workload.ProtocolTCP},
		workload.Port{Port: plain, Protocol: workload.ProtocolTCP, Plaintext: true})
	return map[string]func(*testing.T) stream{
		"TLS": func(t *testing.T) stream { return e.dial(t, secure) },
		"plaintext": func(t *testing.T) stream {
			c, err := net.Dial("tcp", e.addr(plain))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(30 * time.Second))
			return c.(*net.TCPConn)
		},
	}, e
}

type stream interface {
	net.Conn
	CloseWrite() error
}

// The client ends first: the workload sees the end, and its answer still arrives.
func TestTunnelClientEndsFirst(t *testing.T) {
	dials, _ := tcpPorts(t, func(c *net.TCPConn) {
		all, err := io.ReadAll(c)
		if err == nil {
			io.WriteString(c, strings.ToUpper(string(all)))
		}
	})
	for name, dial := range dials {
		t.Run(name, func(t *testing.T) {
			s := dial(t)
			io.WriteString(s, "abc")
			s.CloseWrite()
			if got, err := io.ReadAll(s); string(got) != "ABC" || err != nil {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// The workload ends first: the client sees the end, and what it still sends arrives.
func TestTunnelWorkloadEndsFirst(t *testing.T) {
	received := make(chan string, 1)
	dials, _ := tcpPorts(t, func(c *net.TCPConn) {
		io.WriteString(c, "hello")
		c.CloseWrite()
		all, _ := io.ReadAll(c)
		received <- string(all)
	})
	for name, dial := range dials {
		t.Run(name, func(t *testing.T) {
			s := dial(t)
			if got, err := io.ReadAll(s); string(got) != "hello" || err != nil {
				t.Fatalf("got %q, %v", got, err)
			}
			io.WriteString(s, "after the end")
			s.CloseWrite()
			if got := <-received; got != "after the end" {
				t.Errorf("the workload received %q", got)
			}
		})
	}
}

func TestTunnelCarriesMuch(t *testing.T) {
	dials, _ := tcpPorts(t, func(c *net.TCPConn) {
		io.Copy(c, c)
		c.CloseWrite()
	})
	const size = 16 << 20
	for name, dial := range dials {
		t.Run(name, func(t *testing.T) {
			s := dial(t)
			go func() {
				io.CopyN(s, zeros{}, size)
				s.CloseWrite()
			}()
			if n, err := io.Copy(io.Discard, s); n != size || err != nil {
				t.Errorf("%d bytes came back of %d: %v", n, size, err)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// A stream that the workload breaks off does not look whole to the client.
func TestTunnelWorkloadBreaksOff(t *testing.T) {
	dials, _ := tcpPorts(t, func(c *net.TCPConn) {
		io.WriteString(c, "part")
		io.ReadFull(c, make([]byte, 1))
		c.SetLinger(0)
	})
	s := dials["TLS"](t)
	io.ReadFull(s, make([]byte, 4))
	io.WriteString(s, "x")
	if _, err := s.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("got %v, want an error that is not the end of the stream", err)
	}
}

// A stream that the host cuts does not look whole to the workload.
func TestTunnelHostCuts(t *testing.T) {
	result := make(chan error, 1)
	dials, _ := tcpPorts(t, func(c *net.TCPConn) {
		_, err := io.ReadAll(c)
		result <- err
	})
	s := dials["TLS"](t).(*tls.Conn)
	io.WriteString(s, "part")
	s.NetConn().(strict).CloseWrite() // an end of TCP without an end of TLS
	if err := <-result; err == nil {
		t.Error("the workload saw a whole stream")
	}
}

func TestTunnelWorkloadDown(t *testing.T) {
	port := closedPort(t)
	e := newEnclave(t, workload.Port{Port: port, Protocol: workload.ProtocolTCP})
	if _, err := e.dial(t, port).Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("got %v, want an error that is not the end of the stream", err)
	}
}

// Clients that send nothing, or a part of a header, are cut off in time.
func TestSlowClients(t *testing.T) {
	for name, c := range map[string]struct {
		port workload.Port
		sent string
	}{
		"no handshake":          {port: workload.Port{Port: 1}},
		"no handshake of a tcp": {port: workload.Port{Port: 1, Protocol: workload.ProtocolTCP}},
		"no header":             {port: workload.Port{Port: 1, Plaintext: true}},
		"part of a header":      {port: workload.Port{Port: 1, Plaintext: true}, sent: "GET / HTTP/1.1\r\nHost:"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newPipes()
				g, err := gateway.New(gateway.Config{
					Manifest: &workload.Manifest{Ports: []workload.Port{c.port}},
					Listen:   func(uint32) (net.Listener, error) { return l, nil },
					Vault:    vault.New(nil),
				})
				if err != nil {
					t.Fatal(err)
				}
				if err := g.Start(); err != nil {
					t.Fatal(err)
				}
				client := l.dial()
				began := time.Now()
				io.WriteString(client, c.sent)
				if _, err := client.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("got %v", err)
				}
				if waited := time.Since(began); waited != 10*time.Second {
					t.Errorf("cut off after %s", waited)
				}
				g.Close(t.Context())
			})
		})
	}
}

// pipes is a listener of connections in memory.
type pipes struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), done: make(chan struct{})} }

func (p *pipes) dial() net.Conn {
	client, server := net.Pipe()
	p.conns <- server
	return client
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipes", Net: "unix"} }

func TestStart(t *testing.T) {
	if _, err := gateway.New(gateway.Config{Manifest: &workload.Manifest{Ports: []workload.Port{{Port: 1, Protocol: "sctp"}}}, Vault: vault.New(nil)}); err == nil {
		t.Error("an unknown protocol was accepted")
	}
	var opened []*pipes
	g, err := gateway.New(gateway.Config{
		Manifest: &workload.Manifest{Ports: []workload.Port{{Port: 1}, {Port: 2}, {Port: 3}}},
		Listen: func(port uint32) (net.Listener, error) {
			if port == 3 {
				return nil, errors.New("in use")
			}
			l := newPipes()
			opened = append(opened, l)
			return l, nil
		},
		Vault: vault.New(nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Start(); err == nil {
		t.Error("Start succeeded without a listener")
	}
	for _, l := range opened {
		if _, err := l.Accept(); err == nil {
			t.Error("a listener was left open")
		}
	}
	if err := g.Close(context.Background()); err != nil {
		t.Error(err)
	}
}
