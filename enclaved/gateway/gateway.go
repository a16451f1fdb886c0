// Package gateway is the only way into an enclave: it ends TLS with the attested certificate and
// forwards HTTP/1.1, HTTP/2, gRPC, WebSocket and plain byte streams to the workload on 127.0.0.1.
//
// It can leave without failing a request. From Drain on every client is asked to go: HTTP/1.1 ones by
// "Connection: close", HTTP/2 ones by a GOAWAY that still accepts every stream (RFC 9113, section 6.8).
// New connections are served in the same way until Close.
package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"cloister.dev/cloister/workload"
)

// roundTrip is how long requests may be on their way from a client that does not know yet that it has
// to leave.
const roundTrip = time.Second

// Vault is what the gateway needs of the vault.
type Vault interface {
	// Certificate returns the attested certificate without waiting.
	Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// FreshDocument returns an attestation document with nonce; vault.ErrBusy when too many wait.
	FreshDocument(ctx context.Context, nonce []byte) ([]byte, error)
}

// Config is what a gateway serves and with what.
type Config struct {
	Manifest *workload.Manifest
	// Listen returns a listener for a port of the manifest whose connections come from this enclave's
	// own sidecar. The gateway closes it.
	Listen func(port uint32) (net.Listener, error)
	Vault  Vault
	// Authorize decides on each HTTP request before the workload sees it. It must not change the request.
	// Nil lets every request pass.
	Authorize func(*http.Request) *Verdict
	// Observe sees each HTTP request that the workload is about to get, after Authorize, and may change its
	// header. End is called after the answer, with its status, 0 when there was none. Nil sees nothing.
	Observe func(r *http.Request, port uint32) (end func(status int))
	// Reserved are headers that a Verdict may set, in lower case: clients cannot send them, nor any that
	// begins with workload.HeaderPrefix.
	Reserved []string
}

// Gateway serves the ports of one manifest.
type Gateway struct {
	ports    []*port
	draining atomic.Bool
	requests atomic.Uint64 // handed to the workload
	inflight atomic.Int64

	mu      sync.Mutex
	conns   map[*conn]struct{}
	closing bool
	empty   chan struct{} // closed when closing and no connection is left
	once    sync.Once
	err     error
}

// New returns a gateway that does not listen yet.
func New(config Config) (*Gateway, error) {
	g := &Gateway{conns: map[*conn]struct{}{}, empty: make(chan struct{})}
	for _, m := range config.Manifest.Ports {
		p, err := newPort(g, config, m)
		if err != nil {
			return nil, fmt.Errorf("create gateway: %w", err)
		}
		g.ports = append(g.ports, p)
	}
	return g, nil
}

// Start listens on every port of the manifest. All of them accept connections when it returns, or none.
func (g *Gateway) Start() error {
	for i, p := range g.ports {
		if err := p.listen(); err != nil {
			for _, p := range g.ports[:i] {
				p.listener.Close()
			}
			return fmt.Errorf("start gateway: listen on port %d: %w", p.number, err)
		}
	}
	for _, p := range g.ports {
		p.start()
	}
	return nil
}

// Requests returns how many requests were handed to the workload, and how many of these are under way. A
// connection to a tcp port is one request; what the gateway answers itself is none.
func (g *Gateway) Requests() (total, inflight uint64) {
	// In this order, so that there are never more under way than there were.
	inflight = uint64(g.inflight.Load())
	return g.requests.Load(), inflight
}

// request counts one request until its end is called.
func (g *Gateway) request() (end func()) {
	g.requests.Add(1)
	g.inflight.Add(1)
	return func() { g.inflight.Add(-1) }
}

// Drain asks every client to leave: over HTTP/1 with its next answer, over HTTP/2 now, or when its
// connection is a second old. It returns at once. No request fails because of it, and new connections
// are served in the same way.
func (g *Gateway) Drain() {
	g.draining.Store(true)
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		if c.h2 != nil {
			c.h2.leaveSoon()
		}
	}
}

// Close stops accepting, lets requests and streams end as long as ctx allows, and then cuts what is
// left, which is an error. HTTP/2 clients that Drain has not asked to leave get a second for it. Later
// calls wait for the first and return the same.
func (g *Gateway) Close(ctx context.Context) error {
	g.once.Do(func() { g.err = g.close(ctx) })
	return g.err
}

func (g *Gateway) close(ctx context.Context) error {
	g.draining.Store(true)
	for _, p := range g.ports {
		p.stopAccepting()
	}
	surprised := false
	g.mu.Lock()
	g.closing = true
	if len(g.conns) == 0 {
		close(g.empty)
	}
	for c := range g.conns {
		if c.h2 != nil && !c.h2.asked.Load() {
			surprised = true
			go c.h2.leave()
		}
	}
	g.mu.Unlock()
	if surprised { // what they send meanwhile is served
		select {
		case <-time.After(roundTrip):
		case <-g.empty:
		case <-ctx.Done():
		}
	}

	var ports sync.WaitGroup
	for _, p := range g.ports {
		ports.Go(func() { p.shutdown(ctx) })
	}
	var err error
	select {
	case <-g.empty:
	case <-ctx.Done():
		if n := g.cut(); n > 0 {
			err = fmt.Errorf("close gateway: cut %d connections: %w", n, context.Cause(ctx))
		}
	}
	ports.Wait()
	for _, p := range g.ports {
		p.end()
	}
	return err
}

// cut closes all connections and returns how many there were.
func (g *Gateway) cut() int {
	g.mu.Lock()
	left := make([]*conn, 0, len(g.conns))
	for c := range g.conns {
		left = append(left, c)
	}
	g.mu.Unlock()
	for _, c := range left {
		c.Close()
	}
	return len(left)
}

// conn is a connection from the sidecar, before TLS. It is known to the gateway until it is closed,
// whatever it became: an HTTP connection, a hijacked one or a tunnel.
type conn struct {
	net.Conn
	gateway *Gateway
	overTLS bool            // what it carries is TLS
	ctx     context.Context // ends with Close, or when a tunnel is broken off
	cancel  context.CancelFunc
	h2      *h2Conn // set when TLS has chosen HTTP/2; guarded by Gateway.mu
}

// errCut is the end of a connection without TLS's close_notify. crypto/tls takes io.EOF between two
// records for the end of the data, but anybody on the way can make one (RFC 8446, section 6.1).
var errCut = errors.New("the connection ended without TLS's end of data")

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == io.EOF && c.overTLS {
		err = errCut
	}
	return n, err
}

func (g *Gateway) track(c net.Conn, overTLS bool) *conn {
	t := &conn{Conn: c, gateway: g, overTLS: overTLS}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conns[t] = struct{}{}
	return t
}

// Close may be called more than once.
func (c *conn) Close() error {
	g := c.gateway
	g.mu.Lock()
	_, known := g.conns[c]
	delete(g.conns, c)
	if known && g.closing && len(g.conns) == 0 {
		close(g.empty)
	}
	g.mu.Unlock()
	if !known {
		return net.ErrClosed
	}
	c.cancel()
	return c.Conn.Close()
}

// CloseWrite ends the sending direction.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}
