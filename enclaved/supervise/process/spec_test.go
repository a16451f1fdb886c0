package process

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/enclaved/host"
	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/workload"
)

// The cases follow the kubelet's own rules (design/expansion in the Kubernetes documents).
func TestExpand(t *testing.T) {
	vars := map[string]string{"A": "1", "EMPTY": "", "REF": "$(A)", "A B": "space", "": "nothing", "$": "dollar"}
	tests := map[string]string{
		"":                  "",
		"plain":             "plain",
		"$(A)":              "1",
		"x$(A)y$(A)":        "x1y1",
		"$(EMPTY)x":         "x",
		"$(REF)":            "$(A)",
		"$(NONE)":           "$(NONE)",
		"$(A B)":            "space",
		"$()":               "nothing",
		"$($)":              "dollar",
		"$$":                "$",
		"$$$":               "$$",
		"$$(A)":             "$(A)",
		"$$$(A)":            "$1",
		"$$$$(A)":           "$$(A)",
		"$":                 "$",
		"x$":                "x$",
		"$A":                "$A",
		"${A}":              "${A}",
		"$(A":               "$(A",
		"$(A$(A)":           "$(A$(A)",
		"$(":                "$(",
		"$($(A))":           "$($(A))",
		"a)$(A)":            "a)1",
		"$é$(A)":            "$é1",
		"$(é)":              "$(é)",
		"$( A )":            "$( A )",
		"one $(A), two $$A": "one 1, two $A",
	}
	for in, want := range tests {
		if got := expand(in, func(n string) (string, bool) { v, ok := vars[n]; return v, ok }); got != want {
			t.Errorf("expand(%q) = %q, want %q", in, got, want)
		}
	}
}

func accounts(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/srv/web:/bin/sh\nnohome:x:50:50:::\nbad:x:-1:0::/:\n",
		"etc/group":  "root:x:0:\nweb:x:34:\nlog:x:44:root,web\n",
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestArguments(t *testing.T) {
	entrypoint := &image.Config{Entrypoint: []string{"/entry"}, Cmd: []string{"a", "b"}}
	tests := map[string]struct {
		command, args []string
		config        *image.Config
		want          []string
		fails         bool
	}{
		"image's":                {nil, nil, entrypoint, []string{"/entry", "a", "b"}, false},
		"args":                   {nil, []string{"c"}, entrypoint, []string{"/entry", "c"}, false},
		"command":                {[]string{"/c"}, nil, entrypoint, []string{"/c"}, false},
		"command and args":       {[]string{"/c"}, []string{"d"}, entrypoint, []string{"/c", "d"}, false},
		"no entrypoint":          {nil, nil, &image.Config{Cmd: []string{"/cmd"}}, []string{"/cmd"}, false},
		"no entrypoint but args": {nil, []string{"/x"}, &image.Config{Cmd: []string{"/cmd"}}, []string{"/x"}, false},
		"nothing":                {nil, nil, &image.Config{}, nil, true},
		"empty entrypoint":       {nil, nil, &image.Config{Entrypoint: []string{""}}, nil, true},
		"expanded":               {[]string{"/c", "$(A)"}, []string{"$(B) $$(A) $(IMAGE)"}, &image.Config{Env: []string{"IMAGE=1"}}, []string{"/c", "1", "1/2 $(A) $(IMAGE)"}, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			m := &workload.Manifest{Command: test.command, Args: test.args, Env: []workload.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "$(A)/2"}}}
			s, err := NewSpec(m, test.config, accounts(t), 1, host.Env{})
			if (err != nil) != test.fails {
				t.Fatal(err)
			}
			if s != nil {
				if diff := cmp.Diff(test.want, s.Args); diff != "" {
					t.Errorf("args (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// TestHostEnvironment: envFrom, then env in its order, in which a later value refers to those before it. What
// the author wrote wins over the host.
func TestHostEnvironment(t *testing.T) {
	m := manifest("/app", "$(FROM) $(BOTH) $(UNSET) $(LITERAL)")
	m.EnvFrom = true
	m.Env = []workload.EnvVar{
		{Name: "EARLY", Value: "$(LISTED)"}, {Name: "LISTED", Host: true}, {Name: "LATE", Value: "$(LISTED)/$(FROM)/$$(LISTED)"},
		{Name: "BOTH", Host: true}, {Name: "UNSET", Host: true}, {Name: "LITERAL", Value: "mine"},
	}
	s, err := NewSpec(m, &image.Config{Env: []string{"PATH=/image", "FROM=image"}}, accounts(t), 1, host.Env{
		Listed: map[string]string{"LISTED": "$(FROM)", "BOTH": "listed"},
		From:   map[string]string{"FROM": "f", "BOTH": "from", "UNSET": "from", "LITERAL": "host"},
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"PATH=/image", "HOSTNAME=enclave", "FROM=f", "BOTH=listed", "LITERAL=mine", "UNSET=from",
		"EARLY=$(LISTED)", "LISTED=$(FROM)", "LATE=$(FROM)/f/$(LISTED)", "HOME=/root",
	}
	if diff := cmp.Diff(want, s.Env); diff != "" {
		t.Errorf("env (-want +got):\n%s", diff)
	}
	if want := "f listed from mine"; s.Args[1] != want {
		t.Errorf("argument %q, want %q", s.Args[1], want)
	}
	// The kubelet knows no value of a valueFrom here.
	if got := s.ProbeArgs([]string{"$(LISTED)", "$(LITERAL)", "$(FROM)"}); !slices.Equal(got, []string{"", "mine", "$(FROM)"}) {
		t.Errorf("arguments of a probe: %q", got)
	}
}

func TestEnvironment(t *testing.T) {
	m := manifest("/app")
	m.Env = []workload.EnvVar{
		{Name: "LATER", Value: "$(A)"}, {Name: "A", Value: "1"}, {Name: "A", Value: "$(A)2"},
		{Name: "I", Value: "mine"}, {Name: "HOME", Value: "/h"}, {Name: "EQ", Value: "a=b"},
	}
	s, err := NewSpec(m, &image.Config{Env: []string{"I=image", "J=image", "broken", "=x"}}, accounts(t), 1, host.Env{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{defaultPath, "HOSTNAME=enclave", "I=mine", "J=image", "LATER=$(A)", "A=12", "HOME=/h", "EQ=a=b"}
	if diff := cmp.Diff(want, s.Env); diff != "" {
		t.Errorf("env (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"$(A)2 mine $(J)"}, s.ProbeArgs([]string{"$(A) $(I) $(J)"})); diff != "" {
		t.Errorf("probe (-want +got):\n%s", diff)
	}
}

func TestUser(t *testing.T) {
	type ids struct {
		UID, GID int
		Groups   []int
		Home     string
	}
	tests := map[string]struct {
		image string
		user  *workload.User
		want  ids
		err   string
	}{
		"none":               {"", nil, ids{0, 0, []int{0, 44}, "/root"}, ""},
		"name":               {"web", nil, ids{33, 34, []int{34, 44}, "/srv/web"}, ""},
		"id with account":    {"33", nil, ids{33, 34, []int{34, 44}, "/srv/web"}, ""},
		"id without account": {"1234", nil, ids{1234, 0, []int{0}, "/"}, ""},
		"name and group":     {"web:log", nil, ids{33, 44, []int{44}, "/srv/web"}, ""},
		"ids":                {"1:2", nil, ids{1, 2, []int{2}, "/"}, ""},
		"no home":            {"nohome", nil, ids{50, 50, []int{50}, "/"}, ""},
		"uid of the pod":     {"web:log", &workload.User{UID: ptr[int64](0)}, ids{0, 0, []int{0, 44}, "/root"}, ""},
		"gid of the pod":     {"web", &workload.User{GID: ptr[int64](7)}, ids{33, 7, []int{7, 44}, "/srv/web"}, ""},
		"groups of the pod":  {"web", &workload.User{Groups: []int64{1, 34, 99}}, ids{33, 34, []int{1, 34, 44, 99}, "/srv/web"}, ""},
		"not root":           {"web", &workload.User{NonRoot: true}, ids{33, 34, []int{34, 44}, "/srv/web"}, ""},
		"root refused":       {"", &workload.User{NonRoot: true}, ids{}, "runAsNonRoot"},
		"unknown name":       {"nobody", nil, ids{}, `"nobody" is not in the image's /etc/passwd`},
		"unknown group":      {"web:none", nil, ids{}, `"none" of the image's user is not in the image's /etc/group`},
		"id out of range":    {"4294967295", nil, ids{}, "is not in the image's /etc/passwd"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			m := manifest("/app")
			m.User = test.user
			s, err := NewSpec(m, &image.Config{User: test.image}, accounts(t), 1, host.Env{})
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("got %v, want %q", err, test.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			e := environment{s.Env}
			home, _ := e.get("HOME")
			if diff := cmp.Diff(test.want, ids{s.UID, s.GID, s.Groups, home}); diff != "" {
				t.Errorf("ids (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAccountsOfHostileImages(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(outside, []byte("web:x:1:1::/:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		spoil func(passwd string) error
		err   string
	}{
		"link outside":   {func(p string) error { return os.Symlink(outside, p) }, "is not in the image's"},
		"link climbing":  {func(p string) error { return os.Symlink("../../../../../.."+outside, p) }, "is not in the image's"},
		"loop":           {func(p string) error { return os.Symlink("passwd", p) }, "too many levels"},
		"FIFO":           {func(p string) error { return unix.Mkfifo(p, 0o600) }, "not a regular file"},
		"directory":      {func(p string) error { return os.Mkdir(p, 0o700) }, "not a regular file"},
		"endless":        {func(p string) error { return os.WriteFile(p, make([]byte, maxAccounts+1), 0o600) }, "more than"},
		"does not exist": {func(string) error { return nil }, "is not in the image's"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := test.spoil(filepath.Join(root, "etc/passwd")); err != nil {
				t.Fatal(err)
			}
			_, err := NewSpec(manifest("/app"), &image.Config{User: "web"}, root, 1, host.Env{})
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("got %v, want %q", err, test.err)
			}
		})
	}
}

func TestStopSignal(t *testing.T) {
	tests := map[string]unix.Signal{
		"": unix.SIGTERM, "SIGQUIT": unix.SIGQUIT, "quit": unix.SIGQUIT, "9": unix.SIGKILL,
		"SIGRTMIN": 34, "SIGRTMIN+3": 37, "RTMIN+3": 37, "SIGRTMAX": 64, "SIGRTMAX-14": 50,
		"SIGABRT": unix.SIGABRT, "SIGCLD": unix.SIGCHLD, "SIGIO": unix.SIGIO, "SIGIOT": unix.SIGABRT, "SIGPOLL": unix.SIGIO, "SIGPWR": unix.SIGPWR, "SIGSTKFLT": unix.SIGSTKFLT,
		"SIGNONE": 0, "0": 0, "65": 0, "-1": 0, "SIGRTMIN+x": 0, "SIGRTMIN+31": 0, "RTMIN-1": 0,
	}
	for name, want := range tests {
		got, err := parseSignal(name)
		if got != want || (err != nil) != (want == 0) {
			t.Errorf("parseSignal(%q) = %d, %v, want %d", name, got, err, want)
		}
	}
}

// The pod's stop signal wins over the image's.
func TestWhoseStopSignal(t *testing.T) {
	m := manifest("/app")
	c := &image.Config{StopSignal: "SIGQUIT"}
	for want, stop := range map[unix.Signal]string{unix.SIGQUIT: "", unix.SIGTERM: "SIGTERM", unix.SIGUSR1: "SIGUSR1"} {
		m.Lifecycle = &workload.Lifecycle{StopSignal: stop}
		if s, err := NewSpec(m, c, t.TempDir(), 1, host.Env{}); err != nil || s.StopSignal != want {
			t.Errorf("%q: got %v, %v", stop, s, err)
		}
	}
	m.Lifecycle.StopSignal = "SIGNONE"
	if _, err := NewSpec(m, c, t.TempDir(), 1, host.Env{}); err == nil || !strings.Contains(err.Error(), `the pod's stop signal: "SIGNONE" is not a signal`) {
		t.Errorf("got %v", err)
	}
}
