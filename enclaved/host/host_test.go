package host

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

func manifest() *workload.Manifest {
	return &workload.Manifest{
		Env:     []workload.EnvVar{{Name: "A", Host: true}, {Name: "B", Value: "b"}, {Name: "UNSET", Host: true}},
		EnvFrom: true,
		HostEnv: []string{"PATH"},
		Mounts: []workload.Mount{
			{Path: "/etc/app", Kind: workload.MountHost},
			{Path: "/etc/app/nested", Kind: workload.MountTmpfs},
			{Path: "/srv/key", Kind: workload.MountHost, SubPath: "key"},
			{Path: "/tmp", Kind: workload.MountTmpfs},
		},
		Secrets: []workload.Secret{{Name: "s", File: "/etc/app/secret"}},
	}
}

func file(name, data string) *channel.HostFile {
	return &channel.HostFile{Path: name, Data: []byte(data), Mode: 0o644, Gid: uint32(os.Getgid())}
}

func values() *channel.HostValues {
	return &channel.HostValues{
		Env:     []*channel.Variable{{Name: "A", Value: []byte("1")}},
		EnvFrom: []*channel.Variable{{Name: "B", Value: []byte("\xff")}, {Name: "PATH", Value: []byte("/x")}},
		Mounts: []*channel.HostMount{
			{Path: "/etc/app", Files: []*channel.HostFile{file("a", "1"), file("dir/b", "2")}},
			{Path: "/srv/key", Files: []*channel.HostFile{file("", "key")}},
		},
	}
}

func TestCheck(t *testing.T) {
	got, err := Check(manifest(), values())
	if err != nil {
		t.Fatal(err)
	}
	want := Env{Listed: map[string]string{"A": "1"}, From: map[string]string{"B": "\xff", "PATH": "/x"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	variable := func(name, value string) *channel.Variable {
		return &channel.Variable{Name: name, Value: []byte(value)}
	}
	for name, tc := range map[string]struct {
		change func(*workload.Manifest, *channel.HostValues)
		want   string
	}{
		"not listed":         {func(_ *workload.Manifest, v *channel.HostValues) { v.Env = append(v.Env, variable("C", "")) }, `env "C" is supplied by the host and not listed`},
		"literal":            {func(_ *workload.Manifest, v *channel.HostValues) { v.Env[0].Name = "B" }, `env "B" is supplied by the host and not listed`},
		"twice":              {func(_ *workload.Manifest, v *channel.HostValues) { v.Env = append(v.Env, v.Env[0]) }, `env "A" is supplied twice`},
		"envFrom not listed": {func(m *workload.Manifest, _ *channel.HostValues) { m.EnvFrom = false }, "the workload manifest has no envFrom"},
		"envFrom refused":    {func(_ *workload.Manifest, v *channel.HostValues) { v.EnvFrom[0].Name = "LD_PRELOAD" }, "envFrom: env LD_PRELOAD cannot be supplied by the host"},
		"envFrom lower case": {func(_ *workload.Manifest, v *channel.HostValues) { v.EnvFrom[0].Name = "https_proxy" }, "env https_proxy cannot be supplied"},
		"envFrom no name":    {func(_ *workload.Manifest, v *channel.HostValues) { v.EnvFrom[0].Name = "" }, "must not be empty"},
		"envFrom two in one": {func(_ *workload.Manifest, v *channel.HostValues) { v.EnvFrom[0].Name = "X=1" }, "must not be empty or contain ="},
		"NUL":                {func(_ *workload.Manifest, v *channel.HostValues) { v.Env[0].Value = []byte("secret\x00") }, "NUL byte"},
		"too long for kernels": {func(_ *workload.Manifest, v *channel.HostValues) {
			v.Env[0].Value = bytes.Repeat([]byte("x"), maxVariable)
		}, "makes a variable of 131075 bytes"},
		"mount not listed":     {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Path = "/etc" }, `a mount at "/etc" is supplied by the host and not listed`},
		"mount of memory":      {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Path = "/tmp" }, `a mount at "/tmp" is supplied by the host and not listed`},
		"mount missing":        {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts = v.Mounts[1:] }, "the host supplies nothing for the mount at /etc/app"},
		"mount twice":          {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts = append(v.Mounts, v.Mounts[0]) }, "the mount at /etc/app is supplied twice"},
		"file for a directory": {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files = v.Mounts[1].Files }, "only a mount with subPath can be"},
		"file twice":           {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files[1].Path = "a" }, `file "a" is supplied twice`},
		"file and directory":   {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files[1].Path = "a/b/c" }, `"a" is both a file and a directory`},
		"traversal":            {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files[0].Path = "dir/../../x" }, "without . and .."},
		"absolute":             {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files[0].Path = "/etc/passwd" }, "it must be a relative path"},
		"name of the layout":   {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files[0].Path = "..data/x" }, "kept for updates"},
		"setuid":               {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files[0].Mode = 0o4755 }, "mode 04755 has more than permissions"},
		"group":                {func(_ *workload.Manifest, v *channel.HostValues) { v.Mounts[0].Files[0].Gid = 1 << 31 }, "group 2147483648 is out of range"},
		"too many files": {func(_ *workload.Manifest, v *channel.HostValues) {
			for i := range workload.MaxHostFiles {
				v.Mounts[0].Files = append(v.Mounts[0].Files, file(fmt.Sprint("n", i), ""))
			}
		}, "at most 4096 are accepted"},
		"too much": {func(_ *workload.Manifest, v *channel.HostValues) {
			v.Mounts[0].Files[0].Data = make([]byte, workload.MaxHostValues)
		}, "at most 8388608 are accepted"},
	} {
		t.Run(name, func(t *testing.T) {
			m, v := manifest(), values()
			tc.change(m, v)
			env, err := Check(m, v)
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "secret\x00") {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if env.Listed != nil {
				t.Error("there are variables all the same")
			}
		})
	}
}

// tree is everything below dir: contents of files and targets of links.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	data, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil {
		t.Fatal(err)
	}
	err = filepath.Walk(dir, func(p string, i os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		name = strings.Replace(name, data, "..1", 1)
		switch {
		case i.Mode()&os.ModeSymlink != 0:
			target, _ := os.Readlink(p)
			out[name] = "-> " + strings.Replace(target, data, "..1", 1)
		case i.Mode().IsRegular():
			b, err := os.ReadFile(p)
			out[name] = fmt.Sprintf("%o %s", i.Mode().Perm(), b)
			return err
		default:
			out[name] = "/"
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFiles(t *testing.T) {
	m := manifest()
	f, err := Write(m, values(), filepath.Join(t.TempDir(), "host"))
	if err != nil {
		t.Fatal(err)
	}
	app := f.Source("/etc/app")
	want := map[string]string{
		".": "/", "..data": "-> ..1", "..1": "/", "..1/a": "644 1", "..1/dir": "/", "..1/dir/b": "644 2", "a": "-> ..data/a", "dir": "-> ..data/dir",
		"nested": "/", "secret": "600 ",
	}
	if diff := cmp.Diff(want, tree(t, app)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if b, err := os.ReadFile(f.Source("/srv/key")); err != nil || string(b) != "key" {
		t.Errorf("key: %q, %v", b, err)
	}

	mode := file("c", "3")
	mode.Mode = 0o400
	if err := f.Update(&channel.HostMount{Path: "/etc/app", Files: []*channel.HostFile{file("a", "new"), mode}}); err != nil {
		t.Fatal(err)
	}
	want = map[string]string{
		".": "/", "..data": "-> ..1", "..1": "/", "..1/a": "644 new", "..1/c": "400 3", "a": "-> ..data/a", "c": "-> ..data/c",
		"nested": "/", "secret": "600 ",
	}
	if diff := cmp.Diff(want, tree(t, app)); diff != "" {
		t.Errorf("files after an update (-want +got):\n%s", diff)
	}

	for name, tc := range map[string]struct {
		mount *channel.HostMount
		want  string
	}{
		"subPath":          {&channel.HostMount{Path: "/srv/key", Files: []*channel.HostFile{file("", "new")}}, "never changes"},
		"not listed":       {&channel.HostMount{Path: "/etc"}, "not listed"},
		"traversal":        {&channel.HostMount{Path: "/etc/app", Files: []*channel.HostFile{file("../x", "")}}, "without . and .."},
		"where a mount is": {&channel.HostMount{Path: "/etc/app", Files: []*channel.HostFile{file("nested", "")}}, "has another mount"},
		"too much": {&channel.HostMount{Path: "/etc/app", Files: []*channel.HostFile{{Path: "a", Data: make([]byte, workload.MaxHostValues-10)}}},
			"at most 8388608 are accepted"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := f.Update(tc.mount); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if diff := cmp.Diff(want, tree(t, app)); diff != "" {
				t.Errorf("files after a refused update (-want +got):\n%s", diff)
			}
		})
	}
	if err := f.Update(&channel.HostMount{Path: "/etc/app"}); err != nil {
		t.Fatal(err)
	}
	want = map[string]string{".": "/", "..data": "-> ..1", "..1": "/", "nested": "/", "secret": "600 "}
	if diff := cmp.Diff(want, tree(t, app)); diff != "" {
		t.Errorf("files after all were taken away (-want +got):\n%s", diff)
	}
}

// FuzzValues: whatever the host sends, what is accepted names only what the manifest lists, and its files
// stay below their mounts.
func FuzzValues(f *testing.F) {
	seed := func(v *channel.HostValues) {
		b, err := proto.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	seed(values())
	v := values()
	v.Mounts[0].Files = append(v.Mounts[0].Files, file("nested/x", ""), file("a/b", ""), file("..", ""))
	seed(v)
	f.Fuzz(func(t *testing.T, b []byte) {
		var v channel.HostValues
		if proto.Unmarshal(b, &v) != nil {
			t.Skip()
		}
		for _, h := range v.GetMounts() { // chown needs root for others
			for _, f := range h.GetFiles() {
				if f.GetGid() <= 1<<31-1 {
					f.Gid = uint32(os.Getgid())
				}
			}
		}
		m := manifest()
		env, err := Check(m, &v)
		if err != nil {
			return
		}
		for name := range env.Listed {
			if name != "A" && name != "UNSET" {
				t.Errorf("env %q", name)
			}
		}
		for name := range env.From {
			if workload.RefusedEnv(name) && name != "PATH" || strings.ContainsAny(name, "=\x00") {
				t.Errorf("envFrom %q", name)
			}
		}
		top := t.TempDir()
		files, err := Write(m, &v, filepath.Join(top, "host"))
		if err != nil {
			return // a file lies where another mount is, or the file system has limits of its own
		}
		for _, h := range v.GetMounts() {
			source := files.Source(h.GetPath())
			for _, f := range h.GetFiles() {
				if got, err := os.ReadFile(filepath.Join(source, f.GetPath())); os.Getuid() == 0 && (err != nil || !bytes.Equal(got, f.GetData())) {
					t.Errorf("file %q: %q, %v", f.GetPath(), got, err)
				}
			}
		}
		if list, err := os.ReadDir(top); err != nil || len(list) != 1 {
			t.Errorf("beside the files lies %v, %v", list, err)
		}
		if list, err := os.ReadDir(filepath.Join(top, "host")); err != nil || len(list) != 2 {
			t.Errorf("beside the mounts lies %v, %v", list, err)
		}
	})
}
