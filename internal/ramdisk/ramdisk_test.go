package ramdisk

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/sealed"
	"cloister.dev/cloister/workload"
)

// disk writes an archive of a folder and a file.
func disk(t testing.TB, folder, file, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b)
	err := errors.Join(w.Folder(folder, 0o755), w.File(file, 0o644, strings.NewReader(content), int64(len(content))), w.Close())
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestWriter(t *testing.T) {
	b := disk(t, "a", "a/b", "content")
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(b)))
	if err != nil {
		t.Fatal(err)
	}
	if len(records) != 2 || records[0].Name != "a" || records[0].Mode != 0o40755 || records[1].Name != "a/b" || records[1].Mode != 0o100644 || records[1].FileSize != 7 {
		t.Fatalf("records are %v", records)
	}
	for _, r := range records {
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 || r.Ino != 0 {
			t.Errorf("%s has time %d, owner %d:%d, inode %d, want zeros", r.Name, r.MTime, r.UID, r.GID, r.Ino)
		}
	}
	if err := NewWriter(io.Discard).File("big", 0o644, strings.NewReader(""), 4<<30); err == nil || !strings.Contains(err.Error(), "less than 4 GiB") {
		t.Errorf("a file of 4 GiB: %v", err)
	}
	if err := NewWriter(io.Discard).File("short", 0o644, strings.NewReader("ab"), 3); err == nil {
		t.Error("a file with less content than its size was written")
	}
}

// record is an entry of an archive, as nobody of ours writes it.
func record(name string, mode, links int, content string) []byte {
	b := fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", 7, mode, 0, 0, links, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	pad := func() { b = append(b, make([]byte, -len(b)&3)...) }
	pad()
	b = append(b, content...)
	pad()
	return b
}

func TestManifest(t *testing.T) {
	good := disk(t, sealed.Dir, sealed.Manifest, `{"a":1}`)
	// The size of the second entry's content, the 7th of its fields.
	large := bytes.Clone(good)
	at := bytes.LastIndex(large[:bytes.Index(large, []byte(sealed.Manifest))], []byte(magic)) + len(magic) + 6*8
	copy(large[at:], hex.EncodeToString([]byte{0xff, 0xff, 0xff, 0xff}))
	with := func(records ...[]byte) []byte {
		return slices.Concat(record(sealed.Dir, unix.S_IFDIR, 0, ""), record(sealed.Manifest, unix.S_IFREG, 0, `{"a":1}`),
			slices.Concat(records...), record(cpio.Trailer, 0, 0, ""))
	}
	layer := sealed.Image + "/blobs/sha256/" + strings.Repeat("0a", 32)
	image := [][]byte{
		record(sealed.Image, unix.S_IFDIR, 0, ""), record(sealed.Image+"/oci-layout", unix.S_IFREG, 1, "{}"), record(sealed.Image+"/index.json", unix.S_IFREG, 0, "{}"),
		record(sealed.Image+"/blobs", unix.S_IFDIR, 0, ""), record(sealed.Image+"/blobs/sha256", unix.S_IFDIR, 2, ""), record(layer, unix.S_IFREG, 0, "layer"),
	}
	for name, test := range map[string]struct {
		disks [][]byte
		want  string // the manifest
		fails string
	}{
		"sealed":           {[][]byte{{}, good}, `{"a":1}`, ""},
		"base":             {[][]byte{good}, "", "not sealed"},
		"another ramdisk":  {[][]byte{{}, disk(t, "etc", "etc/passwd", "x")}, "", "not sealed"},
		"gzipped ramdisk":  {[][]byte{{}, []byte("\x1f\x8b" + strings.Repeat("x", 200))}, "", "not sealed"},
		"something else":   {[][]byte{{}, disk(t, sealed.Dir, sealed.Dir+"/other", "x")}, "", "does not begin with the workload manifest"},
		"truncated":        {[][]byte{{}, good[:len(good)-128]}, "", "read its workload manifest"},
		"says it is 4 GiB": {[][]byte{{}, large}, "", "4294967295 bytes"},

		"with an image":      {[][]byte{{}, with(image...)}, `{"a":1}`, ""},
		"another init":       {[][]byte{{}, with(append(image, record("init", unix.S_IFREG, 0, "evil"))...)}, "", `second ramdisk has "init"`},
		"a module":           {[][]byte{{}, with(record("modules/99-evil.ko", unix.S_IFREG, 0, "evil"))}, "", "99-evil.ko"},
		"a path back":        {[][]byte{{}, with(record(sealed.Image+"/../../init", unix.S_IFREG, 0, "evil"))}, "", "/../../init"},
		"a second manifest":  {[][]byte{{}, with(record(sealed.Manifest, unix.S_IFREG, 0, `{"a":2}`))}, "", `has "cloister/manifest.json"`},
		"a blob twice":       {[][]byte{{}, with(append(image, image[5])...)}, "", layer},
		"a symbolic link":    {[][]byte{{}, with(record(sealed.Image, unix.S_IFLNK, 0, "/"))}, "", `has "cloister/image"`},
		"a hard link":        {[][]byte{{}, with(record(sealed.Image+"/oci-layout", unix.S_IFREG, 2, `{"a":2}`))}, "", "oci-layout"},
		"a folder as a blob": {[][]byte{{}, with(record(layer, unix.S_IFDIR, 0, ""))}, "", layer},
		"a full folder":      {[][]byte{{}, with(record(sealed.Image, unix.S_IFDIR, 0, "x"))}, "", `has "cloister/image"`},
		"a full trailer":     {[][]byte{{}, with(record(cpio.Trailer, 0, 0, "x"))}, "", cpio.Trailer},
		"another archive":    {[][]byte{{}, slices.Concat(good, disk(t, "etc", "init", "evil"))}, "", "goes on behind its end"},
		"a third ramdisk":    {[][]byte{{}, good, disk(t, "etc", "init", "evil")}, "", "it has 3 ramdisks"},
		"without a trailer":  {[][]byte{{}, good[:len(good)-124]}, "", "read its second ramdisk: unexpected EOF"},
		"a layer is cut off": {[][]byte{{}, with(image...)[:len(with(image...))-132]}, "", "read its second ramdisk: unexpected EOF"},
		"an unended name":    {[][]byte{{}, bytes.Replace(with(image...), []byte("index.json\x00"), []byte("index.jsonx"), 1)}, "", "unexpected name"},
	} {
		t.Run(name, func(t *testing.T) {
			var disks []eif.Data
			for _, d := range test.disks {
				disks = append(disks, bytes.NewReader(d))
			}
			var file seekBuffer
			if _, err := eif.Write(&file, eif.Image{Arch: eif.X86_64, Kernel: strings.NewReader("kernel"), Cmdline: "quiet", Ramdisks: disks}); err != nil {
				t.Fatal(err)
			}
			image, err := eif.NewReader(bytes.NewReader(file.b), int64(len(file.b)))
			if err != nil {
				t.Fatal(err)
			}
			got, err := Manifest(image)
			if test.fails != "" {
				if err == nil || !strings.Contains(err.Error(), test.fails) {
					t.Fatalf("got %q, %v, want the error %q", got, err, test.fails)
				}
				if not := errors.Is(err, ErrNotSealed); not != (test.fails == "not sealed") {
					t.Errorf("%v is ErrNotSealed: %t", err, not)
				}
				return
			}
			if err != nil || string(got) != test.want {
				t.Errorf("got %q, %v, want %q", got, err, test.want)
			}
		})
	}
}

// An EIF that is measured or pulled may be anybody's.
func FuzzManifest(f *testing.F) {
	f.Add(disk(f, sealed.Dir, sealed.Manifest, `{}`))
	f.Add(disk(f, sealed.Dir, "other", `{}`))
	f.Add(slices.Concat(disk(f, sealed.Dir, sealed.Manifest, `{}`), disk(f, "etc", "init", "x")))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := readManifest(bytes.NewReader(b))
		if err == nil && (len(m) > workload.MaxManifestSize || !bytes.Contains(b, m)) {
			t.Errorf("%d bytes are the manifest of %d", len(m), len(b))
		}
	})
}

// seekBuffer is a file in memory.
type seekBuffer struct {
	b   []byte
	pos int64
}

func (s *seekBuffer) Write(b []byte) (int, error) {
	if end := s.pos + int64(len(b)); end > int64(len(s.b)) {
		s.b = append(s.b, make([]byte, end-int64(len(s.b)))...)
	}
	copy(s.b[s.pos:], b)
	s.pos += int64(len(b))
	return len(b), nil
}

func (s *seekBuffer) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekCurrent {
		offset += s.pos
	}
	s.pos = offset
	return offset, nil
}
