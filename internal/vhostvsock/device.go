package vhostvsock

import (
	"errors"
	"fmt"
	"math"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// ParentCID is the address at which an enclave finds its parent instance (AWS Nitro Enclaves user guide).
	ParentCID = 3
	// GuestCID is the enclave's own. Nothing but the guest sees it: each device has one guest.
	GuestCID = 16

	// window is how many bytes of one stream may be on their way from the guest to a unix socket. Guests never
	// use more than 256 KiB, which is their own window.
	window = 256 << 10
	// chunk is how much is read from a unix socket at a time, in bytes.
	chunk = 64 << 10

	// slot is what a packet may cost a guest at least, in bytes of its window: Linux since 6.12.92 counts the
	// memory around a packet, 576 bytes, and ends a stream of small packets that exceed it
	// (virtio_transport_inc_rx_pkt, net/vmw_vsock/virtio_transport_common.c).
	slot = 1024

	// maxReplies is how many packets may wait for the guest to make room, before no more is taken from it.
	maxReplies = 1024

	// firstPort is the lowest of the ports from which streams to the guest come.
	firstPort = 1 << 30
)

// Rings of the device (virtio 1.2, 5.10.2). The third, of events, is the monitor's.
const (
	toGuest = iota
	fromGuest
	rings
)

// key names a stream.
type key struct{ host, guest uint32 }

// Device is the vsock device of one guest.
type Device struct {
	dial func(port uint32) (*net.UnixConn, error)

	mu       sync.Mutex
	mem      memory
	rings    [rings]ring
	conns    map[key]*conn
	replies  []header
	ready    []*conn // have bytes for the guest, each at most once
	nextPort uint32
	closed   bool
	broken   error
	started  chan struct{}
	once     sync.Once
	parts    sync.WaitGroup // goroutines of streams
}

// New returns a device whose guest reaches the ports of its host with dial, which must not wait for long.
func New(dial func(port uint32) (*net.UnixConn, error)) *Device {
	d := &Device{dial: dial, conns: map[key]*conn{}, nextPort: firstPort, started: make(chan struct{})}
	for i := range d.rings {
		d.rings[i].call = -1
	}
	return d
}

// Started is closed when the guest has begun to use the device.
func (d *Device) Started() <-chan struct{} { return d.started }

var errClosed = errors.New("the enclave is gone")

// Connect opens a stream to a port of the guest for c. When the guest has accepted it, greeting is written
// to c; when it refuses, c is closed. The device owns c.
func (d *Device) Connect(c *net.UnixConn, port uint32, greeting string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || !d.rings[toGuest].running() {
		c.Close()
		return errClosed
	}
	for d.conns[key{d.nextPort, port}] != nil {
		d.next()
	}
	s := newConn(d, key{d.nextPort, port})
	d.next()
	s.sock, s.greeting = c, greeting
	d.conns[s.key] = s
	s.reply(opRequest, 0)
	d.progress()
	return nil
}

func (d *Device) next() {
	if d.nextPort++; d.nextPort == math.MaxUint32 { // VMADDR_PORT_ANY
		d.nextPort = firstPort
	}
}

// close ends every stream and returns when nothing of them is left.
func (d *Device) close() {
	d.mu.Lock()
	d.halt()
	d.mu.Unlock()
	d.parts.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.rings {
		if call := d.rings[i].call; call >= 0 {
			unix.Close(call)
			d.rings[i].call = -1
		}
	}
	d.mem.unmap()
	d.mem = nil
}

// halt ends every stream, and lets no other begin.
func (d *Device) halt() {
	d.closed = true
	for i := range d.rings {
		d.rings[i].stop()
	}
	for _, s := range d.conns {
		s.in = nil
		s.finish()
		if s.sock != nil {
			s.sock.Close()
		}
	}
}

// fail remembers that the guest has broken its device, which stands still then.
func (d *Device) fail(err error) {
	d.broken = fmt.Errorf("the guest has broken its vsock device: %w", err)
	d.halt()
}

// progress moves whatever can be moved between the rings and the streams. Its caller holds mu.
func (d *Device) progress() {
	rx, tx := &d.rings[toGuest], &d.rings[fromGuest]
	for {
		sent, err := d.send()
		if err == nil && sent {
			rx.interrupt()
		}
		tx.suppress(true)
		received := false
		for err == nil && tx.pending() > 0 && len(d.replies) < maxReplies {
			received = true
			err = d.receive()
		}
		if err != nil {
			d.fail(err)
			return
		}
		if received {
			tx.interrupt()
		}
		// What came before the guest knew that it must kick again is found by another look.
		tx.suppress(false)
		if !received && !(tx.pending() > 0 && len(d.replies) < maxReplies) {
			return
		}
	}
}

// send fills the guest's buffers: first replies, then bytes of the streams in turn.
func (d *Device) send() (sent bool, err error) {
	rx := &d.rings[toGuest]
	for rx.pending() > 0 {
		if len(d.replies) == 0 && len(d.ready) == 0 {
			return sent, nil
		}
		c, err := rx.pop(d.mem)
		if err != nil {
			return sent, err
		}
		room := total(c.writable) - headerSize
		if room <= 0 {
			return sent, errRing
		}
		h, payload := d.take(room)
		if h == nil { // no stream may send: the buffer stays the guest's
			rx.nextAvail--
			return sent, nil
		}
		var b [headerSize]byte
		h.encode(b[:])
		scatter(c.writable, 0, b[:])
		scatter(c.writable, headerSize, payload)
		rx.push(c, uint32(headerSize+len(payload)))
		sent = true
	}
	return sent, nil
}

// take returns the next packet for the guest, with at most room bytes, or nil.
func (d *Device) take(room int) (*header, []byte) {
	if len(d.replies) > 0 {
		h := d.replies[0]
		d.replies = d.replies[1:]
		return &h, nil
	}
	for len(d.ready) > 0 {
		s := d.ready[0]
		d.ready = d.ready[1:]
		s.ready = false
		n := min(len(s.out), room, s.credit())
		if n == 0 { // ready again with the guest's next packet
			continue
		}
		payload := s.out[:n]
		s.out = s.out[n:]
		s.sent += uint32(n)
		s.tails = append(s.tails, s.sent)
		h := s.header(opRW, 0)
		h.length = uint32(n)
		if len(s.out) > 0 {
			s.offer()
		} else {
			s.changed.Broadcast()
		}
		return &h, payload
	}
	return nil, nil
}

// receive takes one packet from the guest.
func (d *Device) receive() error {
	tx := &d.rings[fromGuest]
	c, err := tx.pop(d.mem)
	if err != nil {
		return err
	}
	var b [headerSize]byte
	if gather(b[:], c.readable, 0) < headerSize {
		return errRing
	}
	var h header
	h.decode(b[:])
	if uint64(h.length) > uint64(total(c.readable)-headerSize) || h.op != opRW && h.length > 0 {
		return errRing
	}
	d.handle(h, c.readable)
	tx.push(c, 0)
	return nil
}

// handle does what a packet says; its payload lies behind the header in pieces.
func (d *Device) handle(h header, pieces [][]byte) {
	if h.srcCID != GuestCID || h.kind != typeStream || h.dstCID != ParentCID {
		d.refuse(h)
		return
	}
	k := key{h.dstPort, h.srcPort}
	s := d.conns[k]
	if h.op == opRequest {
		if s != nil {
			s.abort()
			d.refuse(h)
			return
		}
		s = newConn(d, k)
		s.credits(h)
		d.conns[k] = s
		d.parts.Go(s.accept)
		return
	}
	if s == nil {
		d.refuse(h)
		return
	}
	s.credits(h)
	switch h.op {
	case opResponse:
		if s.established || s.sock == nil {
			s.abort()
			return
		}
		s.establish()
	case opRST:
		s.finish()
	case opShutdown:
		s.peerShutdown(h.flags)
	case opRW:
		if !s.established || s.sendShut || uint32(len(s.in))+s.busy+h.length > window {
			s.abort()
			return
		}
		n := len(s.in)
		s.in = append(s.in, make([]byte, h.length)...)
		gather(s.in[n:], pieces, headerSize)
		s.changed.Broadcast()
	case opCreditUpdate:
	case opCreditRequest:
		s.reply(opCreditUpdate, 0)
	default:
		s.abort()
	}
}

// refuse answers a packet of no stream with a reset, but never a reset.
func (d *Device) refuse(h header) {
	if h.op == opRST {
		return
	}
	d.replies = append(d.replies, header{
		srcCID: h.dstCID, dstCID: GuestCID, srcPort: h.dstPort, dstPort: h.srcPort, kind: h.kind, op: opRST,
	})
}
