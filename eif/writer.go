package eif

import (
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
	Cmdline  string    // written without white space at its ends, as AWS's builder does
	Metadata *Metadata // optional
	Ramdisks []Data    // at most MaxRamdisks, in the order in which the kernel unpacks them
}

// Write writes an unsigned EIF to w, from the current position, and returns its measurements. The
// bytes are those of AWS's builder for the same inputs and metadata. Each input is read once, while
// it is written and measured; the checksum is filled in at the end, for which w must seek.
func Write(w io.WriteSeeker, img Image) (*Measurements, error) {
	m, err := write(w, img)
	if err != nil {
		return nil, fmt.Errorf("write EIF: %w", err)
	}
	return m, nil
}

// part is a section to write. ramdisk counts from 0; negative numbers see measured.
type part struct {
	typ     SectionType
	data    Data
	ramdisk int
}

func write(w io.WriteSeeker, img Image) (*Measurements, error) {
	parts, err := img.parts()
	if err != nil {
		return nil, err
	}
	h := header{Version: version, Memory: DefaultMemory, CPUs: DefaultCPUs, NumSections: uint16(len(parts))}
	copy(h.Magic[:], magic)
	if img.Arch == AArch64 {
		h.Flags = flagARM64
	}
	offset := uint64(headerSize)
	for i, p := range parts {
		h.Offsets[i], h.Sizes[i] = offset, uint64(p.data.Size())
		offset += sectionHeaderSize + h.Sizes[i]
	}

	start, err := w.Seek(0, io.SeekCurrent)
	if err != nil {
		return nil, err
	}
	raw := h.encode()
	if _, err := w.Write(raw); err != nil {
		return nil, err
	}
	crc := crc32.NewIEEE()
	crc.Write(raw[:crcOffset])
	measure := newMeasurer()
	for _, p := range parts {
		if _, err := io.MultiWriter(w, crc).Write(encodeSectionHeader(p.typ, p.data.Size())); err != nil {
			return nil, err
		}
		dst := io.MultiWriter(w, crc)
		if p.typ != SectionMetadata {
			dst = io.MultiWriter(w, crc, measure.writer(p.ramdisk))
		}
		if err := copyAll(dst, io.NewSectionReader(p.data, 0, p.data.Size())); err != nil {
			return nil, fmt.Errorf("%s: %w", p.typ, err)
		}
	}

	if _, err := w.Seek(start+crcOffset, io.SeekStart); err != nil {
		return nil, err
	}
	if _, err := w.Write(binary.BigEndian.AppendUint32(nil, crc.Sum32())); err != nil {
		return nil, err
	}
	if _, err := w.Seek(start+int64(offset), io.SeekStart); err != nil {
		return nil, err
	}
	return measure.measurements(), nil
}

// parts returns the sections in the order of AWS's builder.
func (img *Image) parts() ([]part, error) {
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
	parts := []part{
		{SectionKernel, img.Kernel, -1},
		{SectionCmdline, strings.NewReader(cmdline), -1},
	}
	if img.Metadata != nil {
		metadata, err := img.Metadata.encode()
		if err != nil {
			return nil, err
		}
		if len(metadata) > maxMetadata {
			return nil, fmt.Errorf("the metadata has %d bytes, more than %d", len(metadata), maxMetadata)
		}
		parts = append(parts, part{SectionMetadata, strings.NewReader(metadata), -1})
	}
	for i, r := range img.Ramdisks {
		parts = append(parts, part{SectionRamdisk, r, i})
	}
	return parts, nil
}
