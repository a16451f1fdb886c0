package console

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

// volume is a folder that is written as the kubelet writes a ConfigMap.
type volume struct {
	t   *testing.T
	dir string
	n   int
}

func (v *volume) publish(files map[string]string) {
	v.t.Helper()
	v.n++
	generation := strings.Repeat("x", v.n)
	for name, data := range files {
		p := filepath.Join(v.dir, "..gen"+generation, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte(data), 0o640), os.Chmod(p, 0o640)); err != nil {
			v.t.Fatal(err)
		}
		first, _, _ := strings.Cut(name, "/")
		if err := os.Symlink("..data/"+first, filepath.Join(v.dir, first)); err != nil && !errors.Is(err, os.ErrExist) {
			v.t.Fatal(err)
		}
	}
	next := filepath.Join(v.dir, "..data_tmp")
	if err := errors.Join(os.Symlink("..gen"+generation, next), os.Rename(next, filepath.Join(v.dir, "..data"))); err != nil {
		v.t.Fatal(err)
	}
}

func hostFile(name, data string, mode uint32) *channel.HostFile {
	return &channel.HostFile{Path: name, Data: []byte(data), Mode: mode, Gid: uint32(os.Getgid())}
}

func TestValues(t *testing.T) {
	dir := t.TempDir()
	v := volume{t: t, dir: filepath.Join(dir, "configmap")}
	v.publish(map[string]string{"a": "1", "sub/b": "2"})
	shared := filepath.Join(dir, "shared")
	if err := errors.Join(
		os.MkdirAll(shared+"/deep/er", 0o755), os.WriteFile(shared+"/deep/er/c", []byte("3"), 0o600), os.Symlink("deep/er", shared+"/link"),
		os.WriteFile(dir+"/key", []byte("4"), 0o400),
	); err != nil {
		t.Fatal(err)
	}
	s := Supplied{
		Environ: []string{"CLOISTER_env_A=1=2", "PATH=/x", "CLOISTER_from_DB_HOST=\xff", "CLOISTER_env_EMPTY=", "CLOISTER_MOUNTS=[]", "FOO_SERVICE_HOST=10.0.0.1", "GODEBUG=x",
			// of Services cloister, cloister-env-x and cloister-from-x
			"CLOISTER_PORT=tcp://10.0.0.1:80", "CLOISTER_ENV_X_SERVICE_HOST=10.0.0.1", "CLOISTER_ENV_X_PORT_80_TCP=tcp://10.0.0.1:80", "CLOISTER_FROM_X_SERVICE_PORT=80"},
		Mounts: []string{v.dir, shared, dir + "/key"},
	}
	got, err := s.Values()
	if err != nil {
		t.Fatal(err)
	}
	want := &channel.HostValues{
		Env:     []*channel.Variable{{Name: "A", Value: []byte("1=2")}, {Name: "EMPTY", Value: []byte{}}},
		EnvFrom: []*channel.Variable{{Name: "DB_HOST", Value: []byte("\xff")}},
		Mounts: []*channel.HostMount{
			{Path: v.dir, Files: []*channel.HostFile{hostFile("a", "1", 0o640), hostFile("sub/b", "2", 0o640)}},
			{Path: shared, Files: []*channel.HostFile{hostFile("deep/er/c", "3", 0o600), hostFile("link/c", "3", 0o600)}},
			{Path: dir + "/key", Files: []*channel.HostFile{hostFile("", "4", 0o400)}},
		},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestValuesRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		fill func(dir string) error
		want string
	}{
		"not there":       {os.Remove, "it, or a file in it, is not there"},
		"broken link":     {func(dir string) error { return os.Symlink("nowhere", dir+"/x") }, "it, or a file in it, is not there"},
		"link leads out":  {func(dir string) error { return os.Symlink("../../../../etc/passwd", dir+"/x") }, "escapes"},
		"absolute link":   {func(dir string) error { return os.Symlink("/etc/passwd", dir+"/x") }, "escapes"},
		"circle":          {func(dir string) error { return os.Symlink(".", dir+"/x") }, "too many levels of symbolic links"},
		"pipe":            {func(dir string) error { return syscall.Mkfifo(dir+"/x", 0o644) }, "x is neither a file nor a folder"},
		"name not UTF-8":  {func(dir string) error { return os.WriteFile(dir+"/\xff", nil, 0o644) }, "is not UTF-8"},
		"larger than all": {func(dir string) error { return os.WriteFile(dir+"/x", make([]byte, workload.MaxHostValues), 0o644) }, "can have 8388608 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := tc.fill(dir); err != nil {
				t.Fatal(err)
			}
			s := Supplied{Mounts: []string{dir}}
			if _, err := s.Values(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// updates are those that an enclave got.
type updates struct {
	mu   sync.Mutex
	list []*channel.HostMount
	fail error
}

func (u *updates) update(m *channel.HostMount) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.list = append(u.list, m)
	return u.fail
}

// last is the content of the file of the last update.
func (u *updates) last() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.list) == 0 {
		return ""
	}
	var b bytes.Buffer
	for _, f := range u.list[len(u.list)-1].GetFiles() {
		b.WriteString(f.GetPath() + "=" + string(f.GetData()) + " ")
	}
	return b.String()
}

// TestUpdates: what changes is sent again, of a volume of the kubelet and of a folder that others write.
func TestUpdates(t *testing.T) {
	for name, watched := range map[string]bool{"inotify": true, "polling": false} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			v := volume{t: t, dir: filepath.Join(dir, "configmap")}
			v.publish(map[string]string{"a": "1"})
			shared := filepath.Join(dir, "shared")
			if err := errors.Join(os.Mkdir(shared, 0o755), os.WriteFile(dir+"/key", []byte("k"), 0o644)); err != nil {
				t.Fatal(err)
			}
			var u updates
			i := newInitboot(t, hold)
			i.driver.Update = u.update
			i.start(t)
			s := Supplied{Environ: []string{"CLOISTER_env_A=x"}, Mounts: []string{v.dir, shared, dir + "/key"}, Poll: time.Hour}
			if !watched {
				s.Poll = 10 * time.Millisecond
				s.watcher = func() (*fsnotify.Watcher, error) { return nil, syscall.EMFILE }
			}
			r := i.consoleWith(t, 30*time.Second, s)
			until(t, r.started)
			if got := i.driver.Last().Run().GetValues(); len(got.GetEnv()) != 1 || len(got.GetMounts()) != 3 {
				t.Fatalf("the run got %v", got)
			}
			v.publish(map[string]string{"a": "2", "b": "3"})
			until(t, func() bool { return u.last() == "a=2 b=3 " })
			if err := errors.Join(os.MkdirAll(shared+"/x/y", 0o755), os.WriteFile(shared+"/x/y/z", []byte("4"), 0o644)); err != nil {
				t.Fatal(err)
			}
			until(t, func() bool { return u.last() == "x/y/z=4 " })
			if err := os.RemoveAll(shared + "/x"); err != nil {
				t.Fatal(err)
			}
			until(t, func() bool { return u.last() == "" && len(u.list) > 0 })
			r.stop()
			r.wait(t)
		})
	}
}

// TestUpdateTriedAgain: an update that comes before the workload is there is not lost; a refused one is not
// sent for ever.
func TestUpdateTriedAgain(t *testing.T) {
	v := volume{t: t, dir: t.TempDir()}
	v.publish(map[string]string{"a": "1"})
	u := updates{fail: status.Error(codes.FailedPrecondition, "not yet")}
	i := newInitboot(t, hold)
	i.driver.Update = u.update
	i.start(t)
	r := i.consoleWith(t, 30*time.Second, Supplied{Mounts: []string{v.dir}, Poll: time.Hour})
	until(t, r.started)
	v.publish(map[string]string{"a": "2"})
	count := func() int {
		u.mu.Lock()
		defer u.mu.Unlock()
		return len(u.list)
	}
	until(t, func() bool { return count() >= 2 })
	u.mu.Lock()
	u.fail = status.Error(codes.InvalidArgument, "refused")
	u.mu.Unlock()
	v.publish(map[string]string{"a": "3"})
	until(t, func() bool { return u.last() == "a=3 " })
	v.publish(map[string]string{"a": "4"})
	until(t, func() bool { return u.last() == "a=4 " })
	u.mu.Lock()
	for i, m := range u.list {
		if i > 0 && string(m.GetFiles()[0].GetData()) == "4" && string(u.list[i-1].GetFiles()[0].GetData()) == "4" {
			t.Error("a refused update was sent twice")
		}
	}
	u.mu.Unlock()
	r.stop()
	r.wait(t)
}

// TestUnreadable: the console ends with a sentence, and asks for no run.
func TestUnreadable(t *testing.T) {
	i := newInitboot(t, hold)
	r := i.consoleWith(t, 30*time.Second, Supplied{Mounts: []string{"/nowhere/at/all"}})
	if got := r.wait(t); got.code != ExitLost || !strings.Contains(got.Message, "read what the host supplies at /nowhere/at/all") {
		t.Errorf("got %v", got)
	}
}

// TestLargeValues: as much as is accepted passes the pod socket and the control channel in one message.
func TestLargeValues(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		if err := os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte(name), 1<<20-1), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	i := newInitboot(t, hold)
	i.start(t)
	r := i.consoleWith(t, 30*time.Second, Supplied{Mounts: []string{dir}, Poll: time.Hour})
	until(t, r.started)
	files := i.driver.Last().Run().GetValues().GetMounts()[0].GetFiles()
	if len(files) != 8 || len(files[7].GetData()) != 1<<20-1 {
		t.Errorf("%d files arrived", len(files))
	}
	r.stop()
	r.wait(t)
}

// TestUnreadableLater: files that cannot be read leave the old ones there, and initboot's log says why.
func TestUnreadableLater(t *testing.T) {
	dir := t.TempDir()
	var u updates
	var log syncBuffer
	i := newInitboot(t, hold)
	i.driver.Update = u.update
	i.cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
	i.start(t)
	r := i.consoleWith(t, 30*time.Second, Supplied{Mounts: []string{dir}, Poll: time.Hour})
	until(t, r.started)
	if err := os.Symlink("/etc/passwd", dir+"/x"); err != nil {
		t.Fatal(err)
	}
	until(t, func() bool { return strings.Contains(log.String(), "changed files of the host cannot be read") })
	if err := errors.Join(os.Remove(dir+"/x"), os.WriteFile(dir+"/y", []byte("1"), 0o644)); err != nil {
		t.Fatal(err)
	}
	until(t, func() bool { return u.last() == "y=1 " })
	if n := strings.Count(log.String(), "cannot be read"); n != 1 {
		t.Errorf("told %d times", n)
	}
	r.stop()
	r.wait(t)
}

type syncBuffer struct {
	mu sync.Mutex
	bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Buffer.String()
}
