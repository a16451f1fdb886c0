package supervise

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

func hostFile(name, data string, mode uint32) *channel.HostFile {
	return &channel.HostFile{Path: name, Data: []byte(data), Mode: mode}
}

// TestHostValues: the workload finds what the host supplies where the manifest lists it, and cannot change it.
func TestHostValues(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, cmdConfig("show", "A", "B", "/etc/app/a", "/etc/app/dir/b", "/etc/app/nested/key", "/srv/key", "/etc/app/..data"))},
		Env:   []workload.EnvVar{{Name: "A", Host: true}, {Name: "B", Value: "<$(A)>"}},
		Mounts: []workload.Mount{
			{Path: "/etc/app", Kind: workload.MountHost},
			{Path: "/etc/app/nested/key", Kind: workload.MountHost, SubPath: "key"},
			{Path: "/srv", Kind: workload.MountTmpfs},
			{Path: "/srv/key", Kind: workload.MountHost, SubPath: "key"},
		},
	})
	r := e.followRun(t, &channel.RunRequest{Values: &channel.HostValues{
		Env: []*channel.Variable{{Name: "A", Value: []byte("host")}},
		Mounts: []*channel.HostMount{
			{Path: "/etc/app", Files: []*channel.HostFile{hostFile("a", "1", 0o644), hostFile("dir/b", "2", 0o400)}},
			{Path: "/srv/key", Files: []*channel.HostFile{hostFile("", "3", 0o440)}},
			{Path: "/etc/app/nested/key", Files: []*channel.HostFile{hostFile("", "4", 0o444)}},
		},
	}}, nil)
	r.check(t, 0, "")
	want := "host\n<host>\n1 -rw-r--r-- <nil>\n2 -r-------- <nil>\n4 -r--r--r-- <nil>\n3 -r--r----- <nil>\n drwxr-xr-x read /etc/app/..data: is a directory\n"
	if r.stdout != want {
		t.Errorf("got  %q\nwant %q", r.stdout, want)
	}
}

func TestHostFilesAreReadOnly(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{
		Image:  workload.Image{Digest: e.addImage(t, cmdConfig("touch", "/etc/app/new"))},
		Mounts: []workload.Mount{{Path: "/etc/app", Kind: workload.MountHost}},
	})
	r := e.followRun(t, &channel.RunRequest{Values: &channel.HostValues{Mounts: []*channel.HostMount{{Path: "/etc/app"}}}}, nil)
	r.check(t, 1, "")
	if !strings.Contains(r.stderr, "read-only file system") {
		t.Errorf("stderr %q", r.stderr)
	}
}

// TestHostValuesRefused: the exit says what is wrong, and nothing has run.
func TestHostValuesRefused(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))}, EnvFrom: true})
	r := e.followRun(t, &channel.RunRequest{Values: &channel.HostValues{EnvFrom: []*channel.Variable{{Name: "LD_PRELOAD", Value: []byte("/evil.so")}}}}, nil)
	r.check(t, 125, "env LD_PRELOAD cannot be supplied by the host")
	if r.started || strings.Contains(r.exited.Message, "evil") {
		t.Errorf("started is %v, message %q", r.started, r.exited.Message)
	}
}

func TestUpdate(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{
		Image:  workload.Image{Digest: e.addImage(t, cmdConfig("becomes", "/etc/app/a", "two"))},
		Mounts: []workload.Mount{{Path: "/etc/app", Kind: workload.MountHost}},
	})
	mount := func(path, data string) *channel.UpdateRequest {
		return &channel.UpdateRequest{Mount: &channel.HostMount{Path: path, Files: []*channel.HostFile{hostFile("a", data, 0o644)}}}
	}
	if _, err := e.Update(t.Context(), mount("/etc/app", "two")); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before the start: %v", err)
	}
	first := &channel.HostValues{Mounts: []*channel.HostMount{mount("/etc/app", "one").Mount}}
	r := e.followRun(t, &channel.RunRequest{Values: first}, func(r *result, ev *channel.RunEvent) {
		if ev.GetStarted() == nil {
			return
		}
		if _, err := e.Update(t.Context(), mount("/etc/other", "two")); status.Code(err) != codes.InvalidArgument {
			t.Errorf("another path: %v", err)
		}
		if _, err := e.Update(t.Context(), mount("/etc/app", "two")); err != nil {
			t.Error(err)
		}
	})
	r.check(t, 0, "")
}
