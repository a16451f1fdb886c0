package seccomp

import (
	"bytes"
	"encoding/json"
	"path"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/webhook/inject"
)

// profile is what is read here of a profile (OCI runtime specification, config-linux.md, Seccomp).
type profile struct {
	DefaultAction string   `json:"defaultAction"`
	Architectures []string `json:"architectures"`
	Syscalls      []struct {
		Names    []string `json:"names"`
		Action   string   `json:"action"`
		ErrnoRet *uint    `json:"errnoRet"`
		Args     []struct {
			Index    uint   `json:"index"`
			Value    uint64 `json:"value"`
			ValueTwo uint64 `json:"valueTwo"`
			Op       string `json:"op"`
		} `json:"args"`
	} `json:"syscalls"`
}

// allows tells whether a system call with this first argument is allowed.
func (p *profile) allows(t *testing.T, name string, arg uint64) bool {
	t.Helper()
	for _, s := range p.Syscalls {
		if s.Action != "SCMP_ACT_ALLOW" || !slices.Contains(s.Names, name) {
			continue
		}
		matches := true
		for _, a := range s.Args {
			switch {
			case a.Index != 0:
				t.Fatalf("%s is judged by argument %d", name, a.Index)
			case a.Op == "SCMP_CMP_EQ":
				matches = matches && arg == a.Value
			case a.Op == "SCMP_CMP_LT":
				matches = matches && arg < a.Value
			case a.Op == "SCMP_CMP_MASKED_EQ":
				matches = matches && arg&a.Value == a.ValueTwo
			default:
				t.Fatalf("%s is judged by %s", name, a.Op)
			}
		}
		if matches {
			return true
		}
	}
	return false
}

// TestProfile: AF_VSOCK is what the profile adds to a default that refuses.
func TestProfile(t *testing.T) {
	var p profile
	d := json.NewDecoder(bytes.NewReader(Profile))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		t.Fatal(err)
	}
	if p.DefaultAction != "SCMP_ACT_ERRNO" || !slices.Contains(p.Architectures, "SCMP_ARCH_X86_64") || !slices.Contains(p.Architectures, "SCMP_ARCH_AARCH64") {
		t.Errorf("default %s on %v", p.DefaultAction, p.Architectures)
	}
	for name, want := range map[uint64]bool{unix.AF_UNIX: true, unix.AF_INET: true, unix.AF_INET6: true, unix.AF_NETLINK: true, unix.AF_VSOCK: true, unix.AF_ALG: false, 46: false} {
		if got := p.allows(t, "socket", name); got != want {
			t.Errorf("socket(%d): allowed %v", name, got)
		}
	}
	for _, name := range []string{"mmap", "mbind", "madvise", "ioctl", "execve", "epoll_pwait", "fchmodat2"} {
		if !p.allows(t, name, 0) {
			t.Errorf("%s is refused", name)
		}
	}
	for _, name := range []string{"bpf", "clone3", "io_uring_setup", "keyctl", "mount", "perf_event_open", "setns", "unshare", "userfaultfd"} {
		if p.allows(t, name, 0) {
			t.Errorf("%s is allowed", name)
		}
	}
	if !p.allows(t, "clone", unix.CLONE_VM|unix.CLONE_THREAD) || p.allows(t, "clone", unix.CLONE_NEWUSER) {
		t.Error("clone must make threads and no namespaces")
	}
	if got := path.Join("profiles", Name); got != inject.VsockProfile {
		t.Errorf("the profile is installed as %s and injected as %s", got, inject.VsockProfile)
	}
}
