package vhostvsock

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// region is a piece of the guest's memory, mapped here.
type region struct {
	guest, user uint64 // where it lies in the guest, and in the monitor
	bytes       []byte
	mapping     []byte // bytes and what lies before them in the file
}

// memory is the guest's.
type memory []region

func (m memory) unmap() {
	for _, r := range m {
		unix.Munmap(r.mapping)
	}
}

// at returns n bytes at an address; start tells the address of a region's first byte.
func (m memory) at(address, n uint64, start func(*region) uint64) ([]byte, error) {
	for i := range m {
		r := &m[i]
		if offset := address - start(r); address >= start(r) && offset < uint64(len(r.bytes)) && n <= uint64(len(r.bytes))-offset {
			return r.bytes[offset:][:n:n], nil
		}
	}
	return nil, fmt.Errorf("%d bytes at %#x are not the guest's memory", n, address)
}

func guestStart(r *region) uint64 { return r.guest }
func userStart(r *region) uint64  { return r.user }

// Flags of a descriptor and of a ring (virtio 1.2, 2.7).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	availNoInterrupt = 1
	usedNoNotify     = 1

	maxRing = 1 << 15
)

var errRing = errors.New("the guest's ring is broken")

// ring is a split virtqueue (virtio 1.2, 2.7).
type ring struct {
	size                uint16
	descAt, availAt     uint64 // the monitor's addresses
	usedAt              uint64
	desc, avail, used   []byte // nil while it does not run
	nextAvail, nextUsed uint16
	suppressed          bool // the guest needs not kick
	call                int  // eventfd, or -1
}

// start finds the ring in memory.
func (r *ring) start(m memory) (err error) {
	n := uint64(r.size)
	if n == 0 || n > maxRing || r.availAt%4 != 0 || r.usedAt%4 != 0 {
		return errRing
	}
	if r.desc, err = m.at(r.descAt, 16*n, userStart); err != nil {
		return err
	}
	if r.avail, err = m.at(r.availAt, 4+2*n, userStart); err != nil {
		return err
	}
	if r.used, err = m.at(r.usedAt, 4+8*n, userStart); err != nil {
		return err
	}
	r.suppressed = false
	r.nextUsed = uint16(atomic.LoadUint32(word(r.used)) >> 16)
	return nil
}

func (r *ring) stop() { r.desc, r.avail, r.used = nil, nil, nil }

func (r *ring) running() bool { return r.used != nil }

// word is the first of a ring's words: flags, and above them the index. The guest writes while it is read.
func word(b []byte) *uint32 { return (*uint32)(unsafe.Pointer(unsafe.SliceData(b))) }

// pending returns how many chains the guest has made available.
func (r *ring) pending() uint16 {
	if !r.running() {
		return 0
	}
	return uint16(atomic.LoadUint32(word(r.avail))>>16) - r.nextAvail
}

// chain is what one entry of a ring describes, in the order of its descriptors.
type chain struct {
	head     uint16
	readable [][]byte // the guest has written it
	writable [][]byte
}

// pop takes the next available chain, which must be there.
func (r *ring) pop(m memory) (chain, error) {
	if r.pending() > r.size {
		return chain{}, errRing
	}
	slot := r.nextAvail % r.size
	c := chain{head: binary.LittleEndian.Uint16(r.avail[4+2*int(slot):])}
	r.nextAvail++
	index := c.head
	for range r.size {
		if index >= r.size {
			return chain{}, errRing
		}
		d := r.desc[16*int(index):][:16]
		address, n := binary.LittleEndian.Uint64(d), binary.LittleEndian.Uint32(d[8:])
		flags, next := binary.LittleEndian.Uint16(d[12:]), binary.LittleEndian.Uint16(d[14:])
		b, err := m.at(address, uint64(n), guestStart)
		if err != nil {
			return chain{}, err
		}
		switch {
		case flags&descIndirect != 0: // not negotiated
			return chain{}, errRing
		case flags&descWrite != 0:
			c.writable = append(c.writable, b)
		case len(c.writable) > 0:
			return chain{}, errRing
		default:
			c.readable = append(c.readable, b)
		}
		if flags&descNext == 0 {
			return c, nil
		}
		index = next
	}
	return chain{}, errRing // it goes round
}

// push gives a chain back, of which n bytes were written.
func (r *ring) push(c chain, n uint32) {
	e := r.used[4+8*int(r.nextUsed%r.size):]
	binary.LittleEndian.PutUint32(e, uint32(c.head))
	binary.LittleEndian.PutUint32(e[4:], n)
	r.nextUsed++
	r.publish()
}

// publish lets the guest see flags and index, and everything that was written before.
func (r *ring) publish() {
	v := uint32(r.nextUsed) << 16
	if r.suppressed {
		v |= usedNoNotify
	}
	atomic.StoreUint32(word(r.used), v)
}

// suppress says whether the guest needs to kick: not while somebody looks at the ring anyway.
func (r *ring) suppress(yes bool) {
	if r.running() && r.suppressed != yes {
		r.suppressed = yes
		r.publish()
	}
}

// interrupt tells the guest that chains were given back, unless it wants no interrupts.
func (r *ring) interrupt() {
	if r.call < 0 || atomic.LoadUint32(word(r.avail))&availNoInterrupt != 0 {
		return
	}
	one := [8]byte{}
	binary.NativeEndian.PutUint64(one[:], 1)
	unix.Write(r.call, one[:]) // full means that an interrupt is under way
}

// gather copies the bytes of pieces into b, from offset on, and returns how many there were.
func gather(b []byte, pieces [][]byte, offset int) (n int) {
	for _, p := range pieces {
		if offset >= len(p) {
			offset -= len(p)
			continue
		}
		n += copy(b[n:], p[offset:])
		offset = 0
	}
	return n
}

// scatter copies b into pieces, from offset on, and returns how many bytes went in.
func scatter(pieces [][]byte, offset int, b []byte) (n int) {
	for _, p := range pieces {
		if offset >= len(p) {
			offset -= len(p)
			continue
		}
		n += copy(p[offset:], b[n:])
		offset = 0
	}
	return n
}

func total(pieces [][]byte) (n int) {
	for _, p := range pieces {
		n += len(p)
	}
	return n
}
