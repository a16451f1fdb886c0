package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEIFInspect(t *testing.T) {
	image, code := writeEIF(t)
	tests := map[string]struct {
		args   []string
		stdout string
	}{
		"text": {nil, fmt.Sprintf(`architecture  x86_64
kernel        6 bytes
cmdline       5 bytes
ramdisk       5 bytes
ramdisk       6 bytes
command line  "quiet"
PCR0  %x
PCR1  %x
PCR2  %x
`, code.PCR0, code.PCR1, code.PCR2)},
		"json": {[]string{"-o", "json"}, fmt.Sprintf(`{"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"%x","PCR1":"%x","PCR2":"%x"}}`+"\n",
			code.PCR0, code.PCR1, code.PCR2)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"eif", "inspect", image}, test.args...)...)
			r.want(t, 0)
			if diff := cmp.Diff(test.stdout, r.stdout); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
		})
	}
}

func TestEIFRefuses(t *testing.T) {
	image, _ := writeEIF(t)
	damaged := writeFile(t, "damaged.eif", []byte(strings.Replace(read(t, image), "second", "SECOND", 1)))
	tests := map[string]struct {
		args []string
		code int
		want string
	}{
		"no command":             {nil, 2, "name what to do"},
		"unknown command":        {[]string{"paint"}, 2, `unknown command "paint"`},
		"inspect: no file":       {[]string{"inspect"}, 2, "accepts 1 arg"},
		"inspect: format":        {[]string{"inspect", image, "-o", "yaml"}, 2, `no format "yaml"`},
		"inspect: absent file":   {[]string{"inspect", "/nonexistent"}, 1, "no such file"},
		"inspect: a folder":      {[]string{"inspect", t.TempDir()}, 1, "is a directory"},
		"inspect: no EIF":        {[]string{"inspect", "/dev/null"}, 1, "fewer than the 548"},
		"inspect: damaged image": {[]string{"inspect", damaged}, 1, "the file is damaged"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"eif"}, test.args...)...)
			r.want(t, test.code, "cloister: ", test.want)
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
		})
	}
}
