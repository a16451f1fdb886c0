package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/oci"
)

const plenty = 64 << 20

var then = time.Date(2024, 2, 29, 12, 30, 15, 500_000_000, time.UTC)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: layers have owners")
	}
}

// member is one entry of an archive; a file unless said otherwise.
type member struct {
	tar.Header
	body string
}

func file(name, body string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, body}
}

func dir(name string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""}
}

func symlink(name, target string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}, ""}
}

func hardLink(name, target string) member {
	return member{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: 0o644}, ""}
}

func archive(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := m.Header
		h.Size = int64(len(m.body))
		h.Format = tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = then
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func asIs(r io.Reader) io.Reader { return r }

// unpack unpacks layers into a new directory next to an outside directory with a file in it.
func unpack(t testing.TB, limit int64, layers ...[]byte) (root string, err error) {
	t.Helper()
	root, _, err = unpackCounted(t, limit, layers...)
	return root, err
}

// unpackCounted also returns what the layers have taken of the limit.
func unpackCounted(t testing.TB, limit int64, layers ...[]byte) (root string, used int64, err error) {
	t.Helper()
	needRoot(t)
	top := t.TempDir()
	root = filepath.Join(top, "root")
	for _, d := range []string{root, filepath.Join(top, "outside")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(top, "outside", "secret"), []byte("outside"), 0o600); err != nil {
		t.Fatal(err)
	}
	u, err := NewUnpacker(root, limit)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for _, l := range layers {
		if err := u.layer(bytes.NewReader(l), oci.Uncompressed, asIs); err != nil {
			return root, u.Used(), err
		}
	}
	return root, u.Used(), nil
}

// list describes a tree, one line an entry: type, mode, owner, name and content.
func list(t testing.TB, root string) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		name, _ := filepath.Rel(root, p)
		line := fmt.Sprintf("%o %d:%d %s", st.Mode, st.Uid, st.Gid, name)
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + target
		case d.Type().IsRegular():
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += " = " + string(b)
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestLayers(t *testing.T) {
	setuid := file("usr/bin/su", "su")
	setuid.Mode, setuid.Uid, setuid.Gid = 0o4755, 12, 34
	sticky := dir("tmp/")
	sticky.Mode = 0o1777
	setgid := dir("var/mail")
	setgid.Mode, setgid.Gid = 0o2775, 8
	fifo := member{tar.Header{Name: "run/pipe", Typeflag: tar.TypeFifo, Mode: 0o620, Uid: 5}, ""}
	owned := symlink("var/run", "/run")
	owned.Uid, owned.Gid = 7, 8
	readOnly := dir("ro")
	readOnly.Mode = 0o555

	tests := map[string]struct {
		layers [][]member
		want   []string
	}{
		"modes and owners": {
			[][]member{{setuid, sticky, setgid, fifo, owned, readOnly, file("ro/f", "1")}},
			[]string{
				"40555 0:0 ro", "100644 0:0 ro/f = 1",
				"40755 0:0 run", "10620 5:0 run/pipe", "41777 0:0 tmp",
				"40755 0:0 usr", "40755 0:0 usr/bin", "104755 12:34 usr/bin/su = su",
				"40755 0:0 var", "42775 0:8 var/mail", "120777 7:8 var/run -> /run",
			},
		},
		"names as tools write them": {
			[][]member{{dir("./"), dir("./a/"), file("./a/f", "1"), file("/b", "2"), file("a//./g", "3")}},
			[]string{"40755 0:0 a", "100644 0:0 a/f = 1", "100644 0:0 a/g = 3", "100644 0:0 b = 2"},
		},
		"later layers win": {
			[][]member{{file("f", "old"), dir("d"), file("d/x", "1"), file("g", "1")}, {file("f", "new"), file("d", "file"), dir("g")}},
			[]string{"100644 0:0 d = file", "100644 0:0 f = new", "40755 0:0 g"},
		},
		"a later directory keeps the content": {
			[][]member{{dir("d"), file("d/x", "1")}, {{tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o700, Uid: 9}, ""}}},
			[]string{"40700 9:0 d", "100644 0:0 d/x = 1"},
		},
		"hard links": {
			[][]member{{file("a", "1"), hardLink("b", "a"), hardLink("c", "/a")}, {hardLink("d", "./a"), hardLink("a", "b")}},
			[]string{"100644 0:0 a = 1", "100644 0:0 b = 1", "100644 0:0 c = 1", "100644 0:0 d = 1"},
		},
		"a hard link to a symbolic link is that link": {
			[][]member{{symlink("s", "/outside/secret"), hardLink("h", "s")}},
			[]string{"120777 0:0 h -> /outside/secret", "120777 0:0 s -> /outside/secret"},
		},
		"through an absolute link inside": {
			[][]member{{dir("run"), symlink("var/run", "/run")}, {file("var/run/pid", "1")}},
			[]string{"40755 0:0 run", "100644 0:0 run/pid = 1", "40755 0:0 var", "120777 0:0 var/run -> /run"},
		},
		"a link that climbs stays inside": {
			[][]member{{dir("outside"), symlink("s", "../../../../outside"), file("s/f", "1")}},
			[]string{"40755 0:0 outside", "100644 0:0 outside/f = 1", "120777 0:0 s -> ../../../../outside"},
		},
		"a file replaces a link, not its target": {
			[][]member{{file("target", "1"), symlink("s", "target")}, {file("s", "2")}},
			[]string{"100644 0:0 s = 2", "100644 0:0 target = 1"},
		},
		"whiteout": {
			[][]member{{file("f", "1"), dir("d"), file("d/x", "1"), file("keep", "1")}, {file(".wh.f", ""), file(".wh.d", ""), file(".wh.none", "")}},
			[]string{"100644 0:0 keep = 1"},
		},
		"whiteout of a link leaves its target": {
			[][]member{{dir("d"), file("d/x", "1"), symlink("s", "d")}, {file(".wh.s", "")}},
			[]string{"40755 0:0 d", "100644 0:0 d/x = 1"},
		},
		"whiteout before and after the same name": {
			[][]member{{file("a", "old"), file("b", "old")}, {file(".wh.a", ""), file("a", "new"), file("b", "new"), file(".wh.b", "")}},
			[]string{"100644 0:0 a = new", "100644 0:0 b = new"},
		},
		"whiteout after what is below it": {
			[][]member{{dir("d"), file("d/old", "1")}, {file("d/sub/new", "2"), file(".wh.d", "")}},
			[]string{"40755 0:0 d", "40755 0:0 d/sub", "100644 0:0 d/sub/new = 2"},
		},
		"opaque whiteout, first": {
			[][]member{{file("d/old", "1"), file("d/sub/old", "1")}, {dir("d"), file("d/.wh..wh..opq", ""), file("d/sub/new", "2")}},
			[]string{"40755 0:0 d", "40755 0:0 d/sub", "100644 0:0 d/sub/new = 2"},
		},
		"opaque whiteout, last": {
			[][]member{{file("d/old", "1"), file("d/sub/old", "1")}, {dir("d"), file("d/sub/new", "2"), file("d/.wh..wh..opq", "")}},
			[]string{"40755 0:0 d", "40755 0:0 d/sub", "100644 0:0 d/sub/new = 2"},
		},
		"opaque whiteout through a link": {
			[][]member{{dir("d"), file("d/old", "1"), symlink("s", "d")}, {file("s/new", "2"), file("d/.wh..wh..opq", "")}},
			[]string{"40755 0:0 d", "100644 0:0 d/new = 2", "120777 0:0 s -> d"},
		},
		"AUFS leftovers": {
			[][]member{{dir(".wh..wh.plnk"), file(".wh..wh.aufs", "")}},
			nil,
		},
		"a replaced directory is found again": {
			[][]member{{dir("d"), file("d/a", "1"), symlink("d", "e"), dir("e"), file("d/b", "2")}},
			[]string{"120777 0:0 d -> e", "40755 0:0 e", "100644 0:0 e/b = 2"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range test.layers {
				layers = append(layers, archive(t, l...))
			}
			root, err := unpack(t, plenty, layers...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, list(t, root)); diff != "" {
				t.Errorf("tree (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHostileArchives(t *testing.T) {
	device := func(typeflag byte) member {
		return member{tar.Header{Name: "dev/x", Typeflag: typeflag, Devmajor: 1, Devminor: 3, Mode: 0o666}, ""}
	}
	tests := map[string]struct {
		members []member
		want    string // part of the error
	}{
		"climbing name":                   {[]member{file("../outside/new", "1")}, `".."`},
		"climbing name, hidden":           {[]member{file("a/../../outside/new", "1")}, `".."`},
		"climbing directory":              {[]member{dir("../outside/new")}, `".."`},
		"climbing whiteout":               {[]member{file("../outside/.wh.secret", "")}, `".."`},
		"whiteout of the parent":          {[]member{file("a/.wh...", "")}, "whiteout names nothing"},
		"whiteout of itself":              {[]member{file("a/.wh..", "")}, "whiteout names nothing"},
		"whiteout of nothing":             {[]member{file("a/.wh.", "")}, "whiteout names nothing"},
		"file through an absolute link":   {[]member{symlink("s", "/OUTSIDE"), file("s/new", "1")}, "make directory"},
		"file through a relative link":    {[]member{symlink("s", "../outside"), file("s/new", "1")}, "make directory"},
		"file through two links":          {[]member{symlink("a", "b"), symlink("b", "../outside"), file("a/new", "1")}, "make directory"},
		"directory through a link":        {[]member{symlink("s", "../outside"), dir("s/new")}, "make directory"},
		"link through a link":             {[]member{symlink("s", "../outside"), symlink("s/new", "x")}, "make directory"},
		"loop of links":                   {[]member{symlink("a", "b"), symlink("b", "a"), file("a/new", "1")}, "too many levels"},
		"name below a file":               {[]member{file("f", "1"), file("f/new", "1")}, "not a directory"},
		"hard link outside, climbing":     {[]member{hardLink("h", "../outside/secret")}, `".."`},
		"hard link outside, absolute":     {[]member{hardLink("h", "/OUTSIDE/secret")}, "no such file"},
		"hard link outside, through link": {[]member{symlink("s", "/OUTSIDE"), hardLink("h", "s/secret")}, "no such file"},
		"hard link to the root":           {[]member{hardLink("h", "/")}, "hard link to the root"},
		"hard link to a directory":        {[]member{dir("d"), hardLink("h", "d")}, "operation not permitted"},
		"character device":                {[]member{device(tar.TypeChar)}, "device"},
		"block device":                    {[]member{device(tar.TypeBlock)}, "device"},
		"root that is a file":             {[]member{file(".", "1")}, "root of the image"},
		"root that is a link":             {[]member{symlink(".", "/OUTSIDE")}, "root of the image"},
		"unknown type":                    {[]member{{tar.Header{Name: "x", Typeflag: 'Z'}, ""}}, "not supported"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			needRoot(t)
			outside := t.TempDir()
			if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("outside"), 0o600); err != nil {
				t.Fatal(err)
			}
			for i := range test.members {
				m := &test.members[i]
				m.Linkname = strings.Replace(m.Linkname, "/OUTSIDE", outside, 1)
			}
			root, err := unpack(t, plenty, archive(t, test.members...))
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
			for _, d := range []string{outside, filepath.Join(root, "..", "outside")} {
				if diff := cmp.Diff([]string{"100600 0:0 secret = outside"}, list(t, d)); diff != "" {
					t.Errorf("outside (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestTimesAndCapabilities(t *testing.T) {
	early := then.Add(-1000 * time.Hour)
	d := dir("d")
	d.ModTime = early
	link := symlink("d/s", "f")
	link.ModTime = early
	// cap_net_raw+ep as version 2 of struct vfs_ns_cap_data (include/uapi/linux/capability.h).
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	ping := file("d/ping", "1")
	ping.Mode, ping.Uid = 0o755, 3
	ping.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.other": "x"}
	root, err := unpack(t, plenty, archive(t, d, file("d/f", "1"), link, ping))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]time.Time{"d": early, "d/s": early, "d/f": then, "d/ping": then} {
		i, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if !i.ModTime().Equal(want) {
			t.Errorf("%s has the time %v, want %v", name, i.ModTime(), want)
		}
	}
	b := make([]byte, 64)
	n, err := unix.Lgetxattr(filepath.Join(root, "d/ping"), capabilityXattr, b)
	if err != nil || string(b[:n]) != capability {
		t.Errorf("security.capability is %x, %v, want %x", b[:max(n, 0)], err, capability)
	}
}

func TestCompression(t *testing.T) {
	plain := archive(t, file("f", strings.Repeat("compress me ", 1000)))
	var zipped bytes.Buffer
	g := gzip.NewWriter(&zipped)
	g.Write(plain)
	g.Close()
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		compression oci.Compression
		layer       []byte
		fails       bool
	}{
		"plain":          {oci.Uncompressed, plain, false},
		"gzip":           {oci.Gzip, zipped.Bytes(), false},
		"zstd":           {oci.Zstd, e.EncodeAll(plain, nil), false},
		"not gzip":       {oci.Gzip, plain, true},
		"not zstd":       {oci.Zstd, plain, true},
		"truncated gzip": {oci.Gzip, zipped.Bytes()[:zipped.Len()/2], true},
		"truncated tar":  {oci.Uncompressed, plain[:4096], true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			needRoot(t)
			u, err := NewUnpacker(t.TempDir(), plenty)
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			if err := u.layer(bytes.NewReader(test.layer), test.compression, asIs); (err != nil) != test.fails {
				t.Errorf("got %v, want failure %v", err, test.fails)
			}
		})
	}
}

func TestSpace(t *testing.T) {
	big := archive(t, file("a", strings.Repeat("x", 10_000)), file("b", strings.Repeat("x", 10_000)))
	_, err := unpack(t, 20_000, big)
	if got, ok := errors.AsType[*SpaceError](err); !ok || got.Limit != 20_000 || got.Need != 2*(12_288+inodeSize) {
		t.Errorf("got %v, want a SpaceError with both numbers", err)
	}
	if err != nil && !(strings.Contains(err.Error(), "20000") && strings.Contains(err.Error(), "26624")) {
		t.Errorf("%q does not say both numbers", err)
	}

	// What a layer replaces or removes does not count.
	replaced := archive(t, file("a", strings.Repeat("y", 10_000)), file(".wh.b", ""))
	if _, err := unpack(t, 30_000, big, replaced, big); err != nil {
		t.Errorf("an image that fits: %v", err)
	}
}

func FuzzUnpack(f *testing.F) {
	needRoot(f)
	f.Add(archive(f, dir("d"), file("d/f", "1"), symlink("s", "d"), hardLink("h", "d/f"), file("d/.wh..wh..opq", "")))
	f.Add(archive(f, symlink("s", "../outside"), file("s/new", "1")))
	f.Add(archive(f, file("../outside/new", "1"), file("/x/../../y", "1"), hardLink("h", "../outside/secret")))
	f.Add(archive(f, symlink("a", "/tmp"), symlink("a/b", "x"), file(".wh.a", ""), dir("a"), file("a/.wh.b", "")))
	f.Fuzz(func(t *testing.T, b []byte) { checkUnpack(t, b) })
}

// FuzzLayers makes layers of its input, so that all of it comes behind the headers' checksums: three bytes an
// entry, its type, its name and what it links to.
func FuzzLayers(f *testing.F) {
	needRoot(f)
	f.Add([]byte{1, 0x10, 0, 2, 0x20, 0x01, 1, 0x23, 0, 5, 0, 0, 1, 0x50, 0})
	f.Add([]byte{0, 0x10, 0, 1, 0x12, 0, 3, 0x30, 0x12, 5, 0, 0, 1, 0x61, 0, 3, 0x12, 0x30})
	f.Add([]byte{2, 0x10, 0x87, 1, 0x17, 0, 3, 0x20, 0x17, 0, 0x17, 0, 1, 0x71, 0})
	segments := []string{"", "a", "b", "c", ".wh.a", ".wh.b", ".wh..wh..opq", "outside", "..", ".", ".wh.", ".wh...", "secret", "a/b", "../..", "ä b"}
	name := func(b byte) string { return strings.TrimSuffix(segments[b>>4]+"/"+segments[b&15], "/") }
	f.Fuzz(func(t *testing.T, program []byte) {
		if len(program) > 3*200 {
			return
		}
		layers := [][]member{nil}
		for ; len(program) >= 3; program = program[3:] {
			kind, n, link := program[0], name(program[1]), name(program[2])
			m := file(n, strings.Repeat("x", int(kind>>3)*300))
			switch kind & 7 {
			case 0:
				m = dir(n)
			case 2:
				m = symlink(n, link)
			case 3:
				m = hardLink(n, link)
			case 4:
				m = member{tar.Header{Name: n, Typeflag: tar.TypeFifo}, ""}
			case 5:
				layers = append(layers, nil)
				continue
			case 6:
				m = symlink(n, "../"+link)
			}
			layers[len(layers)-1] = append(layers[len(layers)-1], m)
		}
		var archives [][]byte
		for _, l := range layers {
			archives = append(archives, archive(t, l...))
		}
		checkUnpack(t, archives...)
	})
}

// checkUnpack unpacks layers and checks that nothing happens outside of the root, and that all that is inside
// was counted.
func checkUnpack(t *testing.T, layers ...[]byte) {
	root, used, err := unpackCounted(t, 1<<20, layers...)
	top, _ := filepath.Split(root)
	got := list(t, top)
	outside := 0
	for _, line := range got {
		if name := strings.Fields(line)[2]; name != "root" && !strings.HasPrefix(name, "root/") {
			outside++
		}
	}
	if outside != 2 || len(list(t, filepath.Join(top, "outside"))) != 1 {
		t.Errorf("something was made or removed outside the root (%v):\n%s", err, strings.Join(got, "\n"))
	}
	// Nothing inside is another name of something outside, or a device.
	secret, statErr := os.Stat(filepath.Join(top, "outside", "secret"))
	if statErr != nil {
		t.Fatal(statErr)
	}
	var want int64
	seen := map[uint64]bool{}
	filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		if d.Type()&fs.ModeDevice != 0 {
			t.Errorf("%s is a device", p)
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			t.Fatal(err)
		}
		if i, err := os.Lstat(p); err == nil && os.SameFile(i, secret) {
			t.Errorf("%s is a file from outside", p)
		}
		if p != root {
			want += inodeSize
			if d.Type().IsRegular() && !seen[st.Ino] {
				want += content(st.Size)
			}
			seen[st.Ino] = true
		}
		return nil
	})
	if err == nil && used != want {
		t.Errorf("%d bytes were counted, want %d:\n%s", used, want, strings.Join(got, "\n"))
	}
}

// TestBombs: what is short and would become long is refused before it costs time or memory.
func TestBombs(t *testing.T) {
	needRoot(t)
	const limit = 1 << 20
	zeros := func(n int64, before []byte) []byte {
		var b bytes.Buffer
		w, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		w.Write(before)
		if _, err := io.CopyN(w, zero{}, n); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	header := func(h tar.Header) []byte {
		var b bytes.Buffer
		h.Mode, h.ModTime = 0o644, then
		if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	var again, names []member
	for range 2000 {
		again = append(again, file("a", strings.Repeat("x", 10_000)))
	}
	long := strings.Repeat(strings.Repeat("d", 200)+"/", 15)
	for i := range 300 {
		names = append(names, dir(fmt.Sprint(long, i)))
	}
	owner := file("a", "1")
	owner.Uid = 1 << 32
	noOwner := file("a", "1")
	noOwner.Gid = 1<<32 - 1
	tests := map[string]struct {
		compression oci.Compression
		layer       []byte
		want        string
	}{
		"zeros after the end":        {oci.Zstd, zeros(256<<20, archive(t, file("a", "1"))), "times as long as"},
		"a whiteout with content":    {oci.Zstd, zeros(256<<20, header(tar.Header{Name: ".wh.a", Typeflag: tar.TypeReg, Size: 256 << 20})), "times as long as"},
		"one name again and again":   {oci.Uncompressed, archive(t, again...), "times as long as"},
		"a file beyond the limit":    {oci.Zstd, zeros(256<<20, header(tar.Header{Name: "a", Typeflag: tar.TypeReg, Size: 256 << 20})), "needs at least"},
		"a file of nearly 2^63":      {oci.Uncompressed, header(tar.Header{Name: "a", Typeflag: tar.TypeReg, Size: 1<<63 - 1, Format: tar.FormatGNU}), "out of range"},
		"a sparse file of 1 TiB":     {oci.Uncompressed, sparse(t, 1<<40), "needs at least"},
		"a PAX header of 2 MiB":      {oci.Uncompressed, pax(t, 2<<20), "header field too long"},
		"names longer than contents": {oci.Uncompressed, archive(t, names...), "needs at least"},
		// RFC 8878, section 3.1.1.1: magic number, no flag set, a window of 2^29 bytes.
		"a window of 512 MiB":  {oci.Zstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0, 19 << 3, 1, 0, 0}, "window size exceeded"},
		"an owner beyond 2^32": {oci.Uncompressed, archive(t, owner), "the owner 4294967296:0 is out of range"},
		"an owner that is -1":  {oci.Uncompressed, archive(t, noOwner), "the owner 0:4294967295 is out of range"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			u, err := NewUnpacker(t.TempDir(), limit)
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			err = u.layer(bytes.NewReader(tt.layer), tt.compression, asIs)
			runtime.ReadMemStats(&after)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
			// All that was ever allocated, most of it by the decoder.
			if n := after.TotalAlloc - before.TotalAlloc; n > 32<<20 {
				t.Errorf("it took %d bytes", n)
			}
		})
	}
}

type zero struct{}

func (zero) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// pax is an archive of one extended header with a record of n bytes.
func pax(t *testing.T, n int) []byte {
	t.Helper()
	record := " comment=" + strings.Repeat("x", n) + "\n"
	record = fmt.Sprint(len(record)+len(fmt.Sprint(len(record)+7))) + record
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: int64(len(record))}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, record)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return retype(b.Bytes(), 'x')
}

// sparse is an archive of a PAX sparse file of n bytes, all of them a hole (GNU tar's format 0.1).
func sparse(t *testing.T, n int64) []byte {
	t.Helper()
	var records string
	for _, r := range []string{"GNU.sparse.major=0", "GNU.sparse.minor=1", "GNU.sparse.name=a", fmt.Sprintf("GNU.sparse.size=%d", n), "GNU.sparse.numblocks=1", fmt.Sprintf("GNU.sparse.map=%d,0", n)} {
		records += fmt.Sprintf("%d %s\n", len(r)+4, r)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "x", Typeflag: tar.TypeReg, Size: int64(len(records))}); err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, records)
	if err := w.WriteHeader(&tar.Header{Name: "a", Typeflag: tar.TypeReg, Format: tar.FormatUSTAR}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return retype(b.Bytes(), 'x')
}

// retype changes the type of the first entry, and the checksum with it.
func retype(b []byte, typeflag byte) []byte {
	b[156] = typeflag
	copy(b[148:156], "        ")
	sum := 0
	for _, c := range b[:512] {
		sum += int(c)
	}
	copy(b[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return b
}
