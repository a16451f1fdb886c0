package qemu

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloister.dev/cloister/initboot/driver"
)

// create makes an enclave whose QEMU is a shell script; what a real one does is shown by e2e/vm.
func create(t *testing.T, script string) (driver.Enclave, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "q") // short enough for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	program := filepath.Join(dir, "qemu")
	if script != "" {
		if err := os.WriteFile(program, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	e, err := Driver{Dir: dir, Program: program}.Create(7)
	if err != nil {
		t.Fatal(err)
	}
	return e, dir
}

func TestStart(t *testing.T) {
	for name, tc := range map[string]struct{ script, want string }{
		"no QEMU":  {"", "start QEMU: "},
		"complain": {"echo 'cannot load\nthe image' >&2; exit 1", "the enclave's QEMU exited with status 1: cannot load the image"},
		"killed":   {"kill -9 $$", `the enclave's QEMU was ended by signal "killed"`},
		"off":      {"exit 0", "the enclave has powered off"},
		"no vsock": {"exec sleep 1000", "deadline"},
	} {
		t.Run(name, func(t *testing.T) {
			e, dir := create(t, tc.script)
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			if tc.want == "deadline" {
				cancel(errors.New("deadline"))
			}
			err := e.Start(ctx, driver.Image{EIF: "x", Memory: 1, Console: os.Stderr})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Start: %v, want %q", err, tc.want)
			}
			if err := e.Stop(); err != nil {
				t.Error(err)
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "vsock", "*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// The sidecar binds host ports as a user of its own, and can take nothing away.
func TestSockets(t *testing.T) {
	e, _ := create(t, "exec sleep 1000")
	defer e.Stop()
	socket := strings.TrimPrefix(e.Target(), "unix://")
	folder, err := os.Stat(filepath.Dir(socket))
	if err != nil {
		t.Fatal(err)
	}
	if want := os.ModeDir | os.ModeSticky | 0o777; folder.Mode() != want {
		t.Errorf("mode %s, want %s", folder.Mode(), want)
	}
	if err := e.Wait(); err == nil {
		t.Error("Wait returned nil before the start")
	}
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan error, 1)
	go func() { started <- e.Start(ctx, driver.Image{EIF: "x", Memory: 1, Console: os.Stderr}) }()
	// A port of an enclave that has not booted is refused at once.
	var c net.Conn
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if c, err = net.Dial("unix", socket); err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	c.Write([]byte("CONNECT 80\n"))
	if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an enclave that has not booted answered with %d bytes, %v", n, err)
	}
	cancel()
	if err := <-started; !errors.Is(err, context.Canceled) {
		t.Errorf("Start: %v", err)
	}
}
