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

// inputs writes a kernel and a program and returns their names.
func inputs(t *testing.T) (kernel, program string) {
	t.Helper()
	dir := t.TempDir()
	kernel, program = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "enclaved")
	for name, content := range map[string]string{kernel: "a kernel", program: "a program"} {
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return kernel, program
}

func TestBuildIsReproducible(t *testing.T) {
	kernel, program := inputs(t)
	var files [2][]byte
	for i := range files {
		out := filepath.Join(t.TempDir(), "base.eif")
		if _, err := build(kernel, "6.12", program, "dev", out); err != nil {
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
	kernel, program := inputs(t)
	registers := map[string]string{}
	for _, nsm := range []string{"device", "dev"} {
		out := filepath.Join(t.TempDir(), "base.eif")
		m, err := build(kernel, "6.12", program, nsm, out)
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
	if _, err := build(kernel, "6.12", program, "none", filepath.Join(t.TempDir(), "x")); err == nil {
		t.Error("an unknown module was taken")
	}
}

func TestRamdisk(t *testing.T) {
	var disk bytes.Buffer
	if err := writeRamdisk(&disk, []byte("a program")); err != nil {
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
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}
