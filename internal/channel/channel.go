package channel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"cloister.dev/cloister/workload"
)

const (
	// Port is the vsock port of CID 3 that an enclave dials first (aws-nitro-enclaves-sdk-bootstrap,
	// init/init.c).
	Port = 9000
	// heartbeat is the byte that goes each way before anything else.
	heartbeat = 0xB7
	// heartbeatTimeout bounds the exchange; both ends answer at once.
	heartbeatTimeout = 10 * time.Second

	// MaxMessage bounds one message in bytes, here and on the pod socket: all that the host may supply fits,
	// with the encoding of its many parts.
	MaxMessage = workload.MaxHostValues + 4<<20

	// MaxProbeTimeout is the longest that one run of a probe may take, whoever asks for it. Kubernetes sets no
	// limit to timeoutSeconds, and a probe is answered in seconds.
	MaxProbeTimeout = 5 * time.Minute
)

// ServeEnclave exchanges the heartbeat on c, registers with register and serves gRPC on c until c
// ends, which is the end of the enclave. It closes c.
func ServeEnclave(c net.Conn, register func(grpc.ServiceRegistrar)) error {
	defer c.Close()
	if err := beat(c, true); err != nil {
		return err
	}
	s := grpc.NewServer(grpc.MaxRecvMsgSize(MaxMessage))
	register(s)
	w := &watchedConn{Conn: c, done: make(chan struct{})}
	l := &oneListener{conn: w, closed: make(chan struct{})}
	go func() {
		<-w.done
		s.Stop()
	}()
	if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve control channel: %w", err)
	}
	return nil
}

// NewClient answers the heartbeat on c, which initboot has accepted on Port, and returns a client of
// the enclave at its other end. Done is closed when the connection has ended. Closing the client
// connection closes c.
func NewClient(c net.Conn) (client *grpc.ClientConn, done <-chan struct{}, err error) {
	if err := beat(c, false); err != nil {
		c.Close()
		return nil, nil, err
	}
	w := &watchedConn{Conn: c, done: make(chan struct{})}
	once := make(chan net.Conn, 1)
	once <- w
	client, err = grpc.NewClient("passthrough:///enclave",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// There is one connection and no other: an idle one must stay.
		grpc.WithIdleTimeout(0),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case c := <-once:
				return c, nil
			default:
				return nil, errors.New("the enclave's control channel has ended")
			}
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage)),
	)
	if err != nil {
		c.Close()
		return nil, nil, err
	}
	client.Connect()
	return client, w.done, nil
}

// beat exchanges the heartbeat: the enclave speaks first.
func beat(c net.Conn, enclave bool) error {
	if err := c.SetDeadline(time.Now().Add(heartbeatTimeout)); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	b := []byte{heartbeat}
	send := func() error { _, err := c.Write([]byte{heartbeat}); return err }
	receive := func() error { _, err := io.ReadFull(c, b); return err }
	first, second := receive, send
	if enclave {
		first, second = send, receive
	}
	if err := errors.Join(first(), second()); err != nil {
		return fmt.Errorf("heartbeat: %w", err)
	}
	if b[0] != heartbeat {
		return fmt.Errorf("heartbeat: got 0x%02X, want 0x%02X", b[0], heartbeat)
	}
	return c.SetDeadline(time.Time{})
}

// watchedConn closes done at the first sign that the connection has ended. gRPC always has a read
// under way, so the sign comes at once.
type watchedConn struct {
	net.Conn
	once sync.Once
	done chan struct{}
}

func (w *watchedConn) end() { w.once.Do(func() { close(w.done) }) }

func (w *watchedConn) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err != nil {
		w.end()
	}
	return n, err
}

func (w *watchedConn) Close() error {
	w.end()
	return w.Conn.Close()
}

// oneListener yields one connection and then blocks until it is closed.
type oneListener struct {
	mu     sync.Mutex
	conn   net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *oneListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	c := l.conn
	l.conn = nil
	l.mu.Unlock()
	if c != nil {
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *oneListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{Name: "control", Net: "vsock"} }
