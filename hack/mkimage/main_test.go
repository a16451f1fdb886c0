package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// entry is what a test looks at in a layer.
type entry struct {
	Type    byte
	Mode    int64
	Link    string
	Content string
	Owner   int
}

// fileTree makes a folder with a file of two names, a link and an empty folder.
func fileTree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.MkdirAll(filepath.Join(root, "etc", "empty"), 0o755))
	check(os.WriteFile(filepath.Join(root, "etc", "one"), []byte("same"), 0o600))
	check(os.Link(filepath.Join(root, "etc", "one"), filepath.Join(root, "etc", "two")))
	check(os.Symlink("one", filepath.Join(root, "etc", "link")))
	return root
}

func layerEntries(t *testing.T, layer io.Reader) map[string]entry {
	t.Helper()
	got := map[string]entry{}
	for r := tar.NewReader(layer); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.Unix() != 0 {
			t.Errorf("%s has the time %v", h.Name, h.ModTime)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := got[h.Name]; twice {
			t.Errorf("%s is in the layer twice", h.Name)
		}
		got[h.Name] = entry{h.Typeflag, h.Mode, h.Linkname, string(content), h.Uid}
	}
}

func TestLayer(t *testing.T) {
	root := fileTree(t)
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("ELF"), 0o755); err != nil {
		t.Fatal(err)
	}
	tarFile := filepath.Join(t.TempDir(), "root.tar")
	f, err := os.Create(tarFile)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	for _, h := range []*tar.Header{
		{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755},
		{Typeflag: tar.TypeDir, Name: "./etc/", Mode: 0o700, Uid: 7},
		{Typeflag: tar.TypeReg, Name: "./etc/one", Mode: 0o640, Uid: 33},
		{Typeflag: tar.TypeLink, Name: "./etc/two", Linkname: "./etc/one", Mode: 0o640, Uid: 33},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}

	tests := map[string]struct {
		options options
		want    map[string]entry
	}{
		"folder": {
			options: options{rootfs: root},
			want: map[string]entry{
				"etc/":       {Type: tar.TypeDir, Mode: 0o755},
				"etc/empty/": {Type: tar.TypeDir, Mode: 0o755},
				"etc/link":   {Type: tar.TypeSymlink, Mode: 0o777, Link: "one"},
				"etc/one":    {Type: tar.TypeReg, Mode: 0o600, Content: "same"},
				"etc/two":    {Type: tar.TypeLink, Mode: 0o600, Link: "etc/one"},
			},
		},
		"tar file with owners": {
			options: options{rootfs: tarFile, keepOwner: true},
			want: map[string]entry{
				"etc/":    {Type: tar.TypeDir, Mode: 0o700, Owner: 7},
				"etc/one": {Type: tar.TypeReg, Mode: 0o640, Owner: 33},
				"etc/two": {Type: tar.TypeLink, Mode: 0o640, Link: "etc/one", Owner: 33},
			},
		},
		"files and folders with their parents once": {
			options: options{
				adds: list{program + ":/usr/bin/program", program + ":/usr/lib/data:600"},
				dirs: list{"/tmp:1777", "/usr/share"},
			},
			want: map[string]entry{
				"tmp/":            {Type: tar.TypeDir, Mode: 0o1777},
				"usr/":            {Type: tar.TypeDir, Mode: 0o755},
				"usr/share/":      {Type: tar.TypeDir, Mode: 0o755},
				"usr/bin/":        {Type: tar.TypeDir, Mode: 0o755},
				"usr/bin/program": {Type: tar.TypeReg, Mode: 0o755, Content: "ELF"},
				"usr/lib/":        {Type: tar.TypeDir, Mode: 0o755},
				"usr/lib/data":    {Type: tar.TypeReg, Mode: 0o600, Content: "ELF"},
			},
		},
		"a folder that is added": {
			options: options{adds: list{filepath.Join(root, "etc") + ":/opt/etc"}},
			want: map[string]entry{
				"opt/":           {Type: tar.TypeDir, Mode: 0o755},
				"opt/etc/":       {Type: tar.TypeDir, Mode: 0o755},
				"opt/etc/empty/": {Type: tar.TypeDir, Mode: 0o755},
				"opt/etc/link":   {Type: tar.TypeSymlink, Mode: 0o777, Link: "one"},
				"opt/etc/one":    {Type: tar.TypeReg, Mode: 0o600, Content: "same"},
				"opt/etc/two":    {Type: tar.TypeLink, Mode: 0o600, Link: "opt/etc/one"},
			},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			var layer bytes.Buffer
			if err := writeLayer(&layer, tt.options); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, layerEntries(t, &layer)); diff != "" {
				t.Errorf("layer (-want +got):\n%s", diff)
			}
		})
	}
}

func TestArchiveAndPush(t *testing.T) {
	o := options{
		rootfs: fileTree(t), tags: list{"cloister.dev/x:1"}, workdir: "/", user: "65532:65532",
		entrypoint: `["/x","-v"]`, stopSignal: "SIGQUIT", ports: list{"80"}, envs: list{"A=b"},
	}
	want := v1.Config{
		Entrypoint: []string{"/x", "-v"}, StopSignal: "SIGQUIT", User: "65532:65532", WorkingDir: "/",
		Env: []string{"A=b"}, ExposedPorts: map[string]struct{}{"80/tcp": {}},
	}

	t.Run("archive", func(t *testing.T) {
		var printed [2]bytes.Buffer
		var img v1.Image
		for i := range printed {
			o.out = filepath.Join(t.TempDir(), "x.tar")
			if err := run(o, &printed[i]); err != nil {
				t.Fatal(err)
			}
			var err error
			if img, err = tarball.ImageFromPath(o.out, nil); err != nil {
				t.Fatal(err)
			}
		}
		if printed[0].String() != printed[1].String() {
			t.Errorf("two builds have the digests %s and %s", &printed[0], &printed[1])
		}
		cfg, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, cfg.Config); diff != "" {
			t.Errorf("config (-want +got):\n%s", diff)
		}
	})

	t.Run("push", func(t *testing.T) {
		server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
		defer server.Close()
		o.out, o.push = "", strings.TrimPrefix(server.URL, "http://")+"/nginx:1"
		var printed bytes.Buffer
		if err := run(o, &printed); err != nil {
			t.Fatal(err)
		}
		ref, err := name.ParseReference(strings.TrimSuffix(o.push, ":1") + "@" + strings.TrimSpace(printed.String()))
		if err != nil {
			t.Fatal(err)
		}
		img, err := remote.Image(ref)
		if err != nil {
			t.Fatal(err)
		}
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		content, err := layers[0].Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		defer content.Close()
		if _, ok := layerEntries(t, content)["etc/one"]; !ok {
			t.Error("the pushed layer lacks etc/one")
		}
	})
}

func TestRefusals(t *testing.T) {
	tests := map[string]struct {
		options options
		want    string
	}{
		"neither archive nor registry": {options{}, "exactly one"},
		"both":                         {options{out: "x", push: "y"}, "exactly one"},
		"archive without a name":       {options{out: filepath.Join(t.TempDir(), "x")}, "at least one -t"},
		"broken JSON":                  {options{out: "x", entrypoint: "nginx"}, "parse --entrypoint"},
		"a source that is missing":     {options{out: "x", adds: list{"/does/not/exist:/x"}}, "no such file"},
		"an add without a target":      {options{out: "x", adds: list{"/etc"}}, "SRC:DST"},
		"a mode that is not octal":     {options{out: "x", dirs: list{"/x:9"}}, "parse --dir"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := run(tt.options, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got error %v, want one with %q", err, tt.want)
			}
		})
	}
}
