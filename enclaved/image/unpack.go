package image

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/oci"
)

// Whiteouts (OCI image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	opaqueWhiteout = ".wh..wh..opq"
)

// capabilityXattr holds the capabilities of an executable (capabilities(7)).
const capabilityXattr = "security.capability"

// pageSize and inodeSize are what tmpfs takes of the memory for each started page of a file's content
// and, about, for each inode and name.
const (
	pageSize  = 4096
	inodeSize = 1024
)

// maxWindow is the most memory that a zstd frame may ask for: what zstd's own program takes without being
// told otherwise. RFC 8878 allows 3.75 TB.
const maxWindow = 128 << 20

// Every entry that stays takes its content and inodeSize of the limit, and in the archive its content and a
// header or three of 512 bytes. What is longer than this many times the limit is mostly thrown away again.
const maxArchive = 4

// SpaceError says that an image does not fit. Both figures are in bytes.
type SpaceError struct {
	Need  int64 // at least this much
	Limit int64
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("the image needs at least %d bytes unpacked and the enclave has %d bytes of memory for it: raise the memory of the enclave", e.Need, e.Limit)
}

// Unpacker unpacks the layers of one image, lowest first, into a directory. It works below that
// directory's descriptor only: names are resolved by the kernel with the directory as root (openat2,
// RESOLVE_IN_ROOT), so that neither "..", nor an absolute name, nor a symbolic link of an archive leads
// out of it. Close releases the descriptor.
type Unpacker struct {
	root  int
	limit int64
	used  int64
}

// NewUnpacker returns an Unpacker for the existing, empty directory dir. Contents and inodes may take
// limit bytes of memory together.
func NewUnpacker(dir string, limit int64) (*Unpacker, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dir, err)
	}
	return &Unpacker{root: fd, limit: limit}, nil
}

// Close releases what u holds; the unpacked files stay.
func (u *Unpacker) Close() error { return unix.Close(u.root) }

// Used returns how much of the limit is taken, in bytes.
func (u *Unpacker) Used() int64 { return u.used }

// layer unpacks one layer over those before it, with owners, modes, times, links, FIFOs and
// file capabilities; other extended attributes are left out. It reads r to its end, and the uncompressed
// archive by the reader that through returns. Devices, names with ".." and everything else that a layer of a
// container has no use for are errors, after which the directory must be thrown away.
func (u *Unpacker) layer(r io.Reader, c oci.Compression, through func(io.Reader) io.Reader) error {
	switch c {
	case oci.Gzip:
		z, err := gzip.NewReader(bufio.NewReaderSize(r, 64<<10))
		if err != nil {
			return fmt.Errorf("read gzip: %w", err)
		}
		r = z
	case oci.Zstd:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return fmt.Errorf("read zstd: %w", err)
		}
		defer z.Close()
		r = z
	}
	return u.archive(through(&bounded{r, maxArchive * u.limit}))
}

// bounded fails where an archive goes on after left bytes: a few compressed bytes can make more than anybody
// would wait for.
type bounded struct {
	r    io.Reader
	left int64
}

var errArchive = fmt.Errorf("the layer is more than %d times as long as all that fits into the enclave: raise the memory of the enclave, or make an image without content that is replaced at once", maxArchive)

func (b *bounded) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errArchive
	}
	// One byte more tells an end from too much.
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.r.Read(p)
	b.left -= int64(n)
	return n, err
}

// archive unpacks an uncompressed layer.
func (u *Unpacker) archive(r io.Reader) error {
	l := &layer{Unpacker: u, made: map[entryKey]bool{}, kept: map[uint64]bool{}, dirs: map[uint64]dirTime{}, parent: -1}
	defer l.leave()
	defer func() { u.used -= l.names }()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if err := l.entry(h, tr); err != nil {
			var space *SpaceError
			if errors.As(err, &space) {
				return err
			}
			return fmt.Errorf("unpack %q: %w", h.Name, err)
		}
	}
	if err := l.finish(); err != nil {
		return err
	}
	// What follows the archive's end belongs to the layer's digest.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read archive: %w", err)
	}
	return nil
}

// layer is the state of one layer that is being unpacked.
type layer struct {
	*Unpacker
	// made and kept say what this layer has brought: whiteouts remove only what lies in layers below.
	made map[entryKey]bool
	kept map[uint64]bool // inodes of directories, all above them included
	dirs map[uint64]dirTime
	// names is what is taken of the limit for the names in dirs, which can be long.
	names int64

	// The directory of the last entry, which is often that of the next one; -1 for none. It is stale
	// after something was removed: its name could lead elsewhere now.
	parent      int
	parentName  string
	parentStale bool
}

// entryKey is a name in a directory, however the directory was reached.
type entryKey struct {
	dir  uint64
	name string
}

// dirTime is set when everything has been put into the directory.
type dirTime struct {
	name string
	time []unix.Timespec
}

// finish sets the times of the layer's directories.
func (l *layer) finish() error {
	for want, d := range l.dirs {
		fd, err := l.resolve(d.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
		if err != nil {
			continue // the layer itself has replaced it
		}
		ino, err := inode(fd)
		if err == nil && ino == want {
			err = unix.UtimesNanoAt(fd, ".", d.time, 0)
		}
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("set the time of %q: %w", d.name, err)
		}
	}
	return nil
}

// resolve opens a name below the root without ever leaving it.
func (u *Unpacker) resolve(name string, flags uint64) (int, error) {
	for {
		fd, err := unix.Openat2(u.root, name, &unix.OpenHow{
			Flags:   flags | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
		// EAGAIN: a rename elsewhere raced with ".." (openat2(2)).
		if err != unix.EINTR && err != unix.EAGAIN {
			return fd, err
		}
	}
}

// clean returns the name below the root that an archive's name stands for, "." for the root itself.
func clean(name string) (string, error) {
	if strings.ContainsRune(name, 0) {
		return "", errors.New("the name has a NUL byte")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", errors.New(`the name has a "..", which could lead out of the image`)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

// openDir returns a descriptor of the directory name, made with its parents where they are missing.
func (l *layer) openDir(name string) (int, error) {
	if name == "" || name == "." {
		return l.resolve(".", unix.O_PATH|unix.O_DIRECTORY)
	}
	fd, err := l.resolve(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != unix.ENOENT {
		return fd, err
	}
	up, err := l.openDir(path.Dir(name))
	if err != nil {
		return -1, err
	}
	defer unix.Close(up)
	if err := l.take(inodeSize); err != nil {
		return -1, err
	}
	// EEXIST means a symbolic link that leads to nothing: what it names is not made.
	if err := unix.Mkdirat(up, path.Base(name), 0o755); err != nil {
		return -1, fmt.Errorf("make directory %q: %w", name, err)
	}
	if err := unix.Fchownat(up, path.Base(name), 0, 0, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return -1, fmt.Errorf("set the owner of directory %q: %w", name, err)
	}
	return l.resolve(name, unix.O_PATH|unix.O_DIRECTORY)
}

// leave closes what enter has opened.
func (l *layer) leave() {
	if l.parent >= 0 {
		unix.Close(l.parent)
		l.parent = -1
	}
}

// enter returns a descriptor of the directory name, which stays l's, and marks it and all above it as
// brought by this layer.
func (l *layer) enter(name string) (int, error) {
	if l.parent >= 0 && l.parentName == name && !l.parentStale {
		return l.parent, nil
	}
	l.leave()
	fd, err := l.openDir(name)
	if err != nil {
		return -1, err
	}
	l.parent, l.parentName, l.parentStale = fd, name, false
	return fd, l.keep(fd)
}

// keep marks a directory and all above it, up to the root.
func (l *layer) keep(dir int) error {
	root, err := inode(l.root)
	if err != nil {
		return err
	}
	fd, err := unix.Dup(dir)
	if err != nil {
		return err
	}
	for {
		ino, err := inode(fd)
		if err != nil || l.kept[ino] {
			unix.Close(fd)
			return err
		}
		l.kept[ino] = true
		if ino == root {
			return unix.Close(fd)
		}
		up, err := unix.Openat(fd, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		if err != nil {
			return err
		}
		fd = up
	}
}

func inode(fd int) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// take counts n bytes more as used.
func (u *Unpacker) take(n int64) error {
	// Both are below 2^62: a header's size is checked before it comes here.
	if u.used+n > u.limit {
		return &SpaceError{Need: u.used + n, Limit: u.limit}
	}
	u.used += n
	return nil
}

// content is what n bytes of a file's content take.
func content(n int64) int64 { return (n + pageSize - 1) / pageSize * pageSize }

func (l *layer) entry(h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	// chown(2) takes 32 bits, of which all ones leave the owner as it is.
	if min(h.Uid, h.Gid) < 0 || max(h.Uid, h.Gid) >= 1<<32-1 {
		return fmt.Errorf("the owner %d:%d is out of range", h.Uid, h.Gid)
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return errors.New("the root of the image is not a directory")
		}
		return l.directory(l.root, ".", h)
	}
	dir, err := l.enter(path.Dir(name))
	if err != nil {
		return err
	}
	base := path.Base(name)
	if base == opaqueWhiteout {
		return l.removeContent(dir, true)
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		if hidden == "" || hidden == "." || hidden == ".." {
			return errors.New("the whiteout names nothing")
		}
		if strings.HasPrefix(hidden, whiteoutPrefix) {
			return nil // AUFS's own files, which mean nothing anywhere else
		}
		return l.remove(dir, hidden, true)
	}

	ino, err := inode(dir)
	if err != nil {
		return err
	}
	l.made[entryKey{ino, base}] = true
	var st unix.Stat_t
	switch err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); {
	case err == unix.ENOENT:
	case err != nil:
		return err
	case h.Typeflag == tar.TypeDir && st.Mode&unix.S_IFMT == unix.S_IFDIR:
	case h.Typeflag == tar.TypeLink && l.sameFile(h.Linkname, &st):
		return nil
	default:
		if err := l.remove(dir, base, false); err != nil {
			return err
		}
	}

	switch h.Typeflag {
	case tar.TypeDir:
		return l.directory(dir, base, h)
	case tar.TypeReg:
		return l.file(dir, base, h, r)
	case tar.TypeSymlink:
		if err := l.take(inodeSize); err != nil {
			return err
		}
		if err := unix.Symlinkat(h.Linkname, dir, base); err != nil {
			return err
		}
		if err := unix.Fchownat(dir, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
		return setTime(dir, base, h)
	case tar.TypeLink:
		return l.hardLink(dir, base, h)
	case tar.TypeFifo:
		if err := l.take(inodeSize); err != nil {
			return err
		}
		if err := unix.Mknodat(dir, base, unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
		if err := unix.Fchownat(dir, base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
		if err := unix.Fchmodat(dir, base, mode(h), 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
		return setTime(dir, base, h)
	case tar.TypeChar, tar.TypeBlock:
		return errors.New("it is a device, which an image must not bring into an enclave")
	default:
		return fmt.Errorf("entries of type %q are not supported", h.Typeflag)
	}
}

// mode returns the permissions with set-user-id, set-group-id and sticky bits.
func mode(h *tar.Header) uint32 { return uint32(h.Mode) & 0o7777 }

func timespecs(h *tar.Header) []unix.Timespec {
	at := func(t time.Time) unix.Timespec {
		if t.IsZero() {
			t = time.Unix(0, 0)
		}
		return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
	}
	return []unix.Timespec{at(h.ModTime), at(h.ModTime)}
}

func setTime(dir int, base string, h *tar.Header) error {
	if err := unix.UtimesNanoAt(dir, base, timespecs(h), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// directory makes the directory or, where it exists, gives it the entry's owner, mode and time.
func (l *layer) directory(dir int, base string, h *tar.Header) error {
	switch err := unix.Mkdirat(dir, base, 0o700); err {
	case nil:
		if err := l.take(inodeSize); err != nil {
			return err
		}
	case unix.EEXIST:
	default:
		return err
	}
	fd, err := unix.Openat(dir, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	if err := unix.Fchmod(fd, mode(h)); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	if err := l.keep(fd); err != nil {
		return err
	}
	ino, err := inode(fd)
	if err != nil {
		return err
	}
	name, err := clean(h.Name)
	if err != nil {
		return err
	}
	if name == "" {
		name = "."
	}
	// Not the descriptor: there can be more directories than descriptors.
	more := int64(len(name) - len(l.dirs[ino].name))
	if err := l.take(more); err != nil {
		return err
	}
	l.names += more
	l.dirs[ino] = dirTime{name: name, time: timespecs(h)}
	return nil
}

func (l *layer) file(dir int, base string, h *tar.Header, r io.Reader) (err error) {
	if h.Size < 0 || h.Size > 1<<50 {
		return fmt.Errorf("the size %d is out of range", h.Size)
	}
	if err := l.take(inodeSize + content(h.Size)); err != nil {
		return err
	}
	fd, err := unix.Openat(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), base)
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	if _, err := io.Copy(f, r); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	// In this order: a new owner takes away set-user-id bits and capabilities.
	if err := unix.Fchown(fd, h.Uid, h.Gid); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	if err := unix.Fchmod(fd, mode(h)); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	if v, ok := h.PAXRecords["SCHILY.xattr."+capabilityXattr]; ok {
		if err := unix.Fsetxattr(fd, capabilityXattr, []byte(v), 0); err != nil {
			return fmt.Errorf("set file capabilities: %w", err)
		}
	}
	return setTime(dir, base, h)
}

// target opens the directory of a hard link's target, which must exist, and returns the name in it.
func (l *layer) target(linkname string) (dir int, base string, err error) {
	name, err := clean(linkname)
	if err != nil {
		return -1, "", fmt.Errorf("hard link to %q: %w", linkname, err)
	}
	if name == "" {
		return -1, "", errors.New("it is a hard link to the root")
	}
	dir, err = l.resolve(path.Dir(name), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, "", fmt.Errorf("hard link to %q: %w", linkname, err)
	}
	return dir, path.Base(name), nil
}

// sameFile reports whether the target of a hard link is the file that is there already.
func (l *layer) sameFile(linkname string, st *unix.Stat_t) bool {
	dir, base, err := l.target(linkname)
	if err != nil {
		return false // the link itself will say so
	}
	defer unix.Close(dir)
	var t unix.Stat_t
	return unix.Fstatat(dir, base, &t, unix.AT_SYMLINK_NOFOLLOW) == nil && t.Dev == st.Dev && t.Ino == st.Ino
}

func (l *layer) hardLink(dir int, base string, h *tar.Header) error {
	from, name, err := l.target(h.Linkname)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	if err := l.take(inodeSize); err != nil {
		return err
	}
	// Without AT_SYMLINK_FOLLOW a link to a symbolic link is a second name of that link.
	if err := unix.Linkat(from, name, dir, base, 0); err != nil {
		return fmt.Errorf("hard link to %q: %w", h.Linkname, err)
	}
	return nil
}

// remove removes base from dir with all that is below it; with lower only what this layer has not
// brought itself. Nothing is followed. What does not exist is no error.
func (l *layer) remove(dir int, base string, lower bool) error {
	l.parentStale = true
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if err == unix.ENOENT {
			return nil
		}
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if lower {
			ino, err := inode(dir)
			if err != nil || l.made[entryKey{ino, base}] {
				return err
			}
		}
		if err := unix.Unlinkat(dir, base, 0); err != nil {
			return err
		}
		l.used -= inodeSize
		if st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 1 {
			l.used -= content(st.Size)
		}
		return nil
	}
	fd, err := unix.Openat(dir, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	err = l.removeContent(fd, lower)
	unix.Close(fd)
	if err != nil || (lower && l.kept[st.Ino]) {
		return err
	}
	if err := unix.Unlinkat(dir, base, unix.AT_REMOVEDIR); err != nil {
		return err
	}
	l.used -= inodeSize
	return nil
}

// removeContent removes what is in a directory, as remove does.
func (l *layer) removeContent(dir int, lower bool) error {
	fd, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "directory")
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := l.remove(dir, n, lower); err != nil {
			return err
		}
	}
	return nil
}
