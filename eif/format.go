package eif

import (
	"encoding/binary"
	"fmt"
)

// Layout of the format; all integers are big-endian.
const (
	magic             = ".eif"
	version           = 4
	maxSections       = 32
	headerSize        = 548 // see header
	crcOffset         = headerSize - 4
	sectionHeaderSize = 12 // u16 type, u16 flags, u64 size

	flagARM64 = 1 // bit 0 of the header's flags
)

// Values that AWS's builder writes.
const (
	DefaultMemory = 1 << 30 // bytes
	DefaultCPUs   = 2
)

// MaxRamdisks is the number of ramdisks that fit beside kernel, command line and metadata. AWS's
// builder fails on a 30th.
const MaxRamdisks = maxSections - 3

// Arch is the processor architecture that an EIF is for.
type Arch string

// The architectures of the format.
const (
	X86_64  Arch = "x86_64"
	AArch64 Arch = "aarch64"
)

// SectionType is the type of a section.
type SectionType uint16

// The types of sections.
const (
	SectionKernel    SectionType = 1 // bzImage on x86_64, raw Image on aarch64
	SectionCmdline   SectionType = 2 // kernel command line, without a final newline or NUL
	SectionRamdisk   SectionType = 3 // cpio archive, compressed or not; the kernel unpacks them one over the other
	SectionSignature SectionType = 4 // CBOR, see NewSigner and Reader.Measure
	SectionMetadata  SectionType = 5 // JSON, see Metadata
)

func (t SectionType) String() string {
	switch t {
	case SectionKernel:
		return "kernel"
	case SectionCmdline:
		return "cmdline"
	case SectionRamdisk:
		return "ramdisk"
	case SectionSignature:
		return "signature"
	case SectionMetadata:
		return "metadata"
	}
	return fmt.Sprintf("unknown type %d", uint16(t))
}

// header is the start of a file as it is encoded.
type header struct {
	Magic       [4]byte
	Version     uint16
	Flags       uint16
	Memory      uint64
	CPUs        uint64
	Reserved    uint16
	NumSections uint16
	Offsets     [maxSections]uint64 // of the section headers
	Sizes       [maxSections]uint64 // of the data alone
	Unused      uint32
	CRC         uint32 // CRC-32 (IEEE) of the header before it and of all sections, in file order
}

func (h *header) encode() []byte {
	b, err := binary.Append(make([]byte, 0, headerSize), binary.BigEndian, h)
	if err != nil {
		panic("eif: encode header: " + err.Error()) // fixed-size fields only
	}
	return b
}

// encodeSectionHeader returns the 12 bytes before a section's data.
func encodeSectionHeader(t SectionType, size uint64) []byte {
	b := binary.BigEndian.AppendUint16(nil, uint16(t))
	b = binary.BigEndian.AppendUint16(b, 0)
	return binary.BigEndian.AppendUint64(b, size)
}
