package eif

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
)

// Data is the content of a section to write; *io.SectionReader, *bytes.Reader and *strings.Reader
// implement it.
type Data interface {
	io.ReaderAt
	Size() int64 // bytes
}

// Image is what goes into an EIF.
type Image struct {
	Arch     Arch
	Kernel   Data
	Cmdline  string    // written without white space at its ends, as nitro-cli does
	Metadata *Metadata // optional
	Ramdisks []Data    // at most MaxRamdisks, in the order in which the kernel unpacks them
	Signer   *Signer   // optional; takes the place of one ramdisk
}

// Write writes an EIF to w, from the current position, and returns its measurements. The bytes are
// those of AWS's builder for the same inputs and metadata; only signatures differ. Each input is
// read once, while it is written and measured; the header is filled in at the end, for which w must
// seek.
func Write(w io.WriteSeeker, img Image) (*Measurements, error) {
	l, err := img.layout()
	if err == nil {
		var m *Measurements
		if m, err = l.write(w, img.Signer); err == nil {
			return m, nil
		}
	}
	return nil, fmt.Errorf("write EIF: %w", err)
}

// Sign writes the EIF that r reads to w, from the current position, signed by s, and returns its
// measurements. Nothing else changes, but that a signature that it had is gone.
func Sign(w io.WriteSeeker, r *Reader, s *Signer) (*Measurements, error) {
	m, err := r.layout().write(w, s)
	if err != nil {
		return nil, fmt.Errorf("sign EIF: %w", err)
	}
	return m, nil
}

// layout is an EIF before it is written, without a signature.
type layout struct {
	arch   Arch
	memory uint64
	cpus   uint64
	parts  []part
}

type part struct {
	typ  SectionType
	data Data
}

// layout returns the sections in the order of AWS's builder.
func (img *Image) layout() (*layout, error) {
	if img.Arch != X86_64 && img.Arch != AArch64 {
		return nil, fmt.Errorf("the architecture is %q, neither %q nor %q", img.Arch, X86_64, AArch64)
	}
	if img.Kernel == nil || img.Kernel.Size() == 0 {
		return nil, errors.New("the kernel is missing or empty")
	}
	if len(img.Ramdisks) > MaxRamdisks {
		return nil, fmt.Errorf("there are %d ramdisks, but at most %d fit", len(img.Ramdisks), MaxRamdisks)
	}
	cmdline := strings.TrimSpace(img.Cmdline)
	if len(cmdline) > maxCmdline {
		return nil, fmt.Errorf("the command line has %d bytes, more than %d", len(cmdline), maxCmdline)
	}
	if strings.ContainsRune(cmdline, 0) {
		return nil, errors.New("the command line has a NUL, at which the kernel would end it")
	}
	l := &layout{img.Arch, DefaultMemory, DefaultCPUs, []part{{SectionKernel, img.Kernel}, {SectionCmdline, strings.NewReader(cmdline)}}}
	if img.Metadata != nil {
		metadata, err := img.Metadata.encode()
		if err != nil {
			return nil, err
		}
		if len(metadata) > maxMetadata {
			return nil, fmt.Errorf("the metadata has %d bytes, more than %d", len(metadata), maxMetadata)
		}
		l.parts = append(l.parts, part{SectionMetadata, strings.NewReader(metadata)})
	}
	for _, r := range img.Ramdisks {
		l.parts = append(l.parts, part{SectionRamdisk, r})
	}
	return l, nil
}

func (r *Reader) layout() *layout {
	l := &layout{r.Arch, r.Memory, r.CPUs, nil}
	for _, s := range r.sections {
		if s.Type != SectionSignature {
			l.parts = append(l.parts, part{s.Type, s.Open()})
		}
	}
	return l
}

// write writes the sections, and behind them a signature if s is not nil. The header comes first in
// the checksum and last in time: the size of the signature depends on the digits of PCR0.
func (l *layout) write(w io.WriteSeeker, s *Signer) (*Measurements, error) {
	sections := len(l.parts)
	if s != nil {
		sections++
	}
	if sections > maxSections {
		return nil, fmt.Errorf("there are %d sections with the signature, but at most %d fit: leave out a ramdisk or the metadata", sections, maxSections)
	}
	h := header{Version: version, Memory: l.memory, CPUs: l.cpus}
	copy(h.Magic[:], magic)
	if l.arch == AArch64 {
		h.Flags = flagARM64
	}
	start, err := w.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(make([]byte, headerSize)); err != nil {
		return nil, err
	}

	end := uint64(headerSize)
	crc := crc32.NewIEEE()
	section := func(p part, measure ...io.Writer) error {
		size := uint64(p.data.Size())
		h.Offsets[h.NumSections], h.Sizes[h.NumSections] = end, size
		h.NumSections++
		end += sectionHeaderSize + size
		dst := io.MultiWriter(w, crc)
		if _, err := dst.Write(encodeSectionHeader(p.typ, size)); err != nil {
			return err
		}
		if err := copyAll(io.MultiWriter(append(measure, dst)...), io.NewSectionReader(p.data, 0, int64(size))); err != nil {
			return fmt.Errorf("%s: %w", p.typ, err)
		}
		return nil
	}
	m := newMeasurer()
	for _, p := range l.parts {
		if err := section(p, m.writers(p.typ)...); err != nil {
			return nil, err
		}
	}
	out := m.measurements()
	if s != nil {
		signature, err := s.sign(out.PCR0)
		if err != nil {
			return nil, err
		}
		if err := section(part{SectionSignature, bytes.NewReader(signature)}); err != nil {
			return nil, err
		}
		out.PCR8 = pcr8(s.cert)
	}

	raw := h.encode()
	sum := combineCRC(crc32.ChecksumIEEE(raw[:crcOffset]), crc.Sum32(), end-headerSize)
	binary.BigEndian.PutUint32(raw[crcOffset:], sum)
	if _, err := w.Seek(start, io.SeekStart); err != nil {
		return nil, err
	}
	if _, err := w.Write(raw); err != nil {
		return nil, err
	}
	if _, err := w.Seek(start+int64(end), io.SeekStart); err != nil {
		return nil, err
	}
	return out, nil
}
