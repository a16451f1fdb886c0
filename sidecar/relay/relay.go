// Package relay joins unix sockets, which Envoy connects to, with ports of an enclave, which it cannot
// dial itself: Envoy knows no vsock address.
//
// For each port there is one unix socket, for the whole life of the sidecar. A connection to it is
// carried to the same vsock port of the enclave that is the target at that moment. When the target
// changes, the connections of the former one are closed, within flushTime.
//
// Egress is the other direction: a port of the host that the enclave dials, and a unix socket of Envoy's.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"cloister.dev/cloister/internal/vsock"
)

const (
	// dialTimeout bounds connecting to the enclave, which answers at once or not at all.
	dialTimeout = 5 * time.Second

	// flushTime is what a connection has, when its enclave has ended, to carry what the enclave had sent
	// before: the end of the last answer may still be on its way.
	flushTime = 200 * time.Millisecond
)

// Target is one enclave.
type Target struct {
	// Generation tells enclaves apart: a Target of the generation that is set already changes nothing.
	Generation uint64
	// Address is what vsock.Dial takes.
	Address string
	Secret  vsock.Secret
}

// Relay listens on the unix sockets. It is safe for concurrent use.
type Relay struct {
	dir       string
	listeners []net.Listener
	wg        sync.WaitGroup
	active    atomic.Int64

	mu      sync.Mutex
	session *session // nil: no target
}

// session is the time during which one enclave is the target.
type session struct {
	Target
	ctx context.Context // ends with the session
	end context.CancelFunc
}

// SocketPath returns the path of the socket for port in dir.
func SocketPath(dir string, port uint16) string {
	return filepath.Join(dir, strconv.Itoa(int(port))+".sock")
}

// Listen creates dir (mode 0700) and a socket in it for each port, in place of a socket that an earlier
// process left there. There is no target at first. The relay must be closed.
func Listen(dir string, ports []uint16) (*Relay, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create relay sockets: %w", err)
	}
	r := &Relay{dir: dir}
	for _, port := range ports {
		path := SocketPath(dir, port)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.Close()
			return nil, fmt.Errorf("create relay socket: %w", err)
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			r.Close()
			return nil, fmt.Errorf("create relay socket: %w", err)
		}
		r.listeners = append(r.listeners, l)
		r.wg.Go(func() { r.accept(l, uint32(port)) })
	}
	return r, nil
}

// Set makes t the target of new connections; nil means that there is none. Connections of another
// generation are closed, within flushTime; Set does not wait for it.
func (r *Relay) Set(t *Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if t != nil && r.session != nil && r.session.Generation == t.Generation {
		return
	}
	if r.session != nil {
		r.session.end()
		r.session = nil
	}
	if t != nil {
		ctx, cancel := context.WithCancel(context.Background())
		r.session = &session{Target: *t, ctx: ctx, end: cancel}
	}
}

// Active returns the number of connections that are carried or being dialled.
func (r *Relay) Active() int { return int(r.active.Load()) }

// Close closes the sockets and all connections and returns when nothing of the relay runs any more.
func (r *Relay) Close() error {
	var errs []error
	for _, l := range r.listeners {
		errs = append(errs, l.Close())
	}
	r.Set(nil)
	r.wg.Wait()
	return errors.Join(errs...)
}

func (r *Relay) accept(l *net.UnixListener, port uint32) {
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors: the next try may find one
			continue
		}
		r.mu.Lock()
		s := r.session
		r.mu.Unlock()
		if s == nil {
			c.Close()
			continue
		}
		r.active.Add(1)
		r.wg.Go(func() {
			defer r.active.Add(-1)
			s.carry(c, port)
		})
	}
}

// carry connects client to port of the session's enclave and returns when the connection has ended. If
// the enclave cannot be reached the client sees its connection closed, without a byte.
func (s *session) carry(client *net.UnixConn, port uint32) {
	defer client.Close()
	defer s.flush(client)()

	ctx, cancel := context.WithTimeout(s.ctx, dialTimeout)
	defer cancel()
	c, err := s.Secret.Dial(ctx, port, func(ctx context.Context, port uint32) (net.Conn, error) {
		return vsock.Dial(ctx, s.Address, port)
	})
	if err != nil {
		return // often, while an enclave ends; the client sees it
	}
	defer c.Close()
	defer s.flush(c)()
	if enclave, ok := c.(stream); ok {
		join(client, enclave)
	}
}

// flush gives c flushTime when the session ends.
func (s *session) flush(c net.Conn) (stop func() bool) {
	return context.AfterFunc(s.ctx, func() { c.SetDeadline(time.Now().Add(flushTime)) })
}
