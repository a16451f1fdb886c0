package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// TestRelease looks for what is for development and tests in what a release is made of.
func TestRelease(t *testing.T) {
	for tags, want := range map[string][]string{"": nil, "devnsm": {"nsmdev"}, "vsockemu": {"vsockemu"}} {
		out, err := exec.Command("go", "list", "-deps", "-tags="+tags, ".").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, p := range []string{"nsmdev", "vsockemu"} {
			if got := strings.Contains(string(out), "/internal/"+p+"\n"); got != slices.Contains(want, p) {
				t.Errorf("tags %q: internal/%s is part of initboot: %v", tags, p, got)
			}
		}
	}
}
