package vsockemu

import (
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"

	"cloister.dev/cloister/internal/vsock"
)

// node is a node with a short path.
func node(t *testing.T) Node {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "n")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return Node(dir)
}

func TestNode(t *testing.T) {
	n := node(t)
	l, err := n.Listen(9000)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := n.Listen(9000); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a port bound twice: %v", err)
	}
	ports, disconnect, err := n.Connect(16)
	if err != nil {
		t.Fatal(err)
	}
	defer disconnect()
	if !slices.Equal(ports, []uint32{9000}) {
		t.Errorf("ports %v", ports)
	}
	echo := func(c net.Conn) {
		defer c.Close()
		io.Copy(c, c)
	}
	try := func(c *net.UnixConn, cid uint32) {
		t.Helper()
		defer c.Close()
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := n.PeerCID(accepted); err != nil || got != cid {
			t.Errorf("peer %d, %v, want %d", got, err, cid)
		}
		go echo(accepted)
		io.WriteString(c, "ping")
		c.CloseWrite()
		if b, err := io.ReadAll(c); err != nil || string(b) != "ping" {
			t.Errorf("%q, %v", b, err)
		}
	}
	enclave, err := net.Dial("unix", vsock.HostPath(n.Folder(16)+"/"+vsock.HybridName, 9000))
	if err != nil {
		t.Fatal(err)
	}
	try(enclave.(*net.UnixConn), 16)
	foreign, err := n.Dial(HostCID, 9000)
	if err != nil {
		t.Fatal(err)
	}
	try(foreign, HostCID)

	unnamed, err := net.DialUnix("unix", nil, n.addr(HostCID, 9000))
	if err != nil {
		t.Fatal(err)
	}
	defer unnamed.Close()
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	if cid, err := n.PeerCID(accepted); err == nil {
		t.Errorf("who has no address is %d", cid)
	}
	disconnect()
	if _, err := os.Stat(n.Folder(16)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the enclave's folder: %v", err)
	}
}
