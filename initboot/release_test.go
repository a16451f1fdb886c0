package main

import (
	"os/exec"
	"strings"
	"testing"
)

// TestReleaseCannotSign looks for the development NSM in what a release is made of.
func TestReleaseCannotSign(t *testing.T) {
	for tags, want := range map[string]bool{"": false, "devnsm": true} {
		out, err := exec.Command("go", "list", "-deps", "-tags="+tags, ".").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if got := strings.Contains(string(out), "/internal/nsmdev\n"); got != want {
			t.Errorf("tags %q: the development NSM's signer is part of initboot: %v, want %v", tags, got, want)
		}
	}
}
