package relay

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"

	"cloister.dev/cloister/internal/vsock"
)

// Egress carries streams that an enclave opens to a unix socket, on which Envoy takes them. It is safe for
// concurrent use.
type Egress struct {
	socket string
	wg     sync.WaitGroup

	mu       sync.Mutex
	session  *session // nil: no enclave
	listener net.Listener
	port     uint32
}

// NewEgress returns an Egress without an enclave. It must be closed.
func NewEgress(socket string) *Egress { return &Egress{socket: socket} }

// Set makes t the only enclave that is listened for, and returns the vsock port of the host: the given
// one, or a free one if it is 0. For a generation that is set already it changes nothing. Connections of
// another generation are closed within flushTime; Set does not wait for it. T nil means no enclave.
func (e *Egress) Set(t *Target, port uint32) (uint32, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if t != nil && e.session != nil && e.session.Generation == t.Generation {
		return e.port, nil
	}
	if e.session != nil {
		e.listener.Close()
		e.session.end()
		e.session = nil
	}
	if t == nil {
		return 0, nil
	}
	l, port, err := listenHost(t.Address, port)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &session{Target: *t, ctx: ctx, end: cancel}
	e.session, e.listener, e.port = s, t.Secret.Listen(l, port), port
	listener := e.listener
	e.wg.Go(func() { e.accept(s, listener) })
	return port, nil
}

func listenHost(target string, port uint32) (net.Listener, uint32, error) {
	ports := []uint32{port}
	if port == 0 {
		ports = nil
		for range 10 {
			ports = append(ports, vsock.FirstHostPort+rand.Uint32N(1<<31))
		}
	}
	var err error
	for _, port := range ports {
		var l net.Listener
		if l, err = vsock.Listen(target, port); err == nil {
			return l, port, nil
		}
	}
	return nil, 0, fmt.Errorf("listen for the enclave's egress: %w", err)
}

// Close ends everything and returns when nothing runs any more.
func (e *Egress) Close() error {
	_, err := e.Set(nil, 0)
	e.wg.Wait()
	return err
}

func (e *Egress) accept(s *session, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil { // it is closed: a Secret's listener has no other error
			return
		}
		e.wg.Go(func() { s.carryOut(c, e.socket) })
	}
}

// carryOut joins a connection of the enclave's with Envoy. If Envoy cannot be reached the enclave sees its
// connection closed, without a byte.
func (s *session) carryOut(c net.Conn, socket string) {
	defer c.Close()
	defer s.flush(c)()
	var d net.Dialer
	ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
	defer cancel()
	envoy, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return
	}
	defer envoy.Close()
	defer s.flush(envoy)()
	if enclave, ok := c.(stream); ok {
		join(enclave, envoy.(*net.UnixConn))
	}
}
