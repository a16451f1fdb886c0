package process

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// entry is one entry of a hand-made archive, which may be as wrong as it likes.
type entry struct {
	name             string
	mode             uint32
	ino, nlink       uint32
	uid, gid         uint32
	data             string
	rmajor, rminor   uint32
	nameSize, dbytes uint32 // instead of the right ones
}

func (e entry) encode(b *bytes.Buffer) {
	nameSize, size := uint32(len(e.name)+1), uint32(len(e.data))
	if e.nameSize != 0 {
		nameSize = e.nameSize
	}
	if e.dbytes != 0 {
		size = e.dbytes
	}
	b.WriteString(newcMagic)
	for _, v := range []uint32{e.ino, e.mode, e.uid, e.gid, max(e.nlink, 1), 0, size, 0, 0, e.rmajor, e.rminor, nameSize, 0} {
		fmt.Fprintf(b, "%08X", v)
	}
	b.WriteString(e.name + "\x00")
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
	b.WriteString(e.data)
	for b.Len()%4 != 0 {
		b.WriteByte(0)
	}
}

func archive(entries ...entry) []byte {
	var b bytes.Buffer
	for _, e := range append(entries, entry{name: trailer}) {
		e.encode(&b)
	}
	return b.Bytes()
}

// me makes entries that also somebody who is not root can unpack.
func me(e entry) entry {
	e.uid, e.gid = uint32(os.Getuid()), uint32(os.Getgid())
	return e
}

// tree describes what lies below dir: path → type, mode, links and content.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		switch {
		case info.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d %s", info.Sys().(*syscall.Stat_t).Nlink, b)
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			text = "-> " + target
		}
		out[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestUnpack(t *testing.T) {
	for name, tc := range map[string]struct {
		entries []entry
		raw     []byte // instead of entries
		want    map[string]string
		err     string
	}{
		"files, folders and links": {
			entries: []entry{
				{name: ".", mode: 0o40755},
				{name: "bin", mode: 0o40755},
				{name: "bin/a", mode: 0o104755, data: "A"},
				{name: "lib/deep/b", mode: 0o100600, data: "BB"},
				{name: "sbin", mode: 0o120777, data: "bin"},
				{name: "sbin/c", mode: 0o100644, data: "through a link that stays inside"},
			},
			want: map[string]string{
				"bin": "drwxr-xr-x", "bin/a": "urwxr-xr-x 1 A", "bin/c": "-rw-r--r-- 1 through a link that stays inside",
				"lib": "drwxr-xr-x", "lib/deep": "drwxr-xr-x", "lib/deep/b": "-rw------- 1 BB", "sbin": "-> bin",
			},
		},
		"absolute names are relative": {
			entries: []entry{{name: "/etc//./x", mode: 0o100644, data: "x"}},
			want:    map[string]string{"etc": "drwxr-xr-x", "etc/x": "-rw-r--r-- 1 x"},
		},
		"later ones replace, folders stay": {
			entries: []entry{
				{name: "d", mode: 0o40700}, {name: "d/x", mode: 0o100644, data: "1"}, {name: "d", mode: 0o40755},
				{name: "d/x", mode: 0o100600, data: "2"},
				{name: "l", mode: 0o120777, data: "d"}, {name: "l", mode: 0o100644, data: "file"},
				{name: "m", mode: 0o120777, data: "d"}, {name: "m", mode: 0o40711},
			},
			want: map[string]string{"d": "drwxr-xr-x", "d/x": "-rw------- 1 2", "l": "-rw-r--r-- 1 file", "m": "drwx--x--x"},
		},
		"hard links, data in the last": {
			entries: []entry{
				{name: "a", mode: 0o100644, ino: 7, nlink: 2}, {name: "b", mode: 0o100644, ino: 7, nlink: 2, data: "both"},
			},
			want: map[string]string{"a": "-rw-r--r-- 2 both", "b": "-rw-r--r-- 2 both"},
		},
		"hard links, data in the first": {
			entries: []entry{
				{name: "a", mode: 0o100644, ino: 7, nlink: 2, data: "both"}, {name: "b", mode: 0o100644, ino: 7, nlink: 2},
			},
			want: map[string]string{"a": "-rw-r--r-- 2 both", "b": "-rw-r--r-- 2 both"},
		},
		"pipe": {
			entries: []entry{{name: "p", mode: 0o10622}},
			want:    map[string]string{"p": "prw--w--w-"},
		},
		"climbs":            {entries: []entry{{name: "../x", mode: 0o100644}}, err: "could climb out"},
		"climbs inside":     {entries: []entry{{name: "a/../../x", mode: 0o100644}}, err: "could climb out"},
		"NUL inside":        {entries: []entry{{name: "a\x00b", mode: 0o100644}}, err: "NUL inside"},
		"link out":          {entries: []entry{{name: "l", mode: 0o120777, data: "../../outside"}, {name: "l/x", mode: 0o100644, data: "x"}}, err: "unpack \"l/x\""},
		"absolute link out": {entries: []entry{{name: "l", mode: 0o120777, data: "/tmp"}, {name: "l/x", mode: 0o100644, data: "x"}}, err: "unpack \"l/x\""},
		"folder over link out": {
			entries: []entry{{name: "l", mode: 0o120777, data: "/tmp"}, {name: "l", mode: 0o40755}, {name: "l/x", mode: 0o100644, data: "x"}},
			want:    map[string]string{"l": "drwxr-xr-x", "l/x": "-rw-r--r-- 1 x"},
		},
		"file over link out": {
			entries: []entry{{name: "l", mode: 0o120777, data: "../outside"}, {name: "l", mode: 0o100644, data: "x"}},
			want:    map[string]string{"l": "-rw-r--r-- 1 x"},
		},
		"hard link to a link out": {
			entries: []entry{
				{name: "a", mode: 0o100644, ino: 7, nlink: 2, data: "x"}, {name: "a", mode: 0o120777, data: "../outside"},
				{name: "b", mode: 0o100644, ino: 7, nlink: 2, data: "y"},
			},
			err: `unpack "b"`,
		},
		"root is a file": {entries: []entry{{name: "/", mode: 0o100644}}, err: "the root must be a folder"},
		"unknown type":   {entries: []entry{{name: "x", mode: 0o644}}, err: "no known type"},
		"empty link":     {entries: []entry{{name: "x", mode: 0o120777}}, err: "symbolic link is empty"},
		"long name":      {entries: []entry{{name: "x", mode: 0o100644, nameSize: 1 << 30}}, err: "1 to 4096"},
		"no name":        {raw: bytes.Replace(archive(), []byte("0000000B00000000TRAILER"), []byte("0000000000000000TRAILER"), 1), err: "1 to 4096"},
		"truncated":      {raw: archive(entry{name: "x", mode: 0o100644, data: "xxxxxxxx"})[:118], err: "unexpected EOF"},
		"no trailer":     {raw: nil, err: "unexpected EOF"},
		"too much data":  {entries: []entry{{name: "x", mode: 0o100644, dbytes: 1 << 31}}, err: "unexpected EOF"},
		"not newc":       {raw: bytes.Replace(archive(), []byte("070701"), []byte("070707"), 1), err: "only newc"},
		"bad hex":        {raw: bytes.Replace(archive(), []byte("0707010"), []byte("070701x"), 1), err: "read header"},
		"data after the end": {
			raw: append(archive(), "more"...), err: "data follows the end",
		},
		"zeros after the end": {raw: append(archive(), make([]byte, 512)...), want: map[string]string{}},
	} {
		t.Run(name, func(t *testing.T) {
			parent := t.TempDir()
			dir := filepath.Join(parent, "root")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			raw := tc.raw
			if tc.entries != nil {
				for i := range tc.entries {
					tc.entries[i] = me(tc.entries[i])
				}
				raw = archive(tc.entries...)
			}
			err := unpackInto(dir, raw)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %v, want an error with %q", err, tc.err)
				}
			} else if err != nil {
				t.Error(err)
			} else if diff := cmp.Diff(tc.want, tree(t, dir)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if all, _ := os.ReadDir(parent); len(all) != 1 {
				t.Errorf("something was written outside of the root: %v", all)
			}
		})
	}
}

func unpackInto(dir string, raw []byte) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return unpack(root, bytes.NewReader(raw))
}

// FuzzUnpack looks for an archive that touches anything outside of its root.
func FuzzUnpack(f *testing.F) {
	f.Add(archive(me(entry{name: "a/b", mode: 0o100644, data: "x"})))
	f.Add(archive(me(entry{name: "l", mode: 0o120777, data: "../victim"}), me(entry{name: "l/x", mode: 0o100644, data: "x"})))
	f.Add(archive(me(entry{name: "a", mode: 0o100644, ino: 1, nlink: 2}), me(entry{name: "b", mode: 0o100644, ino: 1, nlink: 2, data: "x"})))
	f.Fuzz(func(t *testing.T, raw []byte) {
		parent := t.TempDir()
		dir, victim := filepath.Join(parent, "root"), filepath.Join(parent, "victim")
		for _, d := range []string{dir, victim} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		unpackInto(dir, raw)
		os.RemoveAll(dir)
		if diff := cmp.Diff(map[string]string{"victim": "drwxr-xr-x"}, tree(t, parent)); diff != "" {
			t.Fatalf("outside of the root (-want +got):\n%s", diff)
		}
	})
}
