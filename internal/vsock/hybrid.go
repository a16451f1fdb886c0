package vsock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// HybridDir is where an enclave without AF_VSOCK finds its hybrid sockets.
	HybridDir = "/run/vsock"
	// HybridName is the name of the guest's socket in its directory.
	HybridName = "vsock.sock"

	// preambleTimeout bounds "CONNECT" and the proof of a secret: both ends answer at once.
	preambleTimeout = 5 * time.Second
)

// HostPath returns the path of the unix socket on which a host listens for port, given the path of the
// guest's socket.
func HostPath(guest string, port uint32) string {
	return guest + "_" + strconv.FormatUint(uint64(port), 10)
}

// listenHybrid binds a port of the host beside the guest's socket at path.
func listenHybrid(path string, port uint32) (net.Listener, error) {
	path = HostPath(path, port)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// Whoever plays the guest may have another uid.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// dialHybrid connects to a port of the guest whose socket is at path.
func dialHybrid(ctx context.Context, path string, port uint32) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	err = func() error {
		if err := c.SetDeadline(time.Now().Add(preambleTimeout)); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(c, "CONNECT %d\n", port); err != nil {
			return err
		}
		line, err := readLine(c)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(line, "OK ") {
			return fmt.Errorf("unexpected answer %q", line)
		}
		return nil
	}()
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = c.SetDeadline(time.Time{})
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to port %d of the enclave at %s: %w", port, path, err)
	}
	return c, nil
}

// readLine reads up to and without "\n", at most 32 bytes, and not one byte of what follows.
func readLine(r io.Reader) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for len(line) < 32 {
		if _, err := io.ReadFull(r, b); err != nil {
			return "", err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return "", errors.New("line too long")
}

// hybridGuest is the guest's end of hybrid sockets.
type hybridGuest struct {
	path string
	l    net.Listener

	mu    sync.Mutex
	ports map[uint32]*portListener
	n     uint64
}

// newHybridGuest listens on the guest's socket in dir.
func newHybridGuest(dir string) (*hybridGuest, error) {
	path := filepath.Join(dir, HybridName)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// The sidecar has another uid. The directory is mounted in this pod's own containers only.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	g := &hybridGuest{path: path, l: l, ports: map[uint32]*portListener{}}
	go g.accept()
	return g, nil
}

func (g *hybridGuest) accept() {
	for {
		c, err := g.l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors: the next try may find one
			continue
		}
		go g.connect(c)
	}
}

// ReadConnect reads from a host that has connected to a guest's socket which port it wants. The answer is
// "OK <number>\n", or the end of the connection.
func ReadConnect(c net.Conn) (port uint32, err error) {
	if err := c.SetDeadline(time.Now().Add(preambleTimeout)); err != nil {
		return 0, err
	}
	line, err := readLine(c)
	if err != nil {
		return 0, err
	}
	arg, ok := strings.CutPrefix(line, "CONNECT ")
	if !ok {
		return 0, errors.New("it does not begin with CONNECT")
	}
	n, err := strconv.ParseUint(arg, 10, 32)
	if err != nil {
		return 0, err
	}
	return uint32(n), c.SetDeadline(time.Time{})
}

func (g *hybridGuest) connect(c net.Conn) {
	port, err := ReadConnect(c)
	if err != nil {
		c.Close()
		return
	}
	g.mu.Lock()
	l := g.ports[port]
	g.n++
	n := g.n
	g.mu.Unlock()
	if l == nil { // as a reset: nobody listens
		c.Close()
		return
	}
	if _, err := fmt.Fprintf(c, "OK %d\n", n); err != nil {
		c.Close()
		return
	}
	l.deliver(c)
}

func (g *hybridGuest) Listen(port uint32) (net.Listener, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ports[port] != nil {
		return nil, fmt.Errorf("listen on vsock port %d: address already in use", port)
	}
	l := newPortListener(addr{port: port}, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.ports, port)
	})
	g.ports[port] = l
	return l, nil
}

func (g *hybridGuest) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", HostPath(g.path, port))
}

// portListener is a net.Listener whose connections somebody else accepts.
type portListener struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	close func()
	once  sync.Once
}

func newPortListener(a net.Addr, onClose func()) *portListener {
	return &portListener{addr: a, conns: make(chan net.Conn), done: make(chan struct{}), close: onClose}
}

func (l *portListener) deliver(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	}
}

func (l *portListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *portListener) Close() error {
	l.once.Do(func() {
		l.close()
		close(l.done)
	})
	return nil
}

func (l *portListener) Addr() net.Addr { return l.addr }

// addr is a vsock port of the enclave itself.
type addr struct{ port uint32 }

func (addr) Network() string  { return "vsock" }
func (a addr) String() string { return strconv.FormatUint(uint64(a.port), 10) }
