package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"cloister.dev/cloister/workload"
)

// connectTimeout is how long a connection of the workload's waits for its target: longer than the sidecar
// tries.
const connectTimeout = 30 * time.Second

// addresses is where the workload finds the hosts that it may reach by name.
var addresses = netip.MustParsePrefix("127.64.0.0/10")

// Host is one host that the workload may reach.
type Host struct {
	// Name is a DNS name or an address, as it is in the manifest.
	Name string
	// Address belongs to the loopback device, and to this host alone.
	Address netip.Addr
	Ports   []uint16
}

// Hosts gives every host of a manifest's egress list an address, the same in every replica: a name gets
// the next one of 127.64.0.0/10, an address is its own.
func Hosts(egress []string) ([]Host, error) {
	var hosts []Host
	index := map[string]int{}
	next := addresses.Addr()
	for _, e := range egress {
		name, port, err := workload.ParseEndpoint(e)
		if err != nil {
			return nil, fmt.Errorf("egress %q: %w", e, err)
		}
		i, ok := index[name]
		if !ok {
			i = len(hosts)
			index[name] = i
			address, err := netip.ParseAddr(name)
			if err != nil {
				next = next.Next()
				address = next
			}
			if err != nil && !addresses.Contains(next) {
				return nil, fmt.Errorf("egress has more names than %s has addresses", addresses)
			}
			hosts = append(hosts, Host{Name: name, Address: address})
		}
		hosts[i].Ports = append(hosts[i].Ports, port)
	}
	return hosts, nil
}

// Lines returns what /etc/hosts must have for hosts (hosts(5)).
func Lines(hosts []Host) []string {
	var lines []string
	for _, h := range hosts {
		if addresses.Contains(h.Address) {
			lines = append(lines, fmt.Sprintf("%s\t%s", h.Address, h.Name))
		}
	}
	return lines
}

// Listeners are the workload's way to its hosts.
type Listeners struct {
	relay     *Relay
	listeners []net.Listener
	wg        sync.WaitGroup
	ctx       context.Context // ends with Close
	close     context.CancelFunc
}

// Listen opens a listener for each port of each host, and gives the loopback device the addresses that it
// lacks. A connection to one is carried to its target. If that cannot be reached the connection is closed,
// and one log line names the target. The listeners must be closed.
func (r *Relay) Listen(hosts []Host) (*Listeners, error) {
	l := &Listeners{relay: r}
	l.ctx, l.close = context.WithCancel(context.Background())
	for _, h := range hosts {
		if !h.Address.IsLoopback() {
			if err := addToLoopback(h.Address); err != nil {
				l.Close()
				return nil, fmt.Errorf("give the loopback device the address %s of egress: %w", h.Address, err)
			}
		}
		for _, port := range h.Ports {
			ln, err := net.Listen("tcp", netip.AddrPortFrom(h.Address, port).String())
			if err != nil {
				l.Close()
				return nil, fmt.Errorf("listen for egress to %s: %w", h.Name, err)
			}
			target := net.JoinHostPort(h.Name, fmt.Sprint(port))
			l.listeners = append(l.listeners, ln)
			l.wg.Go(func() { l.accept(ln, target) })
		}
	}
	return l, nil
}

// Close ends all listeners and all connections.
func (l *Listeners) Close() error {
	var errs []error
	for _, ln := range l.listeners {
		errs = append(errs, ln.Close())
	}
	l.close()
	l.wg.Wait()
	return errors.Join(errs...)
}

func (l *Listeners) accept(ln net.Listener, target string) {
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors: the next try may find one
			continue
		}
		l.wg.Go(func() { l.carry(c.(*net.TCPConn), target) })
	}
}

func (l *Listeners) carry(c *net.TCPConn, target string) {
	defer c.Close()
	defer context.AfterFunc(l.ctx, func() { c.Close() })()
	ctx, cancel := context.WithTimeout(l.ctx, connectTimeout)
	defer cancel()
	s, err := l.relay.connect(ctx, target, c)
	if err != nil {
		if l.ctx.Err() == nil {
			slog.Warn("the workload cannot connect", "target", target, "error", reason(err))
		}
		return
	}
	s.carry()
}

// reason is why a target was not connected, without anything else that an error may say.
func reason(err error) string {
	for _, known := range []error{ErrNotAllowed, ErrRefused, ErrUnreachable} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return "the sidecar does not answer"
}
