package vhostvsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// Requests of vhost-user, and their flags.
const (
	getFeatures         = 1
	setFeatures         = 2
	setOwner            = 3
	resetOwner          = 4
	setMemTable         = 5
	setVringNum         = 8
	setVringAddr        = 9
	setVringBase        = 10
	getVringBase        = 11
	setVringKick        = 12
	setVringCall        = 13
	setVringErr         = 14
	getProtocolFeatures = 15
	setProtocolFeatures = 16
	setVringEnable      = 18
	getConfig           = 24

	version   = 1
	isReply   = 1 << 2
	needReply = 1 << 3

	noFD = 1 << 8 // in the argument of kick, call and err

	featureVersion1         = 1 << 32 // VIRTIO_F_VERSION_1
	featureProtocol         = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
	protocolReplyAck uint64 = 1 << 3
	protocolConfig   uint64 = 1 << 9

	maxPayload = 4096 // bytes; the largest is a table of 8 regions
	maxRegions = 8
)

// message is one request.
type message struct {
	request, flags uint32
	payload        []byte
	fds            []int
}

// Serve speaks vhost-user with a virtual machine monitor until it closes c. Then every stream has ended. It is called once.
func (d *Device) Serve(c *net.UnixConn) error {
	kicks := &kicks{d: d}
	defer func() {
		kicks.close()
		d.close()
	}()
	for {
		m, err := receiveMessage(c)
		if errors.Is(err, io.EOF) {
			d.mu.Lock()
			defer d.mu.Unlock()
			return d.broken
		}
		if err != nil {
			return fmt.Errorf("read vhost-user message: %w", err)
		}
		answer, err := d.request(m, kicks)
		for _, fd := range m.fds { // those that nobody took
			unix.Close(fd)
		}
		if err != nil {
			return fmt.Errorf("vhost-user request %d: %w", m.request, err)
		}
		if answer == nil && m.flags&needReply != 0 {
			answer = make([]byte, 8)
		}
		if answer == nil {
			continue
		}
		b := binary.NativeEndian.AppendUint32(nil, m.request)
		b = binary.NativeEndian.AppendUint32(b, version|isReply)
		b = binary.NativeEndian.AppendUint32(b, uint32(len(answer)))
		if _, err := c.Write(append(b, answer...)); err != nil {
			return fmt.Errorf("answer vhost-user request %d: %w", m.request, err)
		}
	}
}

// receiveMessage reads one message with its descriptors, which come with its first byte.
func receiveMessage(c *net.UnixConn) (m *message, err error) {
	var h [12]byte
	oob := make([]byte, unix.CmsgSpace(4*maxRegions))
	n, oobn, _, _, err := c.ReadMsgUnix(h[:], oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	m = &message{}
	defer func() {
		if err != nil {
			for _, fd := range m.fds {
				unix.Close(fd)
			}
		}
	}()
	controls, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for i := range controls {
		fds, err := unix.ParseUnixRights(&controls[i])
		if err != nil {
			return nil, err
		}
		m.fds = append(m.fds, fds...)
	}
	if _, err := io.ReadFull(c, h[n:]); err != nil {
		return nil, err
	}
	m.request, m.flags = binary.NativeEndian.Uint32(h[:]), binary.NativeEndian.Uint32(h[4:])
	size := binary.NativeEndian.Uint32(h[8:])
	if m.flags&3 != version || size > maxPayload {
		return nil, errors.New("it is none")
	}
	m.payload = make([]byte, size)
	_, err = io.ReadFull(c, m.payload)
	return m, err
}

var errPayload = errors.New("its arguments are wrong")

// words returns the payload's first words, which must be there.
func (m *message) words(n int) ([]uint64, error) {
	if len(m.payload) < 8*n {
		return nil, errPayload
	}
	w := make([]uint64, n)
	for i := range w {
		w[i] = binary.NativeEndian.Uint64(m.payload[8*i:])
	}
	return w, nil
}

// fd hands over the message's only descriptor.
func (m *message) fd() (int, error) {
	if len(m.fds) != 1 {
		return -1, errPayload
	}
	fd := m.fds[0]
	m.fds = nil
	return fd, nil
}

// request does what a message asks for, and returns the answer or nil.
func (d *Device) request(m *message, kicks *kicks) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	number := func(v uint64) []byte { return binary.NativeEndian.AppendUint64(nil, v) }
	switch m.request {
	case getFeatures:
		return number(featureVersion1 | featureProtocol), nil
	case getProtocolFeatures:
		return number(protocolReplyAck | protocolConfig), nil
	case setFeatures, setProtocolFeatures, setOwner, resetOwner:
		return nil, nil
	case setMemTable:
		return nil, d.setMemory(m)
	case getConfig:
		return config(m.payload)
	case setVringNum, setVringAddr, setVringBase, getVringBase, setVringKick, setVringCall, setVringErr, setVringEnable:
	default:
		return nil, errors.New("it is not known")
	}

	w, err := m.words(1)
	if err != nil {
		return nil, err
	}
	index, value := uint32(w[0]), uint32(w[0]>>32)
	descriptor := m.request == setVringKick || m.request == setVringCall || m.request == setVringErr
	if descriptor {
		index &= noFD - 1
	}
	if index >= rings {
		return nil, errPayload
	}
	r := &d.rings[index]
	if descriptor && w[0]&noFD != 0 {
		return nil, errors.New("a ring without events is not served")
	}
	switch m.request {
	case setVringNum:
		if value > maxRing {
			return nil, errPayload
		}
		r.size = uint16(value)
	case setVringAddr:
		if w, err = m.words(4); err != nil {
			return nil, err
		}
		r.descAt, r.usedAt, r.availAt = w[1], w[2], w[3]
	case setVringBase:
		r.nextAvail = uint16(value)
	case getVringBase:
		r.stop()
		return number(uint64(index) | uint64(r.nextAvail)<<32), nil
	case setVringKick:
		fd, err := m.fd()
		if err != nil {
			return nil, err
		}
		return nil, kicks.add(fd)
	case setVringCall:
		fd, err := m.fd()
		if err != nil {
			return nil, err
		}
		if r.call >= 0 {
			unix.Close(r.call)
		}
		r.call = fd
	case setVringEnable:
		if value == 0 {
			r.stop()
			return nil, nil
		}
		if d.closed {
			return nil, nil
		}
		if err := r.start(d.mem); err != nil {
			return nil, err
		}
		if index == fromGuest {
			d.once.Do(func() { close(d.started) })
		}
		d.progress()
	}
	return nil, nil
}

// config answers from the device's configuration space, which is the guest's address (virtio 1.2, 5.10.4).
// Arguments and answer are offset, size and flags, 32 bits each, and size bytes.
func config(payload []byte) ([]byte, error) {
	if len(payload) < 12 {
		return nil, errPayload
	}
	offset, size := binary.NativeEndian.Uint32(payload), binary.NativeEndian.Uint32(payload[4:])
	space := binary.LittleEndian.AppendUint64(nil, GuestCID)
	if uint64(size) != uint64(len(payload)-12) || uint64(offset)+uint64(size) > uint64(len(space)) {
		return nil, errPayload
	}
	copy(payload[12:], space[offset:])
	return payload, nil
}

// setMemory maps the guest's memory: a count, and for each region its address in the guest, its size, its
// address in the monitor and where it begins in its file.
func (d *Device) setMemory(m *message) error {
	w, err := m.words(1)
	if err != nil {
		return err
	}
	n := int(uint32(w[0]))
	if n > maxRegions || n != len(m.fds) {
		return errPayload
	}
	if w, err = m.words(1 + 4*n); err != nil {
		return err
	}
	var mem memory
	for i := range n {
		r := w[1+4*i:][:4]
		guest, size, user, offset := r[0], r[1], r[2], r[3]
		if size == 0 || size > 1<<40 || offset > 1<<40 {
			mem.unmap()
			return errPayload
		}
		b, err := unix.Mmap(m.fds[i], 0, int(offset+size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			mem.unmap()
			return fmt.Errorf("map the guest's memory: %w", err)
		}
		mem = append(mem, region{guest: guest, user: user, bytes: b[offset:], mapping: b})
	}
	old := d.mem
	d.mem = mem
	for i := range d.rings {
		if r := &d.rings[i]; r.running() {
			next := r.nextUsed
			if err := r.start(mem); err != nil {
				return err
			}
			r.nextUsed = next
		}
	}
	old.unmap()
	return nil
}

// kicks waits for the guest's events, one goroutine a descriptor.
type kicks struct {
	d     *Device
	files []*os.File
}

// add takes an eventfd.
func (k *kicks) add(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil { // so that Close ends a read
		unix.Close(fd)
		return err
	}
	f := os.NewFile(uintptr(fd), "kick")
	k.files = append(k.files, f)
	k.d.parts.Go(func() {
		b := make([]byte, 8)
		for {
			if _, err := f.Read(b); err != nil {
				return
			}
			k.d.mu.Lock()
			k.d.progress()
			k.d.mu.Unlock()
		}
	})
	return nil
}

func (k *kicks) close() {
	for _, f := range k.files {
		f.Close()
	}
}
