package eif

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"time"
)

// Limits of sections that are read into memory, in bytes.
const (
	maxCmdline  = 64 << 10 // x86_64 kernels take 2 KiB
	maxMetadata = 1 << 20
	copyBuffer  = 256 << 10
)

// Reader gives access to an EIF that was checked from its first byte to its last.
type Reader struct {
	Arch   Arch
	Memory uint64 // suggested memory in bytes
	CPUs   uint64 // suggested number of vCPUs

	sections []Section
	closer   io.Closer
}

// Section is a section of an EIF.
type Section struct {
	Type   SectionType
	Offset int64 // of the data in the file, in bytes
	Size   int64 // of the data, in bytes

	r io.ReaderAt
}

// Open returns a reader of the section's data.
func (s Section) Open() *io.SectionReader {
	return io.NewSectionReader(s.r, s.Offset, s.Size)
}

// Open opens and checks the EIF in the named file, which must be a regular one: opening a pipe could wait for
// ever. The caller must Close the reader.
func Open(name string) (*Reader, error) {
	if info, err := os.Stat(name); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	r, err := NewReader(f, info.Size())
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	r.closer = f
	return r, nil
}

// NewReader checks the EIF in the first size bytes of r, all of them, and returns a reader of its
// sections. It reads r twice at most and holds none of it.
//
// It refuses a wrong magic number or version; sections that are not one gapless run from the header
// to the end of the file in the order of the table, so that none overlaps, wraps around, leaves the
// file or is unlisted; anything but one kernel and one command line, at most one metadata and one
// signature section; kernel, command line and ramdisks in another order, for which AWS's tools
// disagree about the registers; reserved fields that are not zero; and a wrong checksum.
func NewReader(r io.ReaderAt, size int64) (*Reader, error) {
	eif, err := newReader(r, size)
	if err != nil {
		return nil, fmt.Errorf("read EIF: %w", err)
	}
	return eif, nil
}

func newReader(r io.ReaderAt, size int64) (*Reader, error) {
	if size < headerSize {
		return nil, fmt.Errorf("the file has %d bytes, fewer than the %d of an EIF header", size, headerSize)
	}
	raw := make([]byte, headerSize)
	if _, err := io.ReadFull(io.NewSectionReader(r, 0, headerSize), raw); err != nil {
		return nil, err
	}
	var h header
	if _, err := binary.Decode(raw, binary.BigEndian, &h); err != nil {
		return nil, err
	}
	if err := h.check(); err != nil {
		return nil, err
	}
	eif := &Reader{Arch: X86_64, Memory: h.Memory, CPUs: h.CPUs}
	if h.Flags&flagARM64 != 0 {
		eif.Arch = AArch64
	}
	next := uint64(headerSize)
	for i := range int(h.NumSections) {
		s, err := readSection(r, uint64(size), next, h.Offsets[i], h.Sizes[i])
		if err != nil {
			return nil, fmt.Errorf("section %d of %d: %w", i+1, h.NumSections, err)
		}
		eif.sections = append(eif.sections, s)
		next += sectionHeaderSize + uint64(s.Size)
	}
	if next != uint64(size) {
		return nil, fmt.Errorf("%d bytes follow the last section that the header lists", uint64(size)-next)
	}
	if err := eif.checkTypes(); err != nil {
		return nil, err
	}
	crc := crc32.NewIEEE()
	crc.Write(raw[:crcOffset])
	if err := copyAll(crc, io.NewSectionReader(r, headerSize, size-headerSize)); err != nil {
		return nil, err
	}
	if sum := crc.Sum32(); sum != h.CRC {
		return nil, fmt.Errorf("the checksum is %08x, but the header says %08x: the file is damaged", sum, h.CRC)
	}
	return eif, nil
}

// check checks the fields that do not depend on the rest of the file.
func (h *header) check() error {
	switch {
	case string(h.Magic[:]) != magic:
		return fmt.Errorf("the file starts with %q, not %q: it is no EIF", h.Magic[:], magic)
	case h.Version != version:
		return fmt.Errorf("the format version is %d, but only %d is supported", h.Version, version)
	case h.Flags&^flagARM64 != 0:
		return fmt.Errorf("the header has unknown flags %#04x", h.Flags)
	case h.Reserved != 0 || h.Unused != 0:
		return errors.New("a reserved field of the header is not zero")
	case h.NumSections < 2 || h.NumSections > maxSections:
		return fmt.Errorf("the header lists %d sections, but an EIF has 2 to %d", h.NumSections, maxSections)
	}
	for i := h.NumSections; i < maxSections; i++ {
		if h.Offsets[i] != 0 || h.Sizes[i] != 0 {
			return fmt.Errorf("the header lists %d sections, but place %d of its table is in use", h.NumSections, i+1)
		}
	}
	return nil
}

// readSection checks the section that must start at next against the header's table and the file.
func readSection(r io.ReaderAt, fileSize, next, offset, size uint64) (Section, error) {
	if offset != next {
		return Section{}, fmt.Errorf("it starts at byte %d, but the part before it ends at %d: sections must not overlap or leave gaps", offset, next)
	}
	if fileSize-next < sectionHeaderSize || fileSize-next-sectionHeaderSize < size {
		return Section{}, fmt.Errorf("its %d bytes of data do not fit into the file of %d bytes", size, fileSize)
	}
	raw := make([]byte, sectionHeaderSize)
	if _, err := io.ReadFull(io.NewSectionReader(r, int64(offset), sectionHeaderSize), raw); err != nil {
		return Section{}, err
	}
	s := Section{
		Type:   SectionType(binary.BigEndian.Uint16(raw)),
		Offset: int64(offset) + sectionHeaderSize,
		Size:   int64(size),
		r:      r,
	}
	if s.Type < SectionKernel || s.Type > SectionMetadata {
		return Section{}, fmt.Errorf("it has the %s", s.Type)
	}
	if flags := binary.BigEndian.Uint16(raw[2:]); flags != 0 {
		return Section{}, fmt.Errorf("the %s section has unknown flags %#04x", s.Type, flags)
	}
	if own := binary.BigEndian.Uint64(raw[4:]); own != size {
		return Section{}, fmt.Errorf("the %s section says that it has %d bytes, but the header says %d", s.Type, own, size)
	}
	return s, nil
}

// checkTypes checks which sections there are and the order of those that are measured.
func (r *Reader) checkTypes() error {
	count := map[SectionType]int{}
	measured := SectionKernel
	for _, s := range r.sections {
		count[s.Type]++
		if s.Type > SectionRamdisk {
			continue
		}
		if s.Type < measured {
			return fmt.Errorf("its %s section stands behind a %s section, but the order is kernel, cmdline, ramdisks", s.Type, measured)
		}
		measured = s.Type
	}
	for _, t := range []SectionType{SectionKernel, SectionCmdline} {
		if count[t] == 0 {
			return fmt.Errorf("it has no %s section", t)
		}
	}
	for _, t := range []SectionType{SectionKernel, SectionCmdline, SectionMetadata, SectionSignature} {
		if count[t] > 1 {
			return fmt.Errorf("it has %d %s sections, but at most one is allowed", count[t], t)
		}
	}
	if r.find(SectionKernel).Size == 0 {
		return errors.New("its kernel is empty")
	}
	return nil
}

// Close closes the file if Open opened it.
func (r *Reader) Close() error {
	if r.closer == nil {
		return nil
	}
	return r.closer.Close()
}

// Sections returns all sections in file order.
func (r *Reader) Sections() []Section { return r.sections }

// Kernel returns the kernel's section.
func (r *Reader) Kernel() Section { return *r.find(SectionKernel) }

// Ramdisks returns the ramdisks' sections in the order in which the kernel unpacks them.
func (r *Reader) Ramdisks() []Section {
	var out []Section
	for _, s := range r.sections {
		if s.Type == SectionRamdisk {
			out = append(out, s)
		}
	}
	return out
}

// Cmdline returns the kernel command line, of at most 64 KiB.
func (r *Reader) Cmdline() (string, error) {
	b, err := r.find(SectionCmdline).read(maxCmdline)
	return string(b), err
}

// Metadata returns the metadata, of at most 1 MiB, or nil if there is none. It is not measured:
// whoever passes the file on can change it.
func (r *Reader) Metadata() (*Metadata, error) {
	s := r.find(SectionMetadata)
	if s == nil {
		return nil, nil
	}
	b, err := s.read(maxMetadata)
	if err != nil {
		return nil, err
	}
	var m Metadata
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("read EIF metadata: %w", err)
	}
	return &m, nil
}

// Measure computes the registers that an enclave of this EIF shows. If the EIF is signed, the
// signature must be its certificate's over PCR0; the certificate's dates are not checked, for which
// see Verify.
func (r *Reader) Measure() (*Measurements, error) {
	out, _, err := r.measure()
	return out, err
}

// Verify measures as Measure does, and demands a signature: by the certificate signer unless that is
// nil, and by one that is valid at the given time. Nitro starts no EIF whose certificate has expired
// (nitro-cli, docs/image_signing.md). The returned certificate is the one that signed; nothing is
// said of who issued it.
func (r *Reader) Verify(signer *x509.Certificate, at time.Time) (*Measurements, *x509.Certificate, error) {
	out, cert, err := r.measure()
	switch {
	case err != nil:
		return nil, nil, err
	case cert == nil:
		err = errors.New("it is not signed")
	case signer != nil && !signer.Equal(cert):
		err = fmt.Errorf("it is signed by another certificate, that of %q with serial number %x", cert.Subject, cert.SerialNumber)
	default:
		err = CheckValidity(cert, at)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("verify EIF signature: %w", err)
	}
	return out, cert, nil
}

// measure returns the registers and the certificate that signed, nil if none did.
func (r *Reader) measure() (*Measurements, *x509.Certificate, error) {
	m := newMeasurer()
	for _, s := range r.sections {
		dst := m.writers(s.Type)
		if dst == nil {
			continue
		}
		if err := copyAll(io.MultiWriter(dst...), s.Open()); err != nil {
			return nil, nil, fmt.Errorf("measure EIF: %w", err)
		}
	}
	out := m.measurements()
	s := r.find(SectionSignature)
	if s == nil {
		return out, nil, nil
	}
	raw, err := s.read(maxSignature)
	if err != nil {
		return nil, nil, err
	}
	cert, err := verifySignature(raw, out.PCR0)
	if err != nil {
		return nil, nil, fmt.Errorf("verify EIF signature: %w", err)
	}
	out.PCR8 = pcr8(cert)
	return out, cert, nil
}

// find returns the first section of a type, or nil.
func (r *Reader) find(t SectionType) *Section {
	for i := range r.sections {
		if r.sections[i].Type == t {
			return &r.sections[i]
		}
	}
	return nil
}

// read returns the section's data, of which there may be at most limit bytes.
func (s *Section) read(limit int64) ([]byte, error) {
	if s.Size > limit {
		return nil, fmt.Errorf("read EIF: the %s section has %d bytes, more than %d", s.Type, s.Size, limit)
	}
	b := make([]byte, s.Size)
	if _, err := io.ReadFull(s.Open(), b); err != nil {
		return nil, fmt.Errorf("read EIF: %w", err)
	}
	return b, nil
}

// copyAll copies all of src, which must be as long as it says.
func copyAll(dst io.Writer, src *io.SectionReader) error {
	n, err := io.CopyBuffer(onlyWriter{dst}, onlyReader{src}, make([]byte, min(copyBuffer, max(src.Size(), bytes.MinRead))))
	if err == nil && n != src.Size() {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// onlyReader and onlyWriter hide io.WriterTo and io.ReaderFrom, so that the buffer is used.
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)
