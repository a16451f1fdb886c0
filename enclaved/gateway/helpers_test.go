package gateway_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/enclaved/gateway"
	"cloister.dev/cloister/enclaved/vault"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/workload"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// enclave is a gateway with a vault, and what a client must know to trust it.
type enclave struct {
	*gateway.Gateway
	module    *nsmtest.Module
	canonical []byte

	accepted, open atomic.Int64 // connections

	mu        sync.Mutex
	listeners map[uint32]net.Listener
}

// newEnclave starts a gateway for ports. It is closed hard with the test, unless the test closes it.
func newEnclave(t *testing.T, ports ...workload.Port) *enclave {
	t.Helper()
	return newEnclaveOf(t, nsmtest.New(t), ports...)
}

func newEnclaveOf(t *testing.T, module *nsmtest.Module, ports ...workload.Port) *enclave {
	t.Helper()
	return newEnclaveWith(t, module, gateway.Config{Manifest: &workload.Manifest{Ports: ports}})
}

// newEnclaveWith completes config.
func newEnclaveWith(t *testing.T, module *nsmtest.Module, config gateway.Config) *enclave {
	t.Helper()
	e := &enclave{module: module, canonical: []byte("{}"), listeners: map[uint32]net.Listener{}}
	client := nsm.New(nsm.NewDevelopment(module.Dial))
	v := vault.New(client)
	t.Cleanup(func() {
		v.Close()
		client.Close()
	})
	if _, err := v.Measure(t.Context(), e.canonical); err != nil {
		t.Fatal(err)
	}
	config.Listen, config.Vault = e.listen, v
	g, err := gateway.New(config)
	if err != nil {
		t.Fatal(err)
	}
	e.Gateway = g
	if err := g.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		g.Close(ctx)
	})
	return e
}

func (e *enclave) listen(port uint32) (net.Listener, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.listeners[port] = l
	return &counted{l, e}, nil
}

// counted counts the connections that its gateway accepts and has open.
type counted struct {
	net.Listener
	e *enclave
}

func (l *counted) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.e.accepted.Add(1)
	l.e.open.Add(1)
	return &countedConn{TCPConn: c.(*net.TCPConn), e: l.e}, nil
}

type countedConn struct {
	*net.TCPConn
	e    *enclave
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.e.open.Add(-1) })
	return c.TCPConn.Close()
}

// eventually waits until a condition holds.
func eventually(t *testing.T, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the condition did not come about")
		}
	}
}

// addr is where the gateway listens for port.
func (e *enclave) addr(port uint32) string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.listeners[port].Addr().String()
}

// config is that of an attested client.
func (e *enclave) config(t *testing.T, protocols ...string) *tls.Config {
	t.Helper()
	v, err := attestation.NewVerifier(attestation.Options{Root: e.module.Root(), Measurements: e.module.Measurements(e.canonical)})
	if err != nil {
		t.Fatal(err)
	}
	return v.ClientConfig(&tls.Config{NextProtos: protocols})
}

// client speaks one version of HTTP to whatever host a URL names, which is always the gateway's port.
func (e *enclave) client(t *testing.T, port uint32, http2 bool) *http.Client {
	t.Helper()
	tr := &http.Transport{
		TLSClientConfig:    e.config(t),
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", e.addr(port))
		},
		Protocols: new(http.Protocols),
	}
	tr.Protocols.SetHTTP1(!http2)
	tr.Protocols.SetHTTP2(http2)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// dial makes an attested TLS connection.
func (e *enclave) dial(t *testing.T, port uint32, protocols ...string) *tls.Conn {
	t.Helper()
	raw, err := net.Dial("tcp", e.addr(port))
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(strict{raw.(*net.TCPConn)}, e.config(t, protocols...))
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c
}

// strict makes an end without TLS's close_notify an error.
type strict struct{ *net.TCPConn }

func (c strict) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if err == io.EOF {
		err = errors.New("cut")
	}
	return n, err
}

// serveWorkload serves HTTP/1.1 as a workload does and returns its port.
func serveWorkload(t *testing.T, handler http.Handler) uint32 {
	t.Helper()
	l := listenWorkload(t)
	s := &http.Server{Handler: handler}
	var done sync.WaitGroup
	done.Go(func() { s.Serve(l) })
	t.Cleanup(func() {
		s.Close()
		done.Wait()
	})
	return portOf(l)
}

func listenWorkload(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func portOf(l net.Listener) uint32 { return uint32(l.Addr().(*net.TCPAddr).Port) }

// closedPort is a port on which nobody listens.
func closedPort(t *testing.T) uint32 {
	t.Helper()
	l := listenWorkload(t)
	l.Close()
	return portOf(l)
}

// serveStreams serves byte streams as a workload does.
func serveStreams(t *testing.T, serve func(*net.TCPConn)) uint32 {
	t.Helper()
	l := listenWorkload(t)
	var done sync.WaitGroup
	done.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			done.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(30 * time.Second))
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		done.Wait()
	})
	return portOf(l)
}

// get returns status, header and body, or fails the test.
func get(t *testing.T, c *http.Client, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	return do(t, c, req)
}

func do(t *testing.T, c *http.Client, req *http.Request) (*http.Response, string) {
	t.Helper()
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

// rule is that of the refusal in err, or "".
func rule(err error) attestation.Rule {
	var refused *attestation.Error
	if errors.As(err, &refused) {
		return refused.Rule
	}
	return ""
}

func url(port uint32, path string) string {
	return "https://app.example:" + strconv.FormatUint(uint64(port), 10) + path
}
