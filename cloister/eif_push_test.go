package main

import (
	"archive/tar"
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"cloister.dev/cloister/eif"
)

func TestEIFPushAndPull(t *testing.T) {
	file, _ := writeBase(t, eif.AArch64)
	host, _, _ := strings.Cut(first(pushed(t)), "/")
	image := host + "/team/app-eif:1.4"
	r := call(t, "", "eif", "push", plainLocal, file, image)
	r.want(t, 0)
	pinned := strings.TrimSpace(r.stdout)
	// Whoever pushes this file, with whatever version, gets this digest.
	const want = "sha256:41945d05248f6634a19d2b4d25212dc5301c166daacae8857119d4492a2dfad5"
	if repo, digest, _ := strings.Cut(pinned, "@"); repo != host+"/team/app-eif" || digest != want {
		t.Errorf("pushed as %s, want the digest %s", pinned, want)
	}
	if again := call(t, "", "eif", "push", plainLocal, writeFile(t, "copy.eif", []byte(read(t, file))), host+"/other/place"); again.code != 0 || !strings.Contains(again.stdout, want) {
		t.Errorf("pushed again: %+v", again)
	}

	// Any tool takes it for an image.
	ref, err := name.NewDigest(pinned)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(img, validate.Fast); err != nil {
		t.Error(err)
	}
	m, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if m.ArtifactType != "application/vnd.cloister.eif.v1" || m.Config.MediaType != types.OCIConfigJSON || config.OS != "linux" || config.Architecture != "arm64" {
		t.Errorf("manifest %+v, config %+v", m, config)
	}
	files := tar.NewReader(mutate.Extract(img))
	if h, err := files.Next(); err != nil || h.Name != "enclave.eif" || h.Mode != 0o444 || h.Uid != 0 || h.ModTime.Unix() != 0 {
		t.Errorf("the image holds %+v, %v", h, err)
	}

	for _, from := range []string{pinned, image} {
		out := filepath.Join(t.TempDir(), "app.eif")
		r := call(t, "", "eif", "pull", plainLocal, from, "--output", out)
		r.want(t, 0)
		if !strings.HasSuffix(r.stdout, "@"+want+"\n") {
			t.Errorf("pull printed %q", r.stdout)
		}
		if read(t, out) != read(t, file) {
			t.Error("another file came back")
		}
	}
}

func first(image, _ string) string { return image }

func TestEIFPushAndPullRefuse(t *testing.T) {
	ordinary, digest := pushed(t)
	host, _, _ := strings.Cut(ordinary, "/")
	file, _ := writeBase(t, eif.X86_64)
	// push stores an image with this layer that says that it holds an EIF.
	push := func(repository string, mediaType types.MediaType, layer []byte) string {
		img, err := newEIFImage(static.NewLayer(layer, mediaType), eif.X86_64)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := name.NewTag(host + "/" + repository)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, img); err != nil {
			t.Fatal(err)
		}
		return ref.String()
	}
	archive := func(names ...string) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, n := range names {
			w.WriteHeader(&tar.Header{Name: n, Size: 3})
			w.Write([]byte("eif"))
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	out := writeFile(t, "app.eif", []byte("what was there"))
	pull := func(image string) []string { return []string{"pull", plainLocal, image, "--output", out} }
	for name, test := range map[string]struct {
		args []string
		code int
		want string
	}{
		"push without a registry": {[]string{"push", file}, 2, ""},
		"push what is no EIF":     {[]string{"push", plainLocal, writeFile(t, "x", []byte("x")), host + "/a"}, 1, "fewer than the 548 of an EIF header"},
		"push what is not there":  {[]string{"push", plainLocal, "/nonexistent", host + "/a"}, 1, "no such file"},
		"push by digest":          {[]string{"push", plainLocal, file, host + "/a@" + digest}, 1, "has a digest, which follows from the file"},
		"push to nobody":          {[]string{"push", plainLocal, file, "127.0.0.1:1/a"}, 1, "the registry 127.0.0.1:1 cannot be reached"},
		"pull to nowhere":         {[]string{"pull", "a"}, 2, "name the file to write with --output"},
		"pull from nobody":        {pull("127.0.0.1:1/a@" + digest), 1, "the registry 127.0.0.1:1 cannot be reached"},
		"pull what is not there":  {pull(host + "/team/app@sha256:" + hex.EncodeToString(make([]byte, 32))), 1, "has no team/app@sha256:"},
		"pull an ordinary image":  {pull(ordinary), 1, `holds no enclave image: its artifact type is ""`},
		"pull a compressed layer": {pull(push("gzip", types.OCILayer, archive("enclave.eif"))), 1, "has one layer, an uncompressed archive"},
		"pull another file":       {pull(push("other", types.OCIUncompressedLayer, archive("app.eif"))), 1, "does not begin with a file enclave.eif"},
		"pull two files":          {pull(push("two", types.OCIUncompressedLayer, archive("enclave.eif", "more"))), 1, "more than one file"},
		"pull half a file":        {pull(push("half", types.OCIUncompressedLayer, archive("enclave.eif")[:513])), 1, "more than one file"},
		"pull no archive":         {pull(push("none", types.OCIUncompressedLayer, []byte("x"))), 1, "does not begin with a file enclave.eif"},
		"pull what is no EIF":     {pull(push("no-eif", types.OCIUncompressedLayer, archive("enclave.eif"))), 1, "fewer than the 548 of an EIF header"},
	} {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"eif"}, test.args...)...)
			r.want(t, test.code, test.want)
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
			if got := read(t, out); got != "what was there" {
				t.Errorf("the output was touched: %q", got)
			}
			if left, err := os.ReadDir(filepath.Dir(out)); err != nil || len(left) != 1 {
				t.Errorf("left beside the output: %v, %v", left, err)
			}
		})
	}
}
