package vhostvsock

import "encoding/binary"

// headerSize is that of struct virtio_vsock_hdr in bytes (virtio 1.2, 5.10.6; little-endian).
const headerSize = 44

// Operations and flags of a packet.
const (
	opRequest       = 1
	opResponse      = 2
	opRST           = 3
	opShutdown      = 4
	opRW            = 5
	opCreditUpdate  = 6
	opCreditRequest = 7

	shutReceive = 1 // the sender of the packet will receive no more
	shutSend    = 2

	typeStream = 1
)

// header is a packet's. A packet without payload is a header.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	length           uint32
	kind, op         uint16
	flags            uint32
	bufAlloc, fwdCnt uint32
}

func (h *header) decode(b []byte) {
	le := binary.LittleEndian
	h.srcCID, h.dstCID = le.Uint64(b), le.Uint64(b[8:])
	h.srcPort, h.dstPort = le.Uint32(b[16:]), le.Uint32(b[20:])
	h.length = le.Uint32(b[24:])
	h.kind, h.op = le.Uint16(b[28:]), le.Uint16(b[30:])
	h.flags = le.Uint32(b[32:])
	h.bufAlloc, h.fwdCnt = le.Uint32(b[36:]), le.Uint32(b[40:])
}

func (h *header) encode(b []byte) {
	le := binary.LittleEndian
	le.PutUint64(b, h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.length)
	le.PutUint16(b[28:], h.kind)
	le.PutUint16(b[30:], h.op)
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
}
