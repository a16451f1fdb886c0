package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/enclaved/host"
	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/workload"
)

// app is the path of the test's workload program.
var app string

func TestMain(m *testing.M) {
	Helper()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "app")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		app = filepath.Join(dir, "app")
		build := exec.Command("go", "build", "-o", app, "./testdata/app")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the test's workload: %v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

func self(t *testing.T) string {
	t.Helper()
	p, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// newImage makes a root with the app and some accounts, and skips where nobody may make namespaces.
func newImage(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a workload has namespaces and a root of its own")
	}
	root := t.TempDir()
	for _, dir := range []string{"bin", "etc", "tmp", "mnt"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	os.Chmod(filepath.Join(root, "tmp"), 0o1777)
	b, err := os.ReadFile(app)
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]struct {
		content string
		mode    fs.FileMode
	}{
		"app":          {string(b), 0o755},
		"bin/app":      {string(b), 0o755},
		"bin/plain":    {"data", 0o644},
		"bin/script":   {"#!/nowhere\n", 0o755},
		"bin/noformat": {"data", 0o755},
		"etc/passwd":   {"root:x:0:0::/root:/bin/sh\nbroken\nweb:x:33:34::/srv/web:/bin/sh\n", 0o644},
		"etc/group":    {"root:x:0:\nweb:x:34:\nlog:x:44:root,web\nother:x:45:somebody\n", 0o644},
	} {
		if err := os.WriteFile(filepath.Join(root, name), []byte(f.content), f.mode); err != nil {
			t.Fatal(err)
		}
	}
	// An image's own link must be replaced, not followed.
	if err := os.Symlink("/bin/plain", filepath.Join(root, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	return root
}

// started is a workload whose output is collected.
type started struct {
	*Process
	stdout, stderr *os.File
}

func start(t *testing.T, root string, m *workload.Manifest, c *image.Config) (*started, error) {
	t.Helper()
	return startWith(t, root, m, c)
}

func startWith(t *testing.T, root string, m *workload.Manifest, c *image.Config, binds ...Bind) (*started, error) {
	t.Helper()
	spec, err := NewSpec(m, c, root, 8<<20, host.Env{})
	if err != nil {
		return nil, err
	}
	spec.Binds = binds
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := Start(self(t), NewChildren(), spec, outW, errW)
	outW.Close()
	errW.Close()
	if err != nil {
		outR.Close()
		errR.Close()
		return nil, err
	}
	s := &started{p, outR, errR}
	t.Cleanup(func() {
		p.Close()
		outR.Close()
		errR.Close()
	})
	return s, nil
}

// finish returns everything the workload writes and its status.
func (s *started) finish(t *testing.T) (stdout, stderr string, status int) {
	t.Helper()
	rest := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(s.stderr)
		rest <- string(b)
	}()
	out, err := io.ReadAll(s.stdout)
	if err != nil {
		t.Fatal(err)
	}
	status, err = s.Wait()
	if err != nil {
		t.Fatal(err)
	}
	return string(out), <-rest, status
}

func manifest(command ...string) *workload.Manifest { return &workload.Manifest{Command: command} }

type facts struct {
	PID, UID, GID int
	Groups        []int
	Env           []string
	Dir           string
	Hostname      string
	Capabilities  string
	NoNewPrivs    string
	Umask         string
	Dev           []string
	Proc          []int
	Root          []string
	Refused       map[string]string
	Hosts         string
}

func state(t *testing.T, m *workload.Manifest, c *image.Config) facts {
	t.Helper()
	s, err := start(t, newImage(t), m, c)
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr, status := s.finish(t)
	var f facts
	if err := json.Unmarshal([]byte(stdout), &f); err != nil || status != 0 {
		t.Fatalf("%v, status %d\n%s\n%s", err, status, stdout, stderr)
	}
	return f
}

// all are the default capabilities as a mask.
func mask(names ...string) string {
	var m uint64
	for _, n := range names {
		m |= 1 << capabilities[n]
	}
	return fmt.Sprintf("%x", m)
}

func ptr[T any](v T) *T { return &v }

func TestWhatTheWorkloadFinds(t *testing.T) {
	m := manifest("/app", "state")
	m.Env = []workload.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "$(A)$(PATH)"}, {Name: "PATH", Value: "/bin"}}
	m.WorkingDir = "/work/dir"
	m.Mounts = []workload.Mount{{Path: "/cache/deep", Kind: workload.MountTmpfs}, {Path: "/cache", Kind: workload.MountTmpfs, SizeLimit: 1 << 20}}
	got := state(t, m, &image.Config{Env: []string{"PATH=/usr/bin", "C=3"}, WorkingDir: "/ignored"})
	all := mask(workload.DefaultCapabilities...)
	want := facts{
		PID: 1, Groups: []int{0, 44},
		Env:      []string{"PATH=/bin", "HOSTNAME=enclave", "C=3", "A=1", "B=1$(PATH)", "HOME=/root"},
		Dir:      "/work/dir",
		Hostname: "enclave", Capabilities: all + " " + all + " 0 " + all + " 0",
		NoNewPrivs: "0", Umask: "0022",
		Dev:  []string{"fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"},
		Proc: []int{1}, Root: []string{"app", "bin", "cache", "dev", "etc", "mnt", "proc", "sys", "tmp", "work"},
		Refused: map[string]string{
			"vsock": "address family not supported by protocol", "mount": "operation not permitted", "mknod": "operation not permitted",
			"core_pattern": "open /proc/sys/kernel/core_pattern: read-only file system",
			"write root":   "allowed", "write tmp": "allowed", "dev null": "allowed", "unix socket": "allowed",
			"write sys": "open /sys/new: read-only file system",
		},
		Hosts: "127.0.0.1\tlocalhost enclave\n::1\tlocalhost ip6-localhost ip6-loopback\nenclave\n<nil>",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("facts (-want +got):\n%s", diff)
	}
}

func TestRestricted(t *testing.T) {
	m := manifest("app", "state")
	m.User = &workload.User{UID: ptr[int64](33), GID: ptr[int64](99), Groups: []int64{7, 200}, NonRoot: true}
	m.Security = &workload.Security{NoNewPrivileges: true, ReadOnlyRoot: true, DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE"}}
	m.Mounts = []workload.Mount{{Path: "/tmp", Kind: workload.MountTmpfs}}
	got := state(t, m, &image.Config{Env: []string{"PATH=/nowhere:/bin"}})
	one := mask("NET_BIND_SERVICE")
	want := facts{
		PID: 1, UID: 33, GID: 99, Groups: []int{7, 44, 99, 200}, Dir: "/", Hostname: "enclave",
		Env:          []string{"PATH=/nowhere:/bin", "HOSTNAME=enclave", "HOME=/srv/web"},
		Capabilities: "0 0 0 " + one + " 0", NoNewPrivs: "1", Umask: "0022", Proc: []int{1},
		Refused: map[string]string{
			"vsock": "address family not supported by protocol", "mount": "operation not permitted", "mknod": "operation not permitted",
			"core_pattern": "open /proc/sys/kernel/core_pattern: read-only file system",
			"write root":   "open /new: read-only file system", "write tmp": "allowed", "dev null": "allowed", "unix socket": "allowed",
			"write sys": "open /sys/new: read-only file system",
		},
	}
	got.Dev, got.Root, got.Hosts = nil, nil, ""
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("facts (-want +got):\n%s", diff)
	}
}

// TestHostMount: the host's files lie where the manifest says, also behind a link of the image, but never over the
// system by way of one, or over the home directory.
func TestHostMount(t *testing.T) {
	for name, tt := range map[string]struct{ link, to, mount, refused, home string }{
		"no link":                    {mount: "/srv/deep/app"},
		"a link":                     {link: "srv", to: "/mnt", mount: "/srv/app"},
		"below a link to the system": {link: "mnt/config", to: "/etc", mount: "/mnt/config/ssl/certs", refused: "/etc/ssl/certs belongs to the system"},
		"a link to the system":       {link: "mnt/certs", to: "../etc", mount: "/mnt/certs", refused: "/etc belongs to the system"},
		"the home directory":         {mount: "/srv/app", home: "/srv/app/", refused: "/srv/app is or holds /srv/app, the workload's home directory"},
		"above the home directory":   {mount: "/srv/app", home: "/srv/app/of/it", refused: "the workload's home directory"},
		"below the home directory":   {mount: "/srv/app", home: "/srv"},
		"beside the home directory":  {mount: "/srv/app", home: "/srv/app2"},
		"a home behind a link":       {link: "srv", to: "mnt", mount: "/mnt/app", home: "/srv/app", refused: "the workload's home directory"},
		"a home below a file":        {mount: "/srv/app", home: "/app/home"},
		"a home that is relative":    {mount: "/srv/app", home: "srv/app", refused: "the workload's home directory"},
	} {
		t.Run(name, func(t *testing.T) {
			root, source := newImage(t), t.TempDir()
			if err := os.WriteFile(filepath.Join(source, "file"), []byte("the host's"), 0o644); err != nil {
				t.Fatal(err)
			}
			if tt.link != "" {
				if err := os.Symlink(tt.to, filepath.Join(root, tt.link)); err != nil {
					t.Fatal(err)
				}
			}
			m := manifest("/app", "put", "text", tt.mount+"/file")
			m.Mounts = []workload.Mount{{Path: tt.mount, Kind: workload.MountHost}}
			c := &image.Config{}
			if tt.home != "" {
				c.Env = []string{"HOME=" + tt.home}
			}
			s, err := startWith(t, root, m, c, Bind{Source: source, Target: tt.mount, ReadOnly: true})
			if tt.refused != "" {
				if err == nil || !strings.Contains(err.Error(), tt.refused) {
					t.Errorf("got %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if stdout, stderr, status := s.finish(t); !strings.Contains(stdout, "the host's") {
				t.Errorf("%q, %q, status %d", stdout, stderr, status)
			}
		})
	}
}

// TestSharedVolume: mounts with one number show the same memory, or a directory of it.
func TestSharedVolume(t *testing.T) {
	m := manifest("/app", "put", "text", ">/data/file", ">/data/sub/dir/file", ">/other/file", "/data/sub/dir/file", "/data/file", "/data/read/file", "/data/read/sub/dir/file", ">/data/read/new", ">/var/sub/file", "/data/sub/dir/file")
	m.User = &workload.User{UID: ptr[int64](33)}
	m.Mounts = []workload.Mount{
		{Path: "/data", Kind: workload.MountTmpfs, Volume: 1, SizeLimit: 1 << 20},
		{Path: "/data/read", Kind: workload.MountTmpfs, Volume: 1, SizeLimit: 1 << 20, ReadOnly: true},
		{Path: "/other", Kind: workload.MountTmpfs, Volume: 2},
		{Path: "/var", Kind: workload.MountTmpfs},
		{Path: "/var/sub", Kind: workload.MountTmpfs, Volume: 1, SizeLimit: 1 << 20, SubPath: "sub/dir"},
		{Path: "/var/two", Kind: workload.MountTmpfs, Volume: 2},
	}
	s, err := start(t, newImage(t), m, &image.Config{})
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr, _ := s.finish(t)
	want := `/data/file <nil>
/data/sub/dir/file <nil>
/other/file <nil>
/data/sub/dir/file text <nil>
/data/file text <nil>
/data/read/file text <nil>
/data/read/sub/dir/file text <nil>
/data/read/new open /data/read/new: read-only file system
/var/sub/file <nil>
/data/sub/dir/file text <nil>
`
	if diff := cmp.Diff(want, stdout); diff != "" {
		t.Errorf("the workload says (-want +got):\n%s%s", diff, stderr)
	}
}

func TestEnds(t *testing.T) {
	tests := map[string]struct {
		command []string
		status  int
		message string // of a StartError
	}{
		"status":                  {[]string{"/app", "exit", "7"}, 7, ""},
		"success":                 {[]string{"app", "exit", "0"}, 0, ""},
		"not found":               {[]string{"/nowhere"}, 127, `"/nowhere" cannot be executed: no such file or directory`},
		"not in PATH":             {[]string{"nowhere"}, 127, `"nowhere" was not found in the PATH of the workload`},
		"below a file":            {[]string{"/app/x"}, 127, `"/app/x" cannot be executed: not a directory`},
		"not executable":          {[]string{"/bin/plain"}, 126, `"/bin/plain" cannot be executed: permission denied`},
		"not executable, by PATH": {[]string{"plain"}, 126, `"plain" cannot be executed: permission denied`},
		"a directory":             {[]string{"/etc"}, 126, `"/etc" cannot be executed: permission denied`},
		"no interpreter":          {[]string{"/bin/script"}, 127, `"/bin/script" cannot be executed: no such file or directory`},
		"no format":               {[]string{"noformat"}, 126, `"noformat" cannot be executed: exec format error`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s, err := start(t, newImage(t), manifest(test.command...), &image.Config{Env: []string{"PATH=/bin"}})
			if e, ok := errors.AsType[*StartError](err); ok {
				if e.Status != test.status || e.Message != test.message {
					t.Errorf("got %d, %q, want %d, %q", e.Status, e.Message, test.status, test.message)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, _, status := s.finish(t); status != test.status || test.message != "" {
				t.Errorf("status %d, want %d and message %q", status, test.status, test.message)
			}
		})
	}
}

func TestBadSurroundings(t *testing.T) {
	tests := map[string]struct {
		spoil   func(root string) error
		mount   string
		message string
	}{
		"dev is a link":        {func(r string) error { return os.Symlink("/tmp", r+"/dev") }, "", "the image's /dev is not a directory"},
		"proc is a file":       {func(r string) error { return os.WriteFile(r+"/proc", nil, 0o600) }, "", "the image's /proc is not a directory"},
		"working directory":    {func(r string) error { return os.WriteFile(r+"/srv", nil, 0o600) }, "", "make the working directory"},
		"mount below a file":   {func(string) error { return nil }, "/app/x", "make the mount point /app/x"},
		"hosts is a directory": {func(r string) error { return os.MkdirAll(r+"/etc/hosts/x", 0o700) }, "", "/etc/hosts"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			root := newImage(t)
			if err := test.spoil(root); err != nil {
				t.Fatal(err)
			}
			m := manifest("/app", "exit", "0")
			m.WorkingDir = "/srv"
			if test.mount != "" {
				m.Mounts = []workload.Mount{{Path: test.mount, Kind: workload.MountTmpfs}}
			}
			_, err := start(t, root, m, &image.Config{})
			if e, ok := errors.AsType[*StartError](err); !ok || e.Status != StatusFailed || !strings.Contains(e.Message, test.message) {
				t.Errorf("got %v, want status 125 and %q", err, test.message)
			}
		})
	}
}

func TestOutputIsComplete(t *testing.T) {
	s, err := start(t, newImage(t), manifest("/app", "flood", "4194304"), &image.Config{})
	if err != nil {
		t.Fatal(err)
	}
	stdout, stderr, _ := s.finish(t)
	if want := strings.Repeat(strings.Repeat("x", 1023)+"\n", 4096); stdout != want || stderr != "the last word" {
		t.Errorf("got %d bytes and %q", len(stdout), stderr)
	}
}

func TestNothingIsLeftBehind(t *testing.T) {
	s, err := start(t, newImage(t), manifest("/app", "leave"), &image.Config{})
	if err != nil {
		t.Fatal(err)
	}
	// Ends only when the child that holds the output is gone.
	if _, _, status := s.finish(t); status != 0 {
		t.Errorf("status %d", status)
	}
}

func readLine(t *testing.T, f *os.File, want string) {
	t.Helper()
	b := make([]byte, len(want)+1)
	if _, err := io.ReadFull(f, b); err != nil || string(b) != want+"\n" {
		t.Fatalf("read %q, %v, want %q", b, err, want)
	}
}

func TestSignals(t *testing.T) {
	s, err := start(t, newImage(t), manifest("/app", "stop"), &image.Config{StopSignal: "SIGQUIT"})
	if err != nil {
		t.Fatal(err)
	}
	readLine(t, s.stdout, "ready")
	if err := s.Signal(s.spec.StopSignal); err != nil {
		t.Fatal(err)
	}
	if stdout, _, status := s.finish(t); status != 3 || stdout != "got quit\n" {
		t.Errorf("got %q, status %d", stdout, status)
	}
	if err := s.Signal(unix.SIGKILL); err != nil {
		t.Errorf("a signal after the end: %v", err)
	}

	s, err = start(t, newImage(t), manifest("/app", "sleep"), &image.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, _, status := s.finish(t); status != 137 {
		t.Errorf("killed: status %d, want 137", status)
	}
}

func TestExec(t *testing.T) {
	m := manifest("/app", "sleep")
	m.WorkingDir = "/srv"
	m.User = &workload.User{UID: ptr[int64](33)}
	m.Env = []workload.EnvVar{{Name: "NAME", Value: "$(x)"}}
	m.Security = &workload.Security{ReadOnlyRoot: true}
	s, err := start(t, newImage(t), m, &image.Config{Env: []string{"PATH=/bin"}})
	if err != nil {
		t.Fatal(err)
	}
	readLine(t, s.stdout, "sleeping")
	tests := map[string]struct {
		args    []string
		status  int
		message string
	}{
		"same surroundings": {[]string{"app", "same", "/srv", "33", "$(x)"}, 0, ""},
		"status":            {[]string{"/app", "exit", "4"}, 4, ""},
		"read-only root":    {[]string{"/app", "touch", "/new"}, 1, ""},
		"its tmp":           {[]string{"/app", "touch", "/dev/shm/new"}, 0, ""},
		"not found":         {[]string{"nowhere"}, 0, "was not found"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			status, err := s.Exec(t.Context(), test.args)
			if (err != nil) != (test.message != "") || status != test.status || (err != nil && !strings.Contains(err.Error(), test.message)) {
				t.Errorf("status %d, %v, want %d, %q", status, err, test.status, test.message)
			}
		})
	}

	// A command that takes too long is killed, and nothing waits for it.
	ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, errors.New("too long"))
	defer cancel()
	if _, err := s.Exec(ctx, []string{"/app", "sleep"}); err == nil || err.Error() != "too long" {
		t.Errorf("got %v, want the cause", err)
	}
	s.Signal(unix.SIGKILL)
	s.finish(t)
	if _, err := s.Exec(t.Context(), []string{"/app", "exit", "0"}); err == nil {
		t.Error("a command ran beside a workload that has ended")
	}
}

func TestReap(t *testing.T) {
	c := NewChildren()
	own := exec.Command("/bin/true")
	if err := c.start(own); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	state := func(pid int) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return "gone"
		}
		return string(b[strings.LastIndexByte(string(b), ')')+2])
	}
	for state(own.Process.Pid) != "Z" {
		if time.Now().After(deadline) {
			t.Fatal("the child does not end")
		}
		time.Sleep(time.Millisecond)
	}
	if c.reapOne() {
		t.Error("somebody's child was reaped")
	}
	if ws, err := c.wait(own); err != nil || ws.ExitStatus() != 0 {
		t.Errorf("wait: %v, %v", ws, err)
	}

	left := exec.Command("/bin/true") // nobody's, as a process that PID 1 inherits
	if err := left.Start(); err != nil {
		t.Fatal(err)
	}
	go c.Reap()
	c.wake <- unix.SIGCHLD
	for state(left.Process.Pid) != "gone" {
		if time.Now().After(deadline) {
			t.Fatal("the child is not reaped")
		}
		time.Sleep(time.Millisecond)
	}
}
