package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"
)

// plainLayer is an uncompressed layer in a file: its digest is its diff ID.
type plainLayer struct {
	file string
	hash v1.Hash
	size int64
}

func newPlainLayer(file string) (*plainLayer, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	hash, size, err := v1.SHA256(f)
	return &plainLayer{file: file, hash: hash, size: size}, err
}

func (l *plainLayer) Digest() (v1.Hash, error)             { return l.hash, nil }
func (l *plainLayer) DiffID() (v1.Hash, error)             { return l.hash, nil }
func (l *plainLayer) Compressed() (io.ReadCloser, error)   { return os.Open(l.file) }
func (l *plainLayer) Uncompressed() (io.ReadCloser, error) { return os.Open(l.file) }
func (l *plainLayer) Size() (int64, error)                 { return l.size, nil }
func (l *plainLayer) MediaType() (types.MediaType, error)  { return types.OCIUncompressedLayer, nil }

// layerWriter writes tar entries that are the same on every machine.
type layerWriter struct {
	tw        *tar.Writer
	keepOwner bool
	made      map[string]bool   // folders written so far
	inodes    map[uint64]string // first name of each file with several links
}

// writeLayer writes the root file system that o describes as a tar stream.
func writeLayer(w io.Writer, o options) error {
	l := &layerWriter{tw: tar.NewWriter(w), keepOwner: o.keepOwner, made: map[string]bool{}, inodes: map[uint64]string{}}
	if o.rootfs != "" {
		if err := l.rootfs(o.rootfs); err != nil {
			return err
		}
	}
	// Only the root file system may say who owns what; everything that is added belongs to root.
	l.keepOwner = false
	for _, d := range sorted(o.dirs) {
		p, modeText, _ := strings.Cut(d, ":")
		mode, err := parseMode(modeText, 0o755)
		if err != nil {
			return fmt.Errorf("parse --dir %s: %w", d, err)
		}
		if err := l.dir(clean(p), mode); err != nil {
			return err
		}
	}
	for _, a := range sorted(o.adds) {
		if err := l.add(a); err != nil {
			return fmt.Errorf("add %s: %w", a, err)
		}
	}
	return l.tw.Close()
}

func sorted(l list) []string {
	s := append([]string(nil), l...)
	sort.Strings(s)
	return s
}

// clean turns an absolute path of the image into the name of a tar entry.
func clean(p string) string { return strings.TrimPrefix(path.Clean("/"+p), "/") }

func parseMode(s string, otherwise int64) (int64, error) {
	if s == "" {
		return otherwise, nil
	}
	return strconv.ParseInt(s, 8, 64)
}

// header writes h without anything that depends on the machine or the moment.
func (l *layerWriter) header(h *tar.Header) error {
	h.ModTime, h.AccessTime, h.ChangeTime = time.Unix(0, 0), time.Time{}, time.Time{}
	h.Uname, h.Gname = "", ""
	if !l.keepOwner {
		h.Uid, h.Gid = 0, 0
	}
	if h.Typeflag == tar.TypeDir {
		l.made[strings.TrimSuffix(h.Name, "/")] = true
	}
	h.Format = tar.FormatPAX
	return l.tw.WriteHeader(h)
}

func (l *layerWriter) dir(p string, mode int64) error {
	if err := l.parents(p); err != nil {
		return err
	}
	if p == "" || l.made[p] {
		return nil
	}
	return l.header(&tar.Header{Typeflag: tar.TypeDir, Name: p + "/", Mode: mode})
}

// parents writes the folders above p that the layer does not have yet.
func (l *layerWriter) parents(p string) error {
	if up := path.Dir(p); up != "." && !l.made[up] {
		return l.dir(up, 0o755)
	}
	return nil
}

// add writes one --add: a file, or a folder with everything in it.
func (l *layerWriter) add(spec string) error {
	parts := strings.Split(spec, ":")
	if len(parts) < 2 || len(parts) > 3 {
		return errors.New("want SRC:DST[:MODE]")
	}
	st, err := os.Stat(parts[0])
	if err != nil {
		return err
	}
	dst := clean(parts[1])
	if st.IsDir() {
		return l.tree(parts[0], dst)
	}
	otherwise := int64(0o644)
	if st.Mode()&0o111 != 0 {
		otherwise = 0o755
	}
	modeText := ""
	if len(parts) == 3 {
		modeText = parts[2]
	}
	mode, err := parseMode(modeText, otherwise)
	if err != nil {
		return err
	}
	if err := l.parents(dst); err != nil {
		return err
	}
	if err := l.header(&tar.Header{Typeflag: tar.TypeReg, Name: dst, Mode: mode, Size: st.Size()}); err != nil {
		return err
	}
	return l.content(parts[0])
}

func (l *layerWriter) content(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(l.tw, f)
	return err
}

// rootfs writes a folder, or the entries of a tar file, at the root of the layer.
func (l *layerWriter) rootfs(src string) error {
	st, err := os.Stat(src)
	if err != nil {
		return err
	}
	if st.IsDir() {
		return l.tree(src, "")
	}
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", src, err)
		}
		h.Name = clean(h.Name)
		switch h.Typeflag {
		case tar.TypeXGlobalHeader:
			continue
		case tar.TypeDir:
			if h.Name == "" {
				continue
			}
			h.Name += "/"
		case tar.TypeLink:
			h.Linkname = clean(h.Linkname)
		}
		if err := l.header(h); err != nil {
			return err
		}
		if _, err := io.Copy(l.tw, tr); err != nil {
			return err
		}
	}
}

// tree writes the folder src below dst, in the order of filepath.WalkDir (lexical).
func (l *layerWriter) tree(src, dst string) error {
	return filepath.WalkDir(src, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(src, file)
		if err != nil {
			return err
		}
		entry := clean(path.Join(dst, filepath.ToSlash(rel)))
		if rel == "." {
			return l.dir(entry, 0o755)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSocket != 0 {
			return nil
		}
		return l.entry(file, entry, info)
	})
}

// entry writes one file of a tree with its links, device numbers and the extended attributes that
// an image can carry.
func (l *layerWriter) entry(file, entry string, info fs.FileInfo) error {
	var target string
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(file); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name = entry
	if info.IsDir() {
		h.Name += "/"
	}
	if st := info.Sys().(*syscall.Stat_t); info.Mode().IsRegular() && st.Nlink > 1 {
		if first, ok := l.inodes[st.Ino]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return l.header(h)
		}
		l.inodes[st.Ino] = entry
	}
	if h.PAXRecords, err = xattrs(file); err != nil {
		return err
	}
	if err := l.header(h); err != nil {
		return err
	}
	if info.Mode().IsRegular() {
		return l.content(file)
	}
	return nil
}

// xattrs returns file capabilities and overlayfs marks as PAX records.
func xattrs(file string) (map[string]string, error) {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(file, names)
	if errors.Is(err, unix.ENOTSUP) || n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list attributes of %s: %w", file, err)
	}
	records := map[string]string{}
	for _, attr := range strings.Split(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if attr != "security.capability" && !strings.HasPrefix(attr, "trusted.overlay.") {
			continue
		}
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(file, attr, value)
		if err != nil {
			return nil, fmt.Errorf("read attribute %s of %s: %w", attr, file, err)
		}
		records["SCHILY.xattr."+attr] = string(value[:n])
	}
	return records, nil
}
