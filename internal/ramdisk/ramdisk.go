// Package ramdisk writes initial ramdisks whose bytes depend on their content alone, and reads back the
// workload manifest of a sealed EIF. They are newc archives (Documentation/driver-api/early-userspace/
// buffer-format.rst), uncompressed.
package ramdisk

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"regexp"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/sealed"
	"cloister.dev/cloister/workload"
)

// MaxFile is the size of the largest file of a newc archive in bytes: its field has 32 bits.
const MaxFile = math.MaxUint32

// Writer writes one archive. Everything in it belongs to root and has neither time nor inode number.
type Writer struct{ records cpio.RecordWriter }

// NewWriter returns a Writer to w. The caller must Close it.
func NewWriter(w io.Writer) *Writer { return &Writer{records: cpio.Newc.Writer(w)} }

// Folder writes a folder with mode permissions; the folders above it must have been written.
func (w *Writer) Folder(name string, mode uint64) error {
	return w.write(cpio.Directory(name, mode))
}

// File writes a file with size bytes of content and mode permissions. It fails on a file of 4 GiB or more,
// which the format cannot hold.
func (w *Writer) File(name string, mode uint64, content io.ReaderAt, size int64) error {
	if size > MaxFile {
		return fmt.Errorf("%s has %d bytes, and a file in a ramdisk has less than 4 GiB", name, size)
	}
	return w.write(cpio.Record{
		ReaderAt: io.NewSectionReader(content, 0, size),
		Info:     cpio.Info{Name: name, Mode: cpio.S_IFREG | mode, FileSize: uint64(size)},
	})
}

func (w *Writer) write(r cpio.Record) error {
	return w.records.WriteRecord(cpio.MakeReproducible(r))
}

// Close ends the archive. It does not close what is below.
func (w *Writer) Close() error { return cpio.WriteTrailer(w.records) }

// ErrNotSealed says that an EIF has no workload manifest in it, as a base EIF.
var ErrNotSealed = errors.New("it is not sealed: there is no workload manifest in it")

// Manifest returns the workload manifest in a sealed EIF, its bytes unchecked; ErrNotSealed where there is
// none. It must be the first file of the second ramdisk, and nothing else may be there or follow than what
// `cloister build` writes. So in an EIF of anybody's with the PCR1 of a release it is that release's enclaved
// which runs this manifest: what is unpacked later, as another /init would be, takes the place of what is there.
func Manifest(image *eif.Reader) ([]byte, error) {
	disks := image.Ramdisks()
	if len(disks) < 2 {
		return nil, ErrNotSealed
	}
	m, err := readManifest(disks[1].Open())
	if err == nil && len(disks) > 2 {
		return nil, fmt.Errorf("it has %d ramdisks, and a sealed EIF has two: build it again with `cloister build`", len(disks))
	}
	return m, err
}

// readManifest reads all of the archive but the content of the images.
func readManifest(disk io.ReadSeeker) ([]byte, error) {
	dir, err := next(disk)
	if err != nil || dir.name != sealed.Dir || dir.mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, ErrNotSealed
	}
	file, err := next(disk)
	if err != nil || file.name != sealed.Manifest || file.mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("its folder %s does not begin with the workload manifest: build it again with `cloister build`", sealed.Dir)
	}
	if file.size > workload.MaxManifestSize {
		return nil, fmt.Errorf("its workload manifest has %d bytes, more than %d", file.size, workload.MaxManifestSize)
	}
	b := make([]byte, file.size)
	if _, err := io.ReadFull(disk, b); err != nil {
		return nil, fmt.Errorf("read its workload manifest: %w", err)
	}
	if err := checkRest(disk, dir, file); err != nil {
		return nil, err
	}
	return b, nil
}

// checkRest reads the headers behind the content of the manifest, up to the end.
func checkRest(disk io.ReadSeeker, dir, file entry) error {
	seen := map[string]bool{}
	for _, e := range []entry{dir, file} {
		if !e.plain() {
			return fmt.Errorf("its second ramdisk has %q as a link or with content that the kernel skips: build it again with `cloister build`", e.name)
		}
		seen[e.name] = true
	}
	left := file.padding()
	for {
		if _, err := disk.Seek(left, io.SeekCurrent); err != nil {
			return fmt.Errorf("read its second ramdisk: %w", err)
		}
		e, err := next(disk)
		if err != nil {
			return fmt.Errorf("read its second ramdisk: %w", noEOF(err))
		}
		if e.name == cpio.Trailer && e.size == 0 {
			break
		}
		if seen[e.name] || !e.plain() || !expected(e) || len(seen) == maxEntries {
			return fmt.Errorf("its second ramdisk has %q, which `cloister build` does not put there in this way: build it again", e.name)
		}
		seen[e.name] = true
		left = int64(e.size) + e.padding()
	}
	if n, err := disk.Read(make([]byte, 1)); n > 0 || err != io.EOF {
		return errors.New("its second ramdisk goes on behind its end: build it again with `cloister build`")
	}
	return nil
}

// expected tells what the folder of a sealed EIF holds beside the manifest.
func expected(e entry) bool {
	folder := e.mode&unix.S_IFMT == unix.S_IFDIR
	switch e.name {
	case sealed.Image, sealed.Image + "/blobs", sealed.Image + "/blobs/sha256":
		return folder
	case sealed.Image + "/oci-layout", sealed.Image + "/index.json":
		return !folder
	}
	return !folder && blob.MatchString(e.name)
}

var blob = regexp.MustCompile(`^` + regexp.QuoteMeta(sealed.Image) + `/blobs/sha256/[0-9a-f]{64}$`)

const (
	magic      = "070701"
	headerSize = 110 // magic and 13 fields of 8 hexadecimal digits
	maxName    = 256 // bytes with the final NUL, more than any that is looked for
	maxEntries = 1 << 16
)

// entry is what a header says: a name, a mode, the number of links and the size of the content in bytes.
type entry struct {
	name              string
	mode, links, size uint32
}

// plain tells whether the kernel makes of an entry the folder or the file of its name and nothing else: a
// second link to a file would be written through (init/initramfs.c, maybe_link).
func (e entry) plain() bool {
	switch e.mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return e.size == 0
	case unix.S_IFREG:
		return e.links < 2
	}
	return false
}

// padding is the number of bytes that follow the content.
func (e entry) padding() int64 { return -int64(e.size) & 3 }

// next reads a header of an entry, its name and the zeros that follow.
func next(r io.Reader) (entry, error) {
	var raw [headerSize]byte
	if _, err := io.ReadFull(r, raw[:]); err != nil {
		return entry{}, err
	}
	var b [(headerSize - len(magic)) / 2]byte
	if _, err := hex.Decode(b[:], raw[len(magic):]); err != nil || string(raw[:len(magic)]) != magic {
		return entry{}, errors.New("not a newc archive")
	}
	field := func(i int) uint32 { return binary.BigEndian.Uint32(b[4*i:]) }
	length := field(11)
	if length < 1 || length > maxName {
		return entry{}, errors.New("unexpected name")
	}
	name := make([]byte, (headerSize+length+3)/4*4-headerSize)
	if _, err := io.ReadFull(r, name); err != nil {
		return entry{}, err
	}
	if name[length-1] != 0 {
		return entry{}, errors.New("unexpected name")
	}
	return entry{name: string(name[:length-1]), mode: field(1), links: field(4), size: field(6)}, nil
}

// noEOF makes a plain end an error in words, since a trailer is the end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
