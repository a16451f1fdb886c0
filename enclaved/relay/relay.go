// Package relay is the enclave's way out. It reaches what is measured and nothing else: a TCP stream to
// host:port goes by HTTP/2 CONNECT (RFC 9113, section 8.5) over a vsock stream to the sidecar of the pod,
// which resolves the name and connects. The host sees names, sizes and times, and whatever is not
// encrypted, which is left to who dials.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/vsock"
)

// window is how much may be on its way to a reader of a stream that does not read, in bytes.
const window = 256 << 10

// ErrNotAllowed is returned for what is not in the measured list.
var ErrNotAllowed = errors.New("it is not in the measured list of what this enclave may reach")

// ErrRefused is returned when the sidecar has another list, or none.
var ErrRefused = errors.New("the sidecar refuses to connect to it")

// ErrUnreachable is returned when the sidecar cannot resolve the name or cannot connect.
var ErrUnreachable = errors.New("the sidecar cannot reach it")

// Relay dials. It is safe for concurrent use.
type Relay struct {
	allowed   []string
	transport *http.Transport
}

// New returns a relay to the sidecar's vsock port hostPort, 0 if it has none, that reaches allowed, a list
// of "host:port" as workload.ParseEndpoint reads them.
func New(secret vsock.Secret, guest vsock.Guest, hostPort uint32, allowed []string) *Relay {
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	return &Relay{
		allowed: slices.Clone(allowed),
		transport: &http.Transport{
			Protocols:          protocols,
			DisableCompression: true,
			HTTP2:              &http.HTTP2Config{MaxReceiveBufferPerStream: window, MaxReceiveBufferPerConnection: window},
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				if hostPort == 0 {
					return nil, errors.New("the sidecar has registered no port for egress")
				}
				return secret.Dial(ctx, hostPort, guest.Dial)
			},
		},
	}
}

// Dial connects to address, "host:port". Ctx bounds connecting, not the connection, which is a
// *net.UnixConn. Errors have the address, and wrap ErrNotAllowed, ErrRefused or ErrUnreachable where one
// of these is the reason.
func (r *Relay) Dial(ctx context.Context, address string) (net.Conn, error) {
	// The caller gets an end of a socket pair, with all that a connection has: deadlines, half-close.
	mine, theirs, err := socketPair()
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", address, err)
	}
	s, err := r.connect(ctx, address, mine)
	if err != nil {
		mine.Close()
		theirs.Close()
		return nil, err
	}
	go s.carry()
	return theirs, nil
}

// halfConn is a connection of which one direction can end before the other: *net.TCPConn, *net.UnixConn.
type halfConn interface {
	net.Conn
	CloseWrite() error
}

// stream is a connection of a client's, carried to a target.
type stream struct {
	client halfConn
	conn   *http.ClientConn
	answer io.ReadCloser // what the target sends
	body   *body         // what the client sends
	cancel context.CancelFunc
}

// connect asks the sidecar for address and returns a stream that must be carried. What the client sends is
// read from now on. If it fails, the caller closes the client.
func (r *Relay) connect(ctx context.Context, address string, client halfConn) (*stream, error) {
	failed := func(err error) (*stream, error) { return nil, fmt.Errorf("connect to %s: %w", address, err) }
	if !slices.Contains(r.allowed, address) {
		return failed(ErrNotAllowed)
	}
	// One vsock stream for each connection: each has the back-pressure and the end of its own.
	conn, err := r.transport.NewClientConn(ctx, "http", address)
	if err != nil {
		return failed(err)
	}
	s := &stream{client: client, conn: conn, body: &body{client: client, ended: make(chan struct{})}}
	var life context.Context
	life, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, s.cancel)
	res, err := conn.RoundTrip((&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "http", Host: address}, Host: address,
		Header: http.Header{"User-Agent": nil}, Body: s.body, ContentLength: -1,
	}).WithContext(life))
	if !stop() && ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	if err == nil && res.StatusCode != http.StatusOK {
		res.Body.Close()
		err = ErrUnreachable
		if res.StatusCode == http.StatusForbidden || res.StatusCode == http.StatusNotFound {
			err = ErrRefused
		}
	}
	if err != nil {
		s.cancel()
		conn.Close()
		return failed(err)
	}
	s.answer = res.Body
	return s, nil
}

// carry returns when both directions have ended, each passed on alone, or with the first error, which
// resets the client's connection. (Envoy ends both when the target is the first to end its own, after all
// that the target has sent.)
func (s *stream) carry() {
	defer s.conn.Close()
	defer s.cancel()
	defer s.client.Close()
	defer s.answer.Close()
	_, err := io.Copy(s.client, s.answer)
	if err == nil {
		err = s.client.CloseWrite()
	}
	if err != nil {
		reset(s.client)
		return
	}
	<-s.body.ended
}

// reset makes Close send a reset, so that a stream that was cut does not look like one that has ended.
func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
}

// body is what a client sends, as the body of a request.
type body struct {
	client net.Conn
	once   sync.Once
	ended  chan struct{} // closed when nothing more is read
}

func (b *body) Read(p []byte) (int, error) { return b.client.Read(p) }

// Close is called by the transport at the end of what the client sends, and when nobody takes it any more:
// then Read must end, but what the target has sent may still be on its way to the client.
func (b *body) Close() error {
	b.once.Do(func() {
		b.client.SetReadDeadline(time.Unix(1, 0))
		close(b.ended)
	})
	return nil
}

func socketPair() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	conns := [2]net.Conn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "relay")
		c, fileErr := net.FileConn(f)
		f.Close()
		conns[i], err = c, errors.Join(err, fileErr)
	}
	if err != nil {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return conns[0].(*net.UnixConn), conns[1].(*net.UnixConn), nil
}
