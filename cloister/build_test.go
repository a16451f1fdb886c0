package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	ociempty "github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/u-root/u-root/pkg/cpio"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/ramdisk"
	"cloister.dev/cloister/workload"
)

// writeBase writes a base EIF and returns its name and measurements.
func writeBase(t *testing.T, arch eif.Arch) (string, *eif.Measurements) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "base.eif")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := eif.Write(f, eif.Image{
		Arch: arch, Kernel: strings.NewReader("kernel"), Cmdline: "quiet cloister.nsm=device",
		Metadata: &eif.Metadata{ImageName: "cloister-base", BuildMetadata: eif.BuildMetadata{BuildTime: "1970-01-01T00:00:00Z", KernelVersion: "6.12"}},
		Ramdisks: []eif.Data{strings.NewReader("init")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return file, m
}

// platformImage is a random image of two layers.
func platformImage(t *testing.T, arch string) v1.Image {
	t.Helper()
	img, err := random.Image(3000, 2)
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	if img, err = mutate.ConfigFile(img, config); err != nil {
		t.Fatal(err)
	}
	return img
}

// imageIndex is an index of images for two platforms.
func imageIndex(t *testing.T) v1.ImageIndex {
	t.Helper()
	var index v1.ImageIndex = ociempty.Index
	for _, arch := range []string{"arm64", "amd64"} {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        platformImage(t, arch),
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	return index
}

func digestOf(t *testing.T, of interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	d, err := of.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// writeLayout writes what add appends into an OCI layout and returns its folder.
func writeLayout(t *testing.T, add ...mutate.Appendable) string {
	t.Helper()
	dir := t.TempDir()
	p, err := layout.Write(dir, ociempty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range add {
		switch a := a.(type) {
		case v1.ImageIndex:
			err = p.AppendIndex(a)
		case v1.Image:
			err = p.AppendImage(a)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// sealedFiles returns what the second ramdisk of an EIF holds, by name; a folder is nil.
func sealedFiles(t *testing.T, file string) map[string][]byte {
	t.Helper()
	image, err := eif.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	disks := image.Ramdisks()
	if len(disks) != 2 {
		t.Fatalf("%d ramdisks", len(disks))
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(disks[1].Open()))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for _, r := range records {
		files[r.Name] = nil
		if r.Mode&cpio.S_IFREG == cpio.S_IFREG {
			if files[r.Name], err = io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize))); err != nil {
				t.Fatal(err)
			}
		}
	}
	return files
}

// unpackLayout writes the embedded layout to a folder.
func unpackLayout(t *testing.T, files map[string][]byte) layout.Path {
	t.Helper()
	dir := t.TempDir()
	for name, b := range files {
		name, ok := strings.CutPrefix(name, "cloister/image/")
		if !ok {
			continue
		}
		var err error
		if b == nil {
			err = os.MkdirAll(filepath.Join(dir, name), 0o755)
		} else if err = os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	p, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The same image gives the same bytes from a registry and from folders, in other folders at other times.
func TestBuildIsReproducible(t *testing.T) {
	index := imageIndex(t)
	image, _ := pushed(t)
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	base, code := writeBase(t, eif.X86_64)
	pod := writeFile(t, "pod.yaml", []byte(strings.ReplaceAll(deployment, "registry:5000/web:1.4.0@"+digest, image)))
	pinned := ref.Context().Digest(digestOf(t, index)).String()

	var first []byte
	for i, from := range []string{image, pinned, layoutPrefix + writeLayout(t, index), layoutPrefix + writeLayout(t, index)} {
		dir := t.TempDir()
		t.Setenv("TMPDIR", t.TempDir())
		t.Setenv("TZ", fmt.Sprintf("UTC+%d", i))
		own, yaml := filepath.Join(dir, fmt.Sprint("base", i)), filepath.Join(dir, fmt.Sprint("pod", i))
		for to, of := range map[string]string{own: base, yaml: pod} {
			if err := os.WriteFile(to, []byte(read(t, of)), 0o600); err != nil {
				t.Fatal(err)
			}
			when := time.Date(2001+i, 2, 3, 4, 5, 6, 0, time.UTC)
			if err := os.Chtimes(to, when, when); err != nil {
				t.Fatal(err)
			}
		}
		out := filepath.Join(dir, "app.eif")
		r := call(t, "", "build", "--image", from, plainLocal, "-f", yaml, "--base", own, "--output", out, "-o", "json")
		r.want(t, 0, "sealed with PCR16 ", "the host can read: stdout", "the tag of app is")
		got := []byte(read(t, out))
		if i == 0 {
			first = got
			var said struct {
				Measurements struct{ PCR0, PCR1, PCR2 string }
			}
			if err := json.Unmarshal([]byte(r.stdout), &said); err != nil {
				t.Fatal(err)
			}
			if said.Measurements.PCR1 != hex.EncodeToString(code.PCR1) || said.Measurements.PCR0 == hex.EncodeToString(code.PCR0) {
				t.Errorf("PCR1 is not the base's, or PCR0 is: %s", r.stdout)
			}
		} else if !bytes.Equal(got, first) {
			t.Errorf("from %s: the bytes differ", from)
		}
		if left, _ := os.ReadDir(os.Getenv("TMPDIR")); len(left) > 0 {
			t.Errorf("left in the folder for temporary files: %v", left)
		}
	}

	files := sealedFiles(t, writeFile(t, "app.eif", first))
	if want := strings.Replace(deploymentManifest, digest, digestOf(t, index), 1); string(files["cloister/manifest.json"]) != want {
		t.Errorf("the manifest is %s, want %s", files["cloister/manifest.json"], want)
	}
	embedded, err := unpackLayout(t, files).ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	top, err := embedded.ImageIndex(mustHash(t, digestOf(t, index)))
	if err != nil {
		t.Fatal(err)
	}
	list, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	mine, err := top.Image(list.Manifests[1].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(mine); err != nil {
		t.Errorf("the image in the EIF: %v", err)
	}
	if _, ok := files["cloister/image/blobs/sha256/"+list.Manifests[0].Digest.Hex]; ok {
		t.Error("the image for the other platform is in the EIF too")
	}
}

func mustHash(t *testing.T, s string) v1.Hash {
	t.Helper()
	h, err := v1.NewHash(s)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Without -f nothing but the image is said; the platform is the base's.
func TestBuildWithoutPod(t *testing.T) {
	for arch, platform := range map[eif.Arch]string{eif.X86_64: "", eif.AArch64: `,"platform":"linux/arm64"`} {
		index := imageIndex(t)
		base, _ := writeBase(t, arch)
		out := filepath.Join(t.TempDir(), "app.eif")
		call(t, "", "build", "--image", layoutPrefix+writeLayout(t, index), "--base", base, "--output", out).want(t, 0)
		image, err := eif.Open(out)
		if err != nil {
			t.Fatal(err)
		}
		defer image.Close()
		got, err := ramdisk.Manifest(image)
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf(`{"apiVersion":"cloister.dev/v1alpha1","image":{"digest":%q%s}}`, digestOf(t, index), platform); string(got) != want {
			t.Errorf("%s: the manifest is %s, want %s", arch, got, want)
		}
		if image.Arch != arch {
			t.Errorf("the EIF is for %s, want %s", image.Arch, arch)
		}
	}
}

// The images of plugins are sealed too, and what they share with the workload's once.
func TestBuildWithPlugin(t *testing.T) {
	img := platformImage(t, "amd64")
	image, _ := pushed(t)
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	plugin, err := mutate.Config(img, v1.Config{Cmd: []string{"/plugin"}})
	if err != nil {
		t.Fatal(err)
	}
	pluginRef := ref.Context().Digest(digestOf(t, plugin))
	if err := remote.Write(pluginRef, plugin); err != nil {
		t.Fatal(err)
	}
	yaml := strings.Replace(deployment, "enclave: app", `enclave: app
        cloister.dev/config: |
          apiVersion: cloister.dev/v1alpha1
          kind: EnclaveConfig
          plugins: [{name: paths, type: authentication, image: "`+pluginRef.String()+`"}]`, 1)
	yaml = strings.Replace(yaml, digest, digestOf(t, img), 1)
	base, _ := writeBase(t, eif.X86_64)
	out := filepath.Join(t.TempDir(), "app.eif")
	call(t, yaml, "build", "--image", layoutPrefix+writeLayout(t, img), plainLocal, "-f", "-", "--base", base, "--output", out).want(t, 0)
	files := sealedFiles(t, out)
	blobs := 0
	for name := range files {
		if strings.HasPrefix(name, "cloister/image/blobs/sha256/") {
			blobs++
		}
	}
	if blobs != 6 { // two manifests, two configs, two layers
		t.Errorf("%d blobs", blobs)
	}
	embedded, err := unpackLayout(t, files).ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	for _, of := range []v1.Image{img, plugin} {
		got, err := embedded.Image(mustHash(t, digestOf(t, of)))
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Image(got); err != nil {
			t.Error(err)
		}
	}
}

// A sealed EIF says itself what it measures, and is not taken for another workload's.
func TestMeasureSealed(t *testing.T) {
	img := platformImage(t, "amd64")
	yaml := strings.Replace(deployment, digest, digestOf(t, img), 1)
	base, _ := writeBase(t, eif.X86_64)
	out := filepath.Join(t.TempDir(), "app.eif")
	call(t, yaml, "build", "--image", layoutPrefix+writeLayout(t, img), "-f", "-", "--base", base, "--output", out).want(t, 0)

	with := call(t, yaml, "measure", "--eif", out, "-f", "-")
	with.want(t, 0, "measured as 1.4.0")
	without := call(t, "", "measure", "--eif", out, "--label", "1.4.0")
	without.want(t, 0, "app.eif: measured as 1.4.0\n  the host can read: stdout")
	if diff := cmp.Diff(with.stdout, without.stdout); diff != "" {
		t.Errorf("with and without -f (-with +without):\n%s", diff)
	}
	set, err := workload.ParseMeasurements([]byte(without.stdout))
	if err != nil {
		t.Fatal(err)
	}
	manifest := strings.Replace(deploymentManifest, digest, digestOf(t, img), 1)
	if want := hex.EncodeToString(workload.PCR16([]byte(manifest))); set[0].PCR16 != want {
		t.Errorf("PCR16 is %s, want %s", set[0].PCR16, want)
	}
	r := call(t, strings.Replace(yaml, "fast", "slow", 1), "measure", "--eif", out, "-f", "-")
	r.want(t, 1, "-: Deployment web: it gives PCR16 ", "is sealed with the workload of PCR16 "+set[0].PCR16, "cloister build -f")
	if r.stdout != "" {
		t.Errorf("stdout is %q", r.stdout)
	}
	call(t, "", "measure", "--eif", base).want(t, 2, "holds no workload, as a base image", "with -f")
}

func TestBuildRefuses(t *testing.T) {
	base, _ := writeBase(t, eif.X86_64)
	two, _ := writeEIF(t)
	good := platformImage(t, "amd64")
	pod := strings.Replace(deployment, digest, digestOf(t, good), 1)
	layers, err := good.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer := strings.Replace(digestOf(t, layers[1]), ":", "/", 1)
	config, err := good.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	// spoil changes one blob of a layout of the good image.
	spoil := func(blob string, change func([]byte) []byte) string {
		dir := writeLayout(t, good)
		file := filepath.Join(dir, "blobs", blob)
		b := change([]byte(read(t, file)))
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		if b != nil {
			if err := os.WriteFile(file, b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return layoutPrefix + dir
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	huge, err := mutate.Append(good, mutate.Addendum{Layer: hugeLayer{layers[0]}})
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args  []string
		stdin string
		code  int
		want  string
	}{
		"no image":             {[]string{"--base", base}, "", 2, "name the image with --image"},
		"no base":              {[]string{"--image", "x"}, "", 2, "name the base EIF with --base"},
		"empty name":           {[]string{"--image", layoutPrefix + writeLayout(t, good), "--base", base, "-f", ""}, "", 2, "the name is empty"},
		"unknown format":       {[]string{"--image", "x", "--base", base, "-o", "yaml"}, "", 2, "write text or json"},
		"argument":             {[]string{"--image", "x", "--base", base, "more"}, "", 2, ""},
		"base of two ramdisks": {[]string{"--image", "x", "--base", two}, "", 1, "is no base EIF: it has 2 ramdisks"},
		"base is no EIF":       {[]string{"--image", "x", "--base", "/dev/null"}, "", 1, "read base EIF"},
		"no reference":         {[]string{"--image", "A b", "--base", base}, "", 1, "not an image reference"},
		"no registry":          {[]string{"--image", "127.0.0.1:1/a@" + digest, plainLocal, "--base", base}, "", 1, "the registry 127.0.0.1:1 cannot be reached"},
		"no layout":            {[]string{"--image", layoutPrefix + t.TempDir(), "--base", base}, "", 1, "it has no index.json"},
		"two images":           {[]string{"--image", layoutPrefix + writeLayout(t, good, platformImage(t, "amd64")), "--base", base}, "", 1, "must name one image"},
		"other platform":       {[]string{"--image", layoutPrefix + writeLayout(t, platformImage(t, "arm64")), "--base", base}, "", 1, `the image is for "linux/arm64", the enclave needs "linux/amd64"`},
		"flipped layer":        {[]string{"--image", spoil(layer, flip), "--base", base}, "", 1, "layer 2 of 2: sha256:"},
		"short layer":          {[]string{"--image", spoil(layer, func(b []byte) []byte { return b[1:] }), "--base", base}, "", 1, "came with another size"},
		"long layer":           {[]string{"--image", spoil(layer, func(b []byte) []byte { return append(b, 0) }), "--base", base}, "", 1, "came with another size"},
		"no layer":             {[]string{"--image", spoil(layer, func([]byte) []byte { return nil }), "--base", base}, "", 1, "no such file"},
		"flipped config":       {[]string{"--image", spoil("sha256/"+config.Hex, flip), "--base", base}, "", 1, "came with other bytes"},
		"layer of 5 GiB":       {[]string{"--image", layoutPrefix + writeManifest(t, huge), "--base", base}, "", 1, "layer 3 of 3 has 5368709120 bytes, and a file in a ramdisk has less than 4 GiB"},
		"another image": {[]string{"--image", layoutPrefix + writeLayout(t, good), "-f", "-", "--base", base}, deployment, 1,
			"-: Deployment web: it runs the image registry:5000/web:1.4.0@" + digest + ", and --image has the digest " + digestOf(t, good)},
		"two pods":   {[]string{"--image", layoutPrefix + writeLayout(t, good), "-f", "-", "--base", base}, pod + "---\n" + pod, 1, "- has 2 pod templates"},
		"no pod":     {[]string{"--image", layoutPrefix + writeLayout(t, good), "-f", "-", "--base", base}, service, 1, "no pod template has the annotation"},
		"denied pod": {[]string{"--image", layoutPrefix + writeLayout(t, good), "-f", "-", "--base", base}, bad, 1, "nothing was built: the webhook would deny"},
		"pod for arm64": {[]string{"--image", layoutPrefix + writeLayout(t, good), "-f", "-", "--base", base},
			strings.Replace(pod, "      containers:", "      nodeSelector: {kubernetes.io/arch: arm64}\n      containers:", 1), 1, "it is for linux/arm64, and the base EIF for linux/amd64"},
	} {
		t.Run(name, func(t *testing.T) {
			out := writeFile(t, "app.eif", []byte("what was there"))
			r := call(t, test.stdin, append([]string{"build", "--output", out}, test.args...)...)
			r.want(t, test.code, test.want, "cloister: ")
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
	call(t, "", "build", "--image", "x", "--base", base).want(t, 2, "name the file to write with --output")
}

// hugeLayer says that it has 5 GiB.
type hugeLayer struct{ v1.Layer }

func (hugeLayer) Size() (int64, error) { return 5 << 30, nil }

// writeManifest writes a layout of an image's manifest and config, without its layers.
func writeManifest(t *testing.T, img v1.Image) string {
	t.Helper()
	dir := writeLayout(t)
	p := layout.Path(dir)
	raw, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	name, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	digest := mustHash(t, digestOf(t, img))
	for hash, b := range map[v1.Hash][]byte{digest: raw, name: config} {
		if err := p.WriteBlob(hash, io.NopCloser(bytes.NewReader(b))); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.AppendDescriptor(v1.Descriptor{MediaType: "application/vnd.docker.distribution.manifest.v2+json", Digest: digest, Size: int64(len(raw))}); err != nil {
		t.Fatal(err)
	}
	return dir
}
