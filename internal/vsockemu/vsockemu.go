// Package vsockemu stands for the AF_VSOCK of a node in tests of Nitro enclaves, where there is none. As
// there, every process can bind and reach every port of the node, a port is bound once, and a connection
// shows the context id at its other end.
//
// An address of the node is an abstract unix socket, @DIR/CID/PORT, which goes with its process (unix(7)).
// Each enclave has hybrid sockets (package vsock) in the folder DIR/CID.
package vsockemu

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"cloister.dev/cloister/internal/vsock"
)

// EnvNode is the environment variable with the node's folder.
const EnvNode = "CLOISTER_VSOCKEMU_NODE"

// HostCID is the context id of the node itself.
const HostCID = 3

// Node is the folder of a node. Its path must be short: addresses have at most 107 bytes.
type Node string

func (n Node) addr(cid, port uint32) *net.UnixAddr {
	return &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("@%s/%d/%d", n, cid, port)}
}

// Listen binds a port of the node.
func (n Node) Listen(port uint32) (net.Listener, error) {
	l, err := net.ListenUnix("unix", n.addr(HostCID, port))
	if err != nil {
		return nil, err
	}
	return l, nil
}

// Dial connects from a context id to a port of the node.
func (n Node) Dial(from, port uint32) (*net.UnixConn, error) {
	return net.DialUnix("unix", n.addr(from, 1<<31+rand.Uint32N(1<<31)), n.addr(HostCID, port))
}

// PeerCID returns the context id at the other end of a connection that a listener of the node accepted.
func (n Node) PeerCID(c net.Conn) (uint32, error) {
	address := c.RemoteAddr().String()
	rest, ok := strings.CutPrefix(address, "@"+string(n)+"/")
	cid, _, _ := strings.Cut(rest, "/")
	id, err := strconv.ParseUint(cid, 10, 32)
	if !ok || err != nil {
		return 0, fmt.Errorf("%q is no address of the node", address)
	}
	return uint32(id), nil
}

// Folder is where the hybrid sockets of an enclave are.
func (n Node) Folder(cid uint32) string {
	return filepath.Join(string(n), strconv.FormatUint(uint64(cid), 10))
}

// Target is where the ports of an enclave are dialled, for vsock.Dial.
func (n Node) Target(cid uint32) string {
	return "unix://" + filepath.Join(n.Folder(cid), vsock.HybridName)
}

// Ports returns the ports of the node that are bound.
func (n Node) Ports() ([]uint32, error) {
	b, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, err
	}
	const listening = "00010000" // __SO_ACCEPTCON (include/uapi/linux/net.h)
	var ports []uint32
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 8 || f[3] != listening {
			continue
		}
		if port, ok := strings.CutPrefix(f[7], fmt.Sprintf("@%s/%d/", n, HostCID)); ok {
			p, err := strconv.ParseUint(port, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("parse %q: %w", f[7], err)
			}
			ports = append(ports, uint32(p))
		}
	}
	return ports, nil
}

// Connect makes the folder of an enclave, and its way to the ports of the node that are bound now. Close
// takes both away.
func (n Node) Connect(cid uint32) (ports []uint32, close func(), err error) {
	if ports, err = n.Ports(); err != nil {
		return nil, nil, err
	}
	if err := os.Mkdir(n.Folder(cid), 0o755); err != nil {
		return nil, nil, err
	}
	var listeners []net.Listener
	close = func() {
		for _, l := range listeners {
			l.Close()
		}
		os.RemoveAll(n.Folder(cid))
	}
	for _, port := range ports {
		l, err := vsock.Listen(n.Target(cid), port)
		if err != nil {
			close()
			return nil, nil, err
		}
		listeners = append(listeners, l)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go n.relay(c.(*net.UnixConn), cid, port)
			}
		}()
	}
	return ports, close, nil
}

// relay carries one stream of an enclave to a port of the node.
func (n Node) relay(c *net.UnixConn, cid, port uint32) {
	defer c.Close()
	host, err := n.Dial(cid, port)
	if err != nil {
		return
	}
	defer host.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(host, c)
		host.CloseWrite()
	}()
	io.Copy(c, host)
	c.CloseWrite()
	<-done
}
