package process

import (
	"bufio"
	"compress/gzip"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	newcMagic  = "070701"
	headerSize = 110 // magic and 13 fields of 8 hexadecimal digits
	trailer    = "TRAILER!!!"

	maxName   = 4096 // bytes with the final NUL, as the kernel (PATH_MAX)
	maxTarget = 4096 // of a symbolic link
)

// header is that of a newc entry, in the order of the archive (Documentation/driver-api/early-userspace/
// buffer-format.rst).
type header struct {
	Ino, Mode, UID, GID, NLink, MTime, FileSize, Major, Minor, RMajor, RMinor, NameSize, Check uint32
}

// unpack writes the entries of a ramdisk below root: one newc cpio archive, gzipped or not, as the
// kernel unpacks an initial ramdisk over those before it. Entries replace what is in their place,
// except that folders stay.
//
// Nothing is written outside of root: names are taken relative to it, os.Root follows symbolic links
// only as far as they stay inside, and ".." is refused.
func unpack(root *os.Root, ramdisk io.Reader) error {
	r := bufio.NewReaderSize(ramdisk, 256<<10)
	if magic, err := r.Peek(2); err == nil && magic[0] == 0x1f && magic[1] == 0x8b {
		z, err := gzip.NewReader(r)
		if err != nil {
			return err
		}
		defer z.Close()
		r = bufio.NewReaderSize(z, 256<<10)
	}
	u := &unpacker{root: root, r: r, links: map[inode]string{}}
	for {
		more, err := u.entry()
		if err != nil {
			return err
		}
		if !more {
			return u.end()
		}
	}
}

// inode identifies a file with several names inside of one archive.
type inode struct{ ino, major, minor uint32 }

type unpacker struct {
	root  *os.Root
	r     *bufio.Reader
	pos   int64
	links map[inode]string // first name of each file with several
}

// read fills b.
func (u *unpacker) read(b []byte) error {
	n, err := io.ReadFull(u.r, b)
	u.pos += int64(n)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// align skips to the next multiple of 4.
func (u *unpacker) align() error { return u.read(make([]byte, -u.pos&3)) }

// entry unpacks one entry and reports whether another may follow.
func (u *unpacker) entry() (more bool, err error) {
	raw := make([]byte, headerSize)
	if err := u.read(raw); err != nil {
		return false, fmt.Errorf("read header: %w", err)
	}
	if string(raw[:len(newcMagic)]) != newcMagic {
		return false, fmt.Errorf("the entry at byte %d does not start with %s: only newc archives, plain or gzipped, can be unpacked", u.pos-headerSize, newcMagic)
	}
	fields := make([]byte, hex.DecodedLen(headerSize-len(newcMagic)))
	if _, err := hex.Decode(fields, raw[len(newcMagic):]); err != nil {
		return false, fmt.Errorf("read header: %w", err)
	}
	var h header
	if _, err := binary.Decode(fields, binary.BigEndian, &h); err != nil {
		return false, err
	}
	if h.NameSize < 1 || h.NameSize > maxName {
		return false, fmt.Errorf("an entry's name has %d bytes, but 1 to %d are allowed", h.NameSize, maxName)
	}
	name := make([]byte, h.NameSize)
	if err := u.read(name); err != nil {
		return false, fmt.Errorf("read name: %w", err)
	}
	if name[len(name)-1] != 0 {
		return false, fmt.Errorf("the name %q does not end with NUL", name)
	}
	if err := u.align(); err != nil {
		return false, err
	}
	text := string(name[:len(name)-1])
	if text == trailer {
		return false, nil
	}
	data := io.LimitReader(u.r, int64(h.FileSize))
	if err := u.create(text, h, data); err != nil {
		return false, fmt.Errorf("unpack %q: %w", text, err)
	}
	// What the entry's type does not use is skipped.
	if _, err := io.Copy(io.Discard, data); err != nil {
		return false, err
	}
	if data.(*io.LimitedReader).N > 0 {
		return false, io.ErrUnexpectedEOF
	}
	u.pos += int64(h.FileSize)
	return true, u.align()
}

// end accepts zeros to the end of the ramdisk: archives are padded to blocks. Anything else would be
// measured but not used.
func (u *unpacker) end() error {
	for {
		switch b, err := u.r.ReadByte(); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case b != 0:
			return errors.New("data follows the end of the archive: give each archive a ramdisk of its own")
		}
	}
}

// create makes the file system object of an entry.
func (u *unpacker) create(name string, h header, data io.Reader) error {
	if strings.ContainsRune(name, 0) {
		return errors.New("the name has a NUL inside")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return errors.New("a name with .. could climb out")
		}
	}
	clean := strings.TrimPrefix(path.Clean("/"+name), "/")
	kind := h.Mode & unix.S_IFMT
	if clean == "" {
		if kind != unix.S_IFDIR {
			return errors.New("the root must be a folder")
		}
		return u.attributes(".", h)
	}
	if dir := path.Dir(clean); dir != "." {
		if err := u.root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	old, err := u.root.Lstat(clean)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if kind == unix.S_IFDIR {
		if err == nil && !old.IsDir() {
			if err := u.root.Remove(clean); err != nil {
				return err
			}
		}
		if err != nil || !old.IsDir() {
			if err := u.root.Mkdir(clean, 0o755); err != nil {
				return err
			}
		}
		return u.attributes(clean, h)
	}

	// A second name of a file has no data of its own, or, in some archives, the first ones have none
	// and the last one has all.
	id := inode{h.Ino, h.Major, h.Minor}
	if first, ok := u.links[id]; ok && kind == unix.S_IFREG && h.NLink > 1 && first != clean {
		if err == nil {
			if err := u.root.RemoveAll(clean); err != nil {
				return err
			}
		}
		if err := u.root.Link(first, clean); err != nil {
			return err
		}
		if h.FileSize == 0 {
			return nil
		}
		return u.write(clean, os.O_WRONLY|os.O_TRUNC, h, data)
	}
	if err == nil {
		if err := u.root.RemoveAll(clean); err != nil {
			return err
		}
	}
	switch kind {
	case unix.S_IFREG:
		if h.NLink > 1 {
			u.links[id] = clean
		}
		return u.write(clean, os.O_WRONLY|os.O_CREATE|os.O_EXCL, h, data)
	case unix.S_IFLNK:
		target, err := io.ReadAll(io.LimitReader(data, maxTarget+1))
		if err != nil {
			return err
		}
		if len(target) == 0 || len(target) > maxTarget || strings.ContainsRune(string(target), 0) {
			return errors.New("the target of the symbolic link is empty, too long or has a NUL inside")
		}
		if err := u.root.Symlink(string(target), clean); err != nil {
			return err
		}
		return u.root.Lchown(clean, int(h.UID), int(h.GID))
	case unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK:
		if err := u.node(clean, h); err != nil {
			return err
		}
		return u.attributes(clean, h)
	}
	return fmt.Errorf("its mode %#o has no known type", h.Mode)
}

// write fills a regular file.
func (u *unpacker) write(name string, flags int, h header, data io.Reader) error {
	f, err := u.root.OpenFile(name, flags, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, data)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return u.attributes(name, h)
}

// node makes a device, pipe or socket. Its folder is opened inside root, so that the last step follows
// no link.
func (u *unpacker) node(name string, h header) error {
	dir, err := u.root.Open(path.Dir(name))
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Mknodat(int(dir.Fd()), path.Base(name), h.Mode&unix.S_IFMT|0o600, int(unix.Mkdev(h.RMajor, h.RMinor)))
}

// attributes sets owner and mode, in this order: a change of owner takes setuid away. Name is no
// symbolic link.
func (u *unpacker) attributes(name string, h header) error {
	if err := u.root.Lchown(name, int(h.UID), int(h.GID)); err != nil {
		return err
	}
	mode := fs.FileMode(h.Mode & 0o777)
	for bit, m := range map[uint32]fs.FileMode{unix.S_ISUID: fs.ModeSetuid, unix.S_ISGID: fs.ModeSetgid, unix.S_ISVTX: fs.ModeSticky} {
		if h.Mode&bit != 0 {
			mode |= m
		}
	}
	return u.root.Chmod(name, mode)
}
