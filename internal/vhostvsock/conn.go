package vhostvsock

import (
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// conn is one stream. Its device's mutex guards all of it, but the reads and writes of its socket.
type conn struct {
	d       *Device
	key     key
	sock    *net.UnixConn // nil while the guest's request is not answered
	changed *sync.Cond

	established bool
	done        bool // no packet of it follows

	// Towards the guest.
	out       []byte // read from the socket
	ready     bool   // in the device's list
	sent      uint32 // bytes, counted round
	peerAlloc uint32 // the guest's window
	peerFwd   uint32 // what the guest has consumed of sent
	tails     []uint32
	recvShut  bool // the guest receives no more

	// From the guest.
	greeting string // goes first, when the guest has accepted
	in       []byte // for the socket
	busy     uint32 // bytes that are being written to it
	fwd      uint32 // bytes consumed, counted round
	told     uint32 // what the guest knows of fwd
	sendShut bool   // the guest sends no more
}

func newConn(d *Device, k key) *conn {
	s := &conn{d: d, key: k}
	s.changed = sync.NewCond(&d.mu)
	return s
}

func (s *conn) header(op uint16, flags uint32) header {
	s.told = s.fwd
	return header{
		srcCID: ParentCID, dstCID: GuestCID, srcPort: s.key.host, dstPort: s.key.guest,
		kind: typeStream, op: op, flags: flags, bufAlloc: window, fwdCnt: s.fwd,
	}
}

func (s *conn) reply(op uint16, flags uint32) {
	s.d.replies = append(s.d.replies, s.header(op, flags))
}

// credits takes what every packet says of the guest's window.
func (s *conn) credits(h header) {
	s.peerAlloc, s.peerFwd = h.bufAlloc, h.fwdCnt
	for len(s.tails) > 0 && int32(s.tails[0]-s.peerFwd) <= 0 {
		s.tails = s.tails[1:]
	}
	s.offer()
}

// credit returns how many bytes the guest takes now. Beyond slots it takes none, until it has read: then it
// says so, at the latest when it has read everything.
func (s *conn) credit() int {
	if uint32(len(s.tails)) >= max(s.peerAlloc/slot, 1) {
		return 0
	}
	return int(max(int64(s.peerAlloc)-int64(s.sent-s.peerFwd), 0))
}

// offer enters the stream into the list of those that have bytes for the guest.
func (s *conn) offer() {
	if !s.ready && !s.done && len(s.out) > 0 {
		s.ready = true
		s.d.ready = append(s.d.ready, s)
	}
}

// accept answers the guest's request.
func (s *conn) accept() {
	sock, err := s.d.dial(s.key.host)
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case err != nil && !s.done:
		s.abort()
	case err == nil && s.done:
		sock.Close()
	case err == nil:
		s.sock = sock
		s.reply(opResponse, 0)
		s.establish()
	}
	d.progress()
}

// establish lets bytes flow.
func (s *conn) establish() {
	if _, err := io.WriteString(s.sock, s.greeting); err != nil { // never waits: nothing is in the socket yet
		s.abort()
		return
	}
	s.established = true
	var both sync.WaitGroup
	both.Add(2)
	s.d.parts.Go(func() {
		s.read()
		both.Done()
	})
	s.d.parts.Go(func() {
		s.write()
		both.Done()
	})
	s.d.parts.Go(func() {
		both.Wait()
		s.sock.Close()
	})
}

// abort ends the stream with a reset to the guest.
func (s *conn) abort() {
	if !s.done {
		s.reply(opRST, 0)
		s.finish()
	}
}

// finish forgets the stream. What the guest has sent still goes to the socket.
func (s *conn) finish() {
	if s.done {
		return
	}
	s.done = true
	delete(s.d.conns, s.key)
	s.out = nil
	s.changed.Broadcast()
	if s.sock != nil {
		if s.established {
			s.sock.CloseRead() // ends read, and whoever writes to the other end
		} else {
			s.sock.Close()
		}
	}
}

// peerShutdown takes the guest's word that it sends or receives no more.
func (s *conn) peerShutdown(flags uint32) {
	if flags&shutReceive != 0 && !s.recvShut {
		s.recvShut = true
		if s.established {
			s.sock.CloseRead()
		}
	}
	if flags&shutSend != 0 {
		s.sendShut = true
	}
	if !s.established && s.recvShut && s.sendShut {
		s.abort()
	}
	s.changed.Broadcast()
}

// read moves bytes from the socket to the guest, until one of them has had enough.
func (s *conn) read() {
	buf := make([]byte, chunk)
	for {
		n, err := s.sock.Read(buf)
		if err != nil || !s.deliver(buf[:n]) { // bytes never come with an error
			break
		}
	}
	if !s.shutdown(shutSend) {
		return
	}
	// Whoever has closed the socket altogether will not take anything either, which the guest should know
	// before it has written something.
	raw, err := s.sock.SyscallConn()
	if err != nil {
		return
	}
	err = raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		return n > 0 && err == nil && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 || s.ended()
	})
	if err == nil {
		s.shutdown(shutSend | shutReceive)
	}
}

func (s *conn) ended() bool {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	return s.done
}

// deliver returns when the guest has got b, or false when it will not.
func (s *conn) deliver(b []byte) bool {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.done {
		return false
	}
	s.out = b
	s.offer()
	d.progress()
	for len(s.out) > 0 && !s.done && !s.recvShut {
		s.changed.Wait()
	}
	s.out = nil
	return !s.done && !s.recvShut
}

// shutdown tells the guest, unless it receives nothing any more, what the socket's other end does no more.
func (s *conn) shutdown(flags uint32) bool {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.done || s.recvShut {
		return false
	}
	s.reply(opShutdown, flags)
	d.progress()
	return true
}

// write moves bytes from the guest to the socket, until the guest has sent its last.
func (s *conn) write() {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	var spare []byte
	for {
		for len(s.in) == 0 && !s.done && !s.sendShut {
			s.changed.Wait()
		}
		if len(s.in) == 0 {
			break
		}
		b := s.in
		s.in, spare = spare[:0], nil
		s.busy = uint32(len(b))
		d.mu.Unlock()
		_, err := s.sock.Write(b)
		d.mu.Lock()
		s.fwd += s.busy
		s.busy, spare = 0, b[:0]
		if err != nil {
			s.in = nil
			s.abort()
			d.progress()
			return
		}
		if s.fwd-s.told >= window/4 && !s.done {
			s.reply(opCreditUpdate, 0)
			d.progress()
		}
	}
	if s.done {
		return
	}
	s.sock.CloseWrite()
	// Half of a stream can live on. The guest waits for a reset when it has closed both.
	for !s.done && !s.recvShut {
		s.changed.Wait()
	}
	s.abort()
	d.progress()
}
