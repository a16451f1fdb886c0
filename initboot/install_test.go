package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"cloister.dev/cloister/manifests/seccomp"
)

// TestWriteProfile: the profile stands whole where the kubelet looks for it, also over an older one.
func TestWriteProfile(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "cloister-vsock.json")
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeProfile(dir); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got, seccomp.Profile) {
		t.Errorf("%d bytes of %d, %v", len(got), len(seccomp.Profile), err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("left behind: %v, %v", list, err)
	}
	if err := writeProfile(filepath.Join(dir, "missing")); err == nil {
		t.Error("no error where there is no folder")
	}
}
