package relay

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// addToLoopback makes an address local: RTM_NEWADDR, for this address alone (rtnetlink(7)).
func addToLoopback(a netip.Addr) error {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, newAddress(a, uint32(lo.Index)), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	// struct nlmsghdr, then struct nlmsgerr, which begins with the error number, negative.
	if n < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return fmt.Errorf("rtnetlink answers with %d bytes of another kind", n)
	}
	errno := unix.Errno(-int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])))
	if errno != 0 && errno != unix.EEXIST {
		return errno
	}
	return awaitAddress(a)
}

// An address works at once, or after a moment if it is of IPv6 (addrconf_dad_work, net/ipv6/addrconf.c).
const (
	addressTimeout = 5 * time.Second
	addressPause   = 5 * time.Millisecond
)

// awaitAddress returns when a connection to the address arrives.
func awaitAddress(a netip.Addr) error {
	l, err := net.Listen("tcp", netip.AddrPortFrom(a, 0).String())
	if err != nil {
		return err
	}
	defer l.Close()
	for end := time.Now().Add(addressTimeout); ; time.Sleep(addressPause) {
		c, err := net.DialTimeout("tcp", l.Addr().String(), 10*addressPause)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(end) {
			return err
		}
	}
}

// newAddress is the request: struct nlmsghdr, struct ifaddrmsg and the attributes IFA_LOCAL and
// IFA_ADDRESS (linux/netlink.h, linux/if_addr.h).
func newAddress(a netip.Addr, index uint32) []byte {
	family := byte(unix.AF_INET)
	if a.Is6() {
		family = unix.AF_INET6
	}
	var b bytes.Buffer
	put := func(values ...any) {
		for _, v := range values {
			binary.Write(&b, binary.NativeEndian, v)
		}
	}
	raw := a.AsSlice()
	size := unix.NLMSG_HDRLEN + unix.SizeofIfAddrmsg + 2*(unix.SizeofRtAttr+len(raw))
	put(uint32(size), uint16(unix.RTM_NEWADDR), uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL), uint32(1), uint32(0))
	put(family, byte(a.BitLen()), byte(unix.IFA_F_NODAD), byte(unix.RT_SCOPE_UNIVERSE), index)
	for _, kind := range []uint16{unix.IFA_LOCAL, unix.IFA_ADDRESS} {
		put(uint16(unix.SizeofRtAttr+len(raw)), kind)
		b.Write(raw)
	}
	return b.Bytes()
}
