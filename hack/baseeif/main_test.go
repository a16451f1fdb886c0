package main

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/cpio"

	"cloister.dev/cloister/eif"
)

// inputs writes a kernel, its modules and a program.
func inputs(t *testing.T, nsm string) input {
	t.Helper()
	dir := t.TempDir()
	in := input{
		kernel: filepath.Join(dir, "vmlinuz"), version: "6.12", modules: filepath.Join(dir, "modules"),
		program: filepath.Join(dir, "enclaved"), nsm: nsm,
	}
	if err := os.Mkdir(in.modules, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		in.kernel: "a kernel", in.program: "a program",
		filepath.Join(in.modules, "00-a.ko"): "module a", filepath.Join(in.modules, "01-b.ko"): "module b",
	} {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return in
}

func TestBuildIsReproducible(t *testing.T) {
	in := inputs(t, "dev")
	var files [2][]byte
	for i := range files {
		out := filepath.Join(t.TempDir(), "base.eif")
		if _, err := build(in, out); err != nil {
			t.Fatal(err)
		}
		var err error
		if files[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("two builds of the same inputs differ")
	}
}

func TestModuleIsMeasured(t *testing.T) {
	registers := map[string]string{}
	for _, nsm := range []string{"device", "dev"} {
		out := filepath.Join(t.TempDir(), "base.eif")
		m, err := build(inputs(t, nsm), out)
		if err != nil {
			t.Fatal(err)
		}
		r, err := eif.Open(out)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		line, err := r.Cmdline()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(line, " cloister.nsm="+nsm) {
			t.Errorf("command line %q does not end with the module %s", line, nsm)
		}
		read, err := r.Measure()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(m, read); diff != "" {
			t.Errorf("measured while writing and while reading (-write +read):\n%s", diff)
		}
		registers[nsm] = string(m.PCR0)
	}
	if registers["device"] == registers["dev"] {
		t.Error("both modules have the same PCR0")
	}
	if _, err := build(inputs(t, "none"), filepath.Join(t.TempDir(), "x")); err == nil {
		t.Error("an unknown module was taken")
	}
}

func TestRamdisk(t *testing.T) {
	modules, err := readModules(inputs(t, "dev").modules)
	if err != nil {
		t.Fatal(err)
	}
	var disk bytes.Buffer
	if err := writeRamdisk(&disk, modules, []byte("a program")); err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(&disk)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(plain)))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, r := range records {
		got[r.Name] = r.Mode
		if r.MTime != 0 || r.UID != 0 || r.GID != 0 {
			t.Errorf("%s has time %d and owner %d:%d, want zeros", r.Name, r.MTime, r.UID, r.GID)
		}
	}
	want := map[string]uint64{
		"dev": 0o40755, "etc": 0o40755, "proc": 0o40755, "run": 0o40755, "sys": 0o40755, "tmp": 0o41777, "init": 0o100755,
		"modules": 0o40755, "modules/00-a.ko": 0o100644, "modules/01-b.ko": 0o100644,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}
