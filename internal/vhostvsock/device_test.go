package vhostvsock

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	slots    = 32      // of each ring
	memSize  = 2 << 20 // bytes
	guestAt  = 0x1000_0000
	userAt   = 0x7000_0000
	ringSize = 0x10000 // bytes apart; in each: descriptors, available at +0x1000, used at +0x2000
	bufferAt = 0x100000
	bufSize  = 4096
	patience = 20 * time.Second
	hostPort = 9000
)

// guest is a virtual machine with its monitor, as far as a vsock device sees them.
type guest struct {
	t          *testing.T
	d          *Device
	monitor    *net.UnixConn
	mem        []byte
	kick, call [rings]int
	next       [rings]uint16 // of the used rings
	sent       uint16
	served     chan error
	l          *net.UnixListener // the host's port hostPort
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	g := &guest{t: t, served: make(chan error, 1)}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	g.must(err)
	t.Cleanup(func() { l.Close() })
	g.l = l.(*net.UnixListener)
	g.must(g.l.SetDeadline(time.Now().Add(patience)))
	g.d = New(func(port uint32) (*net.UnixConn, error) {
		if port != hostPort {
			return nil, errors.New("nobody listens")
		}
		return net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	})
	ours, theirs := g.pair()
	g.monitor = ours
	go func() { g.served <- g.d.Serve(theirs) }()
	t.Cleanup(func() { g.monitor.Close() })

	if v := g.ask(getFeatures, nil); binary.NativeEndian.Uint64(v) != featureVersion1|featureProtocol {
		t.Fatalf("features %x", v)
	}
	config := g.ask(getConfig, append(words32(0, 8, 0), make([]byte, 8)...))
	if got := binary.LittleEndian.Uint64(config[12:]); got != GuestCID {
		t.Fatalf("the guest's CID is %d", got)
	}
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	g.must(err)
	defer unix.Close(fd)
	g.must(unix.Ftruncate(fd, memSize))
	g.mem, err = unix.Mmap(fd, 0, memSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	g.must(err)
	t.Cleanup(func() { unix.Munmap(g.mem) })
	g.tell(setMemTable, words64(1, guestAt, memSize, userAt, 0), fd)
	for i := range rings {
		for _, fd := range []*int{&g.kick[i], &g.call[i]} {
			*fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
			g.must(err)
			t.Cleanup(func() { unix.Close(*fd) })
		}
		at := uint64(userAt + i*ringSize)
		g.tell(setVringNum, words32(uint32(i), slots))
		g.tell(setVringBase, words32(uint32(i), 0))
		g.tell(setVringAddr, words64(uint64(i), at, at+0x2000, at+0x1000, 0))
		g.tell(setVringKick, words64(uint64(i)), g.kick[i])
		g.tell(setVringCall, words64(uint64(i)), g.call[i])
		g.tell(setVringEnable, words32(uint32(i), 1))
	}
	for i := range uint16(slots) {
		g.describe(toGuest, i, bufferAt+uint64(i)*bufSize, bufSize, descWrite, 0)
		g.available(toGuest, i, i)
	}
	select {
	case <-g.d.Started():
	case <-time.After(patience):
		t.Fatal("the device does not notice that it is used")
	}
	return g
}

func (g *guest) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *guest) pair() (a, b *net.UnixConn) {
	g.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	g.must(err)
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "pair")
		defer f.Close()
		c, err := net.FileConn(f)
		g.must(err)
		g.must(c.SetDeadline(time.Now().Add(patience)))
		return c.(*net.UnixConn)
	}
	a, b = conn(fds[0]), conn(fds[1])
	b.SetDeadline(time.Time{})
	g.t.Cleanup(func() { a.Close() })
	return a, b
}

func words32(w ...uint32) (b []byte) {
	for _, v := range w {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

func words64(w ...uint64) (b []byte) {
	for _, v := range w {
		b = binary.NativeEndian.AppendUint64(b, v)
	}
	return b
}

// request sends a message and reads the answer.
func (g *guest) request(request, flags uint32, payload []byte, fds ...int) []byte {
	g.t.Helper()
	b := append(words32(request, version|flags, uint32(len(payload))), payload...)
	_, _, err := g.monitor.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
	g.must(err)
	h := make([]byte, 12)
	_, err = io.ReadFull(g.monitor, h)
	g.must(err)
	answer := make([]byte, binary.NativeEndian.Uint32(h[8:]))
	_, err = io.ReadFull(g.monitor, answer)
	g.must(err)
	return answer
}

func (g *guest) ask(request uint32, payload []byte) []byte {
	g.t.Helper()
	return g.request(request, 0, payload)
}

// tell sends a message and waits until it was taken.
func (g *guest) tell(request uint32, payload []byte, fds ...int) {
	g.t.Helper()
	g.request(request, needReply, payload, fds...)
}

func (g *guest) describe(ring int, slot uint16, offset uint64, n uint32, flags, next uint16) {
	d := g.mem[ring*ringSize+16*int(slot):]
	binary.LittleEndian.PutUint64(d, guestAt+offset)
	binary.LittleEndian.PutUint32(d[8:], n)
	binary.LittleEndian.PutUint16(d[12:], flags)
	binary.LittleEndian.PutUint16(d[14:], next)
}

// available makes a chain available as the nth, counted from zero, and kicks.
func (g *guest) available(ring int, n, head uint16) {
	avail := g.mem[ring*ringSize+0x1000:]
	binary.LittleEndian.PutUint16(avail[4+2*int(n%slots):], head)
	atomic.StoreUint32(word(avail), uint32(n+1)<<16)
	unix.Write(g.kick[ring], words64(1))
}

// used waits for the next chain that is given back.
func (g *guest) used(ring int) (head uint16, n uint32) {
	g.t.Helper()
	used := g.mem[ring*ringSize+0x2000:]
	for deadline := time.Now().Add(patience); uint16(atomic.LoadUint32(word(used))>>16) == g.next[ring]; {
		if time.Now().After(deadline) {
			g.t.Fatalf("nothing comes from ring %d", ring)
		}
		p := []unix.PollFd{{Fd: int32(g.call[ring]), Events: unix.POLLIN}}
		unix.Poll(p, 1000)
		unix.Read(g.call[ring], make([]byte, 8))
	}
	e := used[4+8*int(g.next[ring]%slots):]
	g.next[ring]++
	return uint16(binary.LittleEndian.Uint32(e)), binary.LittleEndian.Uint32(e[4:])
}

// send sends a packet, header and payload in a descriptor each, and waits until it was taken.
func (g *guest) send(h header, payload string) {
	g.t.Helper()
	h.length = uint32(len(payload))
	at := uint64(bufferAt + slots*bufSize)
	h.encode(g.mem[at:])
	copy(g.mem[at+headerSize:], payload)
	g.describe(fromGuest, 0, at, headerSize, descNext, 1)
	g.describe(fromGuest, 1, at+headerSize, uint32(len(payload)), 0, 0)
	g.available(fromGuest, g.sent, 0)
	g.sent++
	g.used(fromGuest)
}

// stream is a header of the guest's stream from port 1234.
func stream(op uint16, change func(*header)) header {
	h := header{
		srcCID: GuestCID, dstCID: ParentCID, srcPort: 1234, dstPort: hostPort, kind: typeStream, op: op, bufAlloc: window,
	}
	if change != nil {
		change(&h)
	}
	return h
}

// receive waits for a packet and makes its buffer available again.
func (g *guest) receive() (header, string) {
	g.t.Helper()
	head, n := g.used(toGuest)
	b := g.mem[bufferAt+int(head)*bufSize:][:n]
	var h header
	h.decode(b)
	payload := string(b[headerSize:])
	g.available(toGuest, g.next[toGuest]-1+slots, head)
	return h, payload
}

// expect waits for a packet with an operation.
func (g *guest) expect(op uint16) (header, string) {
	g.t.Helper()
	h, payload := g.receive()
	if h.op != op || h.srcCID != ParentCID || h.dstCID != GuestCID || int(h.length) != len(payload) {
		g.t.Fatalf("packet %+v with %d bytes, want operation %d", h, len(payload), op)
	}
	return h, payload
}

// connect opens the guest's stream and returns the host's end.
func (g *guest) connect(bufAlloc uint32) *net.UnixConn {
	g.t.Helper()
	g.send(stream(opRequest, func(h *header) { h.bufAlloc = bufAlloc }), "")
	h, _ := g.expect(opResponse)
	if h.srcPort != hostPort || h.dstPort != 1234 || h.bufAlloc != window {
		g.t.Fatalf("response %+v", h)
	}
	c, err := g.l.AcceptUnix()
	g.must(err)
	g.t.Cleanup(func() { c.Close() })
	g.must(c.SetDeadline(time.Now().Add(patience)))
	return c
}

// end closes the monitor's connection and returns what Serve does.
func (g *guest) end() error {
	g.t.Helper()
	g.monitor.Close()
	select {
	case err := <-g.served:
		return err
	case <-time.After(patience):
		g.t.Fatal("the device does not end with its monitor")
		return nil
	}
}

func (g *guest) read(c net.Conn, want string) {
	g.t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != want {
		g.t.Fatalf("read %q, %v, want %q", b, err, want)
	}
}

// Each direction of a stream ends apart.
func TestGuestConnects(t *testing.T) {
	g := newGuest(t)
	c := g.connect(window)
	g.send(stream(opRW, nil), "hello")
	g.read(c, "hello")
	io.WriteString(c, "world")
	if _, payload := g.expect(opRW); payload != "world" {
		t.Errorf("the guest got %q", payload)
	}
	g.send(stream(opRW, nil), "last")
	g.send(stream(opShutdown, func(h *header) { h.flags = shutSend }), "")
	if b, err := io.ReadAll(c); string(b) != "last" || err != nil {
		t.Errorf("read %q, %v, want the last bytes and the end", b, err)
	}
	io.WriteString(c, "bye")
	if _, payload := g.expect(opRW); payload != "bye" {
		t.Errorf("the guest got %q", payload)
	}
	g.must(c.CloseWrite())
	if h, _ := g.expect(opShutdown); h.flags != shutSend {
		t.Errorf("shutdown has the flags %d", h.flags)
	}
	// Now the socket is of no use to either end.
	if h, _ := g.expect(opShutdown); h.flags != shutSend|shutReceive {
		t.Errorf("shutdown has the flags %d", h.flags)
	}
	g.send(stream(opShutdown, func(h *header) { h.flags = shutSend | shutReceive }), "")
	g.expect(opRST)
	if err := g.end(); err != nil {
		t.Error(err)
	}
}

// A reset of the guest takes nothing away of what it had sent, however late the host reads.
func TestLateReader(t *testing.T) {
	g := newGuest(t)
	c := g.connect(window)
	want := ""
	for range window / 4096 {
		part := strings.Repeat("0123456789abcdef", 256)
		g.send(stream(opRW, nil), part)
		want += part
	}
	g.send(stream(opRST, nil), "")
	if b, err := io.ReadAll(c); string(b) != want || err != nil {
		t.Errorf("read %d bytes, %v, want %d", len(b), err, len(want))
	}
}

func TestGuestIsToldWhatWasRead(t *testing.T) {
	g := newGuest(t)
	c := g.connect(window)
	go io.Copy(io.Discard, c)
	part := strings.Repeat("x", 4096)
	for range window / 4 / 4096 {
		g.send(stream(opRW, nil), part)
	}
	if h, _ := g.expect(opCreditUpdate); h.fwdCnt != window/4 {
		t.Errorf("%d bytes were read, want %d", h.fwdCnt, window/4)
	}
	g.send(stream(opCreditRequest, nil), "")
	g.expect(opCreditUpdate)
}

func TestGuestWindow(t *testing.T) {
	g := newGuest(t)
	const size = 3 * slot
	c := g.connect(size)
	go c.Write(bytes.Repeat([]byte("x"), 2*size))
	got := 0
	for got < size {
		_, payload := g.expect(opRW)
		got += len(payload)
	}
	if got != size {
		t.Fatalf("%d bytes came into a window of %d", got, size)
	}
	// Nothing follows, but this does.
	g.send(stream(opCreditRequest, func(h *header) { h.bufAlloc = size }), "")
	g.expect(opCreditUpdate)
	g.send(stream(opCreditUpdate, func(h *header) { h.bufAlloc, h.fwdCnt = size, size }), "")
	for got < 2*size {
		_, payload := g.expect(opRW)
		got += len(payload)
	}
}

// Small packets cost the guest more than their bytes.
func TestGuestSlots(t *testing.T) {
	g := newGuest(t)
	const size = 3 * slot
	c := g.connect(size)
	for range 3 {
		io.WriteString(c, "x")
		g.expect(opRW)
	}
	io.WriteString(c, "y")
	g.send(stream(opCreditRequest, func(h *header) { h.bufAlloc = size }), "")
	g.expect(opCreditUpdate)
	g.send(stream(opCreditUpdate, func(h *header) { h.bufAlloc, h.fwdCnt = size, 3 }), "")
	if _, payload := g.expect(opRW); payload != "y" {
		t.Errorf("the guest got %q", payload)
	}
}

func TestHostConnects(t *testing.T) {
	g := newGuest(t)
	ours, theirs := g.pair()
	g.must(g.d.Connect(theirs, 80, "OK 1\n"))
	h, _ := g.expect(opRequest)
	if h.dstPort != 80 {
		t.Fatalf("request %+v", h)
	}
	answer := header{srcCID: GuestCID, dstCID: ParentCID, srcPort: 80, dstPort: h.srcPort, kind: typeStream, op: opResponse, bufAlloc: window}
	g.send(answer, "")
	g.read(ours, "OK 1\n")
	io.WriteString(ours, "hello")
	g.expect(opRW)
	// Whoever closes reads no more either.
	ours.Close()
	if h, _ := g.expect(opShutdown); h.flags != shutSend {
		t.Errorf("shutdown has the flags %d", h.flags)
	}
	if h, _ := g.expect(opShutdown); h.flags != shutSend|shutReceive {
		t.Errorf("shutdown has the flags %d", h.flags)
	}
	answer.op = opRST
	g.send(answer, "")

	ours, theirs = g.pair()
	g.must(g.d.Connect(theirs, 81, "OK 2\n"))
	h, _ = g.expect(opRequest)
	answer.srcPort, answer.dstPort = 81, h.srcPort
	g.send(answer, "")
	if b, err := io.ReadAll(ours); len(b) > 0 || err != nil {
		t.Errorf("a refused stream brought %q, %v", b, err)
	}
	ours, theirs = g.pair()
	g.must(g.d.Connect(theirs, 82, ""))
	if err := g.end(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(ours); len(b) > 0 || err != nil {
		t.Errorf("a stream without a guest brought %q, %v", b, err)
	}
	_, theirs = g.pair()
	if err := g.d.Connect(theirs, 83, ""); err == nil {
		t.Error("a guest that is gone was connected")
	}
}

func TestRefuses(t *testing.T) {
	for name, h := range map[string]header{
		"port that nobody serves": stream(opRequest, func(h *header) { h.dstPort = 1 }),
		"other address":           stream(opRequest, func(h *header) { h.dstCID = 2 }),
		"false sender":            stream(opRequest, func(h *header) { h.srcCID = 5 }),
		"datagram":                stream(opRequest, func(h *header) { h.kind = 3 }),
		"unknown stream":          stream(opRW, nil),
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			g.send(stream(opRST, nil), "") // never answered
			g.send(h, "")
			if got, _ := g.receive(); got.op != opRST || got.srcPort != h.dstPort || got.dstPort != h.srcPort {
				t.Errorf("answered with %+v", got)
			}
		})
	}
	t.Run("more than the window", func(t *testing.T) {
		g := newGuest(t)
		g.connect(window)
		part := strings.Repeat("x", 64<<10)
		for range 64 { // the socket takes some of it
			g.send(stream(opRW, nil), part)
		}
		for {
			if h, _ := g.receive(); h.op == opRST {
				break
			}
		}
	})
}

// A guest that breaks its rings loses its streams, and nobody else anything.
func TestBrokenGuest(t *testing.T) {
	for name, broken := range map[string]func(g *guest){
		"outside":  func(g *guest) { g.describe(fromGuest, 0, memSize-1, headerSize, 0, 0) },
		"too far":  func(g *guest) { g.describe(fromGuest, 0, 1<<63, headerSize, 0, 0) },
		"short":    func(g *guest) { g.describe(fromGuest, 0, 0, headerSize-1, 0, 0) },
		"circle":   func(g *guest) { g.describe(fromGuest, 0, 0, headerSize, descNext, 0) },
		"no slot":  func(g *guest) { g.describe(fromGuest, 0, 0, headerSize, descNext, slots) },
		"indirect": func(g *guest) { g.describe(fromGuest, 0, 0, headerSize, descIndirect, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t)
			c := g.connect(window)
			broken(g)
			g.available(fromGuest, g.sent, 0)
			if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
				t.Errorf("read %q, %v", b, err)
			}
			if err := g.end(); err == nil || !strings.Contains(err.Error(), "has broken its vsock device") {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

func TestRefusesMessages(t *testing.T) {
	for name, m := range map[string]message{
		"unknown":          {request: 99},
		"short":            {request: setVringNum, payload: []byte{1}},
		"no such ring":     {request: setVringNum, payload: words32(7, 1)},
		"ring without end": {request: setVringNum, payload: words32(0, 1<<16)},
		"ring elsewhere":   {request: setVringEnable, payload: words32(0, 1)},
		"no descriptor":    {request: setVringKick, payload: words64(0)},
		"no memory":        {request: setMemTable, payload: words64(1, 0, 4096, 0, 0)},
		"config too long":  {request: getConfig, payload: append(words32(4, 8, 0), make([]byte, 8)...)},
	} {
		if _, err := New(nil).request(&m, &kicks{}); err == nil {
			t.Errorf("%s: it was taken", name)
		}
	}
}

// Whatever a guest writes into its rings, the device stays in the guest's memory and in its window.
func FuzzGuest(f *testing.F) {
	h := stream(opRequest, nil)
	packet := make([]byte, headerSize)
	h.encode(packet)
	desc := make([]byte, 16)
	binary.LittleEndian.PutUint64(desc, guestAt+0x8000)
	binary.LittleEndian.PutUint32(desc[8:], headerSize)
	f.Add(desc, packet, uint16(1))
	f.Fuzz(func(t *testing.T, desc, packet []byte, n uint16) {
		d := New(func(uint32) (*net.UnixConn, error) { return nil, errors.New("nobody listens") })
		mem := make([]byte, 0x20000)
		d.mem = memory{{guest: guestAt, user: userAt, bytes: mem}}
		copy(mem[0x8000:0xffff], packet)
		for i := range rings {
			at := uint64(userAt + i*ringSize)
			d.rings[i].size, d.rings[i].descAt, d.rings[i].availAt, d.rings[i].usedAt = slots, at, at+0x1000, at+0x2000
			copy(mem[i*ringSize:i*ringSize+0x1000], desc)
			binary.LittleEndian.PutUint32(mem[i*ringSize+0x1000:], uint32(n)<<16)
			if err := d.rings[i].start(d.mem); err != nil {
				t.Fatal(err)
			}
		}
		d.mu.Lock()
		d.progress()
		d.mem = nil // it was not mapped
		d.mu.Unlock()
		d.close()
	})
}
