package nitroemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/vsock"
)

// TestVsockArguments: what AF_VSOCK is asked for, by a host and by an enclave. Nothing is ever dialled: the sockets are
// unix ones, and every bind and connect fails before the kernel sees it.
func TestVsockArguments(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("seccomp notification needs root")
	}
	var mu sync.Mutex
	var seen []string
	answer := func(c *Call) Answer {
		mu.Lock()
		defer mu.Unlock()
		if c.Nr == unix.SYS_SOCKET {
			if c.Args[0] != unix.AF_VSOCK {
				return Answer{Continue: true}
			}
			seen = append(seen, fmt.Sprintf("socket type %#x protocol %d", c.Args[1]&^(unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK), c.Args[2]))
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return Answer{Errno: err.(unix.Errno)}
			}
			return Answer{File: os.NewFile(uintptr(fd), "socket")}
		}
		name := map[int32]string{unix.SYS_BIND: "bind", unix.SYS_CONNECT: "connect"}[c.Nr]
		b, err := c.Read(c.Args[1], int(c.Args[2]))
		if err != nil || len(b) != 16 { // struct sockaddr_vm (include/uapi/linux/vm_sockets.h)
			seen = append(seen, fmt.Sprintf("%s %d bytes, %v", name, len(b), err))
		} else {
			seen = append(seen, fmt.Sprintf("%s family %d cid %d port %d", name,
				binary.NativeEndian.Uint16(b), binary.NativeEndian.Uint32(b[8:]), binary.NativeEndian.Uint32(b[4:])))
		}
		return Answer{Errno: unix.ENODEV}
	}
	for name, tc := range map[string]struct {
		do   func() error
		want []string
	}{
		"a host dials an enclave": {
			func() error { _, err := vsock.Dial(t.Context(), "vsock://16", 8080); return err },
			[]string{"socket type 0x1 protocol 0", "connect family 40 cid 16 port 8080"},
		},
		"a host listens": {
			func() error { _, err := vsock.Listen("vsock://16", 70000); return err },
			[]string{"socket type 0x1 protocol 0", "bind family 40 cid 4294967295 port 70000"},
		},
		"an enclave dials its host": {
			func() error {
				g, err := vsock.NewGuest()
				if err != nil {
					return err
				}
				_, err = g.Dial(t.Context(), 9000)
				return err
			},
			[]string{"socket type 0x1 protocol 0", "connect family 40 cid 3 port 9000"},
		},
		"an enclave listens": {
			func() error {
				g, err := vsock.NewGuest()
				if err != nil {
					return err
				}
				_, err = g.Listen(443)
				return err
			},
			[]string{"socket type 0x1 protocol 0", "bind family 40 cid 4294967295 port 443"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			seen = nil
			var err error
			if trap := Trap([]int{unix.SYS_SOCKET, unix.SYS_BIND, unix.SYS_CONNECT}, answer, func() { err = tc.do() }); trap != nil {
				t.Fatal(trap)
			}
			var op *net.OpError
			if !errors.Is(err, unix.ENODEV) || !errors.As(err, &op) {
				t.Errorf("error %v", err)
			}
			mu.Lock()
			defer mu.Unlock()
			if diff := cmp.Diff(tc.want, slices.Clone(seen)); diff != "" {
				t.Errorf("system calls (-want +got):\n%s", diff)
			}
		})
	}
}
