package vsock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// Guest is an enclave's way to listen on its own ports and to reach ports of its host.
type Guest interface {
	Listen(port uint32) (net.Listener, error)
	Dial(ctx context.Context, port uint32) (net.Conn, error)
}

// hostCID is the context id at which an enclave finds its parent instance (AWS Nitro Enclaves user
// guide; VMADDR_CID_HOST, 2, is not served there).
const hostCID = 3

// NewGuest uses the hybrid sockets in HybridDir where that directory exists, and AF_VSOCK otherwise.
// The initial ramdisk has no such directory, so only a driver that prepares the file system of its
// enclave can choose.
func NewGuest() (Guest, error) {
	switch _, err := os.Stat(HybridDir); {
	case err == nil:
		return NewHybridGuest(HybridDir)
	case errors.Is(err, fs.ErrNotExist):
		return afVsock{}, nil
	default:
		return nil, err
	}
}

// NewHybridGuest uses hybrid sockets in dir, for as long as the process lives.
func NewHybridGuest(dir string) (Guest, error) {
	g, err := newHybridGuest(dir)
	if err != nil {
		return nil, err
	}
	return g, nil
}

type afVsock struct{}

func (afVsock) Listen(port uint32) (net.Listener, error) { return ListenAny(port) }

// Dial ignores ctx: AF_VSOCK's connect has a time-out of 2 s of its own (net/vmw_vsock/af_vsock.c).
func (afVsock) Dial(_ context.Context, port uint32) (net.Conn, error) {
	return vsock.Dial(hostCID, port, nil)
}

// FirstHostPort is the lowest port of a host that a part of ours listens on, but for the control channel:
// no containerPort is as high.
const FirstHostPort = 1 << 16

// Listen binds a port of the host for the enclave at target, which is as in Dial. A hybrid socket that a
// former process of the same user left is replaced.
func Listen(target string, port uint32) (net.Listener, error) {
	switch scheme, rest, _ := strings.Cut(target, "://"); scheme {
	case "unix":
		return listenHybrid(rest, port)
	case "vsock":
		return ListenAny(port)
	default:
		return nil, fmt.Errorf("target %q is neither unix://PATH nor vsock://CID", target)
	}
}

// ListenAny binds an AF_VSOCK port of this machine. No context id is asked for: that needs /dev/vsock, which
// containers do not have.
func ListenAny(port uint32) (net.Listener, error) {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil { // and not a nil *vsock.Listener
		return nil, err
	}
	return l, nil
}

// PeerCID returns the context id at the other end of an AF_VSOCK connection, which its sender cannot choose.
func PeerCID(c net.Conn) (uint32, error) {
	a, ok := c.RemoteAddr().(*vsock.Addr)
	if !ok {
		return 0, fmt.Errorf("%T is no AF_VSOCK connection", c)
	}
	return a.ContextID, nil
}

// Dial connects a host to a port of an enclave. Target is "unix://PATH" for the guest's hybrid socket
// or "vsock://CID".
func Dial(ctx context.Context, target string, port uint32) (net.Conn, error) {
	switch scheme, rest, _ := strings.Cut(target, "://"); scheme {
	case "unix":
		return dialHybrid(ctx, rest, port)
	case "vsock":
		cid, err := strconv.ParseUint(rest, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("parse target %q: %w", target, err)
		}
		return vsock.DialContext(ctx, uint32(cid), port, nil)
	default:
		return nil, fmt.Errorf("target %q is neither unix://PATH nor vsock://CID", target)
	}
}
