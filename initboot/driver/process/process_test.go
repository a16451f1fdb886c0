package process

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/cpio"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/drivertest"
)

// needRoot skips a test of real namespaces where they cannot be made.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the process driver needs root")
	}
}

// buildInit builds testdata/init as a static binary.
func buildInit(t *testing.T) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "init")
	cmd := exec.Command("go", "build", "-o", out, "./testdata/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build init: %v\n%s", err, b)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// ramdisk packs entries as a newc archive.
func ramdisk(t *testing.T, zip bool, records ...cpio.Record) []byte {
	t.Helper()
	var b bytes.Buffer
	w := cpio.Newc.Writer(&b)
	if err := cpio.WriteRecords(w, records); err != nil {
		t.Fatal(err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	if !zip {
		return b.Bytes()
	}
	var z bytes.Buffer
	zw := gzip.NewWriter(&z)
	zw.Write(b.Bytes())
	zw.Close()
	return z.Bytes()
}

// writeEIF packs ramdisks into an EIF and returns its path.
func writeEIF(t *testing.T, cmdline string, ramdisks ...[]byte) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "test.eif"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	image := eif.Image{Arch: eif.X86_64, Kernel: bytes.NewReader([]byte("kernel")), Cmdline: cmdline}
	for _, r := range ramdisks {
		image.Ramdisks = append(image.Ramdisks, bytes.NewReader(r))
	}
	if _, err := eif.Write(f, image); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// runDir is a folder with a path short enough for sockets.
func runDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "p")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// within fails the test when f takes longer than any working code does.
func within[T any](t *testing.T, f func() T) T {
	t.Helper()
	c := make(chan T, 1)
	go func() { c <- f() }()
	select {
	case v := <-c:
		return v
	case <-time.After(30 * time.Second):
		t.Fatal("no result within 30 s")
		panic("unreachable")
	}
}

// processes counts the machine's processes with the name that the test's init gives itself and its child.
func processes(t *testing.T, name string) (n int) {
	t.Helper()
	comms, _ := filepath.Glob("/proc/[0-9]*/comm")
	for _, c := range comms {
		if b, _ := os.ReadFile(c); strings.TrimSpace(string(b)) == name {
			n++
		}
	}
	return n
}

// uniqueName is a name for processes, of at most 15 bytes.
func uniqueName() string { return fmt.Sprintf("%08x", rand.Uint32()) }

func TestEnclave(t *testing.T) {
	needRoot(t)
	init := buildInit(t)
	name := uniqueName()
	image := writeEIF(t, "console=ttyS0 test.name="+name,
		ramdisk(t, false, cpio.Directory("etc", 0o755), cpio.StaticFile("etc/ramdisk1", "one", 0o644), cpio.StaticFile("etc/ramdisk2", "one", 0o644)),
		ramdisk(t, true, cpio.StaticFile("init", string(init), 0o755), cpio.StaticFile("etc/ramdisk2", "two", 0o644)))
	dir := runDir(t)
	d := Driver{Dir: dir}
	for generation := range uint64(2) {
		e, err := d.Create(generation)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Stop()
		l, err := e.Listen(9000)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		console, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer console.Close()
		if err := e.Start(t.Context(), driver.Image{EIF: image, Memory: 64 << 20, Console: out}); err != nil {
			t.Fatal(err)
		}
		out.Close()
		report := within(t, func() map[string]string {
			c, err := l.Accept()
			if err != nil {
				t.Error(err)
				return nil
			}
			defer c.Close()
			var report map[string]string
			if err := json.NewDecoder(c).Decode(&report); err != nil {
				t.Error(err)
			}
			return report
		})
		want := map[string]string{
			"cmdline":       "console=ttyS0 test.name=" + name + "\n",
			"hostname":      "(none)",
			"env":           "HOME=/ TERM=linux",
			"/etc/ramdisk1": "one",
			"/etc/ramdisk2": "two",
			"/proc/1/comm":  "init",
			"/":             "dev etc init proc run sys ",
			"interfaces":    "lo ",
			"vsock":         "refused",
			"null":          "<nil>",
			"urandom":       "<nil>",
		}
		if diff := cmp.Diff(want, report); diff != "" {
			t.Errorf("the enclave (-want +got):\n%s", diff)
		}
		if c, err := net.Dial("unix", strings.TrimPrefix(e.Target(), "unix://")); err != nil {
			t.Errorf("dial the target: %v", err)
		} else {
			c.Close()
		}
		drivertest.Until(t, "PID 1 and its child run", func() bool { return processes(t, name) == 2 })
		if err := within(t, e.Stop); err != nil {
			t.Error(err)
		}
		if err := e.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("Wait after Stop: %v", err)
		}
		if n := processes(t, name); n != 0 {
			t.Errorf("%d processes run after Stop", n)
		}
		if b := within(t, func() string { b, _ := io.ReadAll(console); return string(b) }); b != "hello from PID 1\n" {
			t.Errorf("console: %q", b)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "vsock", "*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("a mount is left behind, or %v", err)
	}
}

// The sidecar binds host ports as a user of its own, and can take nothing away.
func TestSocketsOfOthers(t *testing.T) {
	e, err := Driver{Dir: runDir(t)}.Create(1)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Stop()
	folder, err := os.Stat(filepath.Dir(strings.TrimPrefix(e.Target(), "unix://")))
	if err != nil {
		t.Fatal(err)
	}
	if want := os.ModeDir | os.ModeSticky | 0o777; folder.Mode() != want {
		t.Errorf("mode %s, want %s", folder.Mode(), want)
	}
}

func TestEnclaveEnds(t *testing.T) {
	needRoot(t)
	init := ramdisk(t, false, cpio.StaticFile("init", string(buildInit(t)), 0o755))
	for name, tc := range map[string]struct {
		cmdline  string
		ramdisks [][]byte
		start    string // part of Start's error
		wait     string
	}{
		"exits": {
			cmdline: "test.exit=7", ramdisks: [][]byte{init},
			wait: "the enclave's PID 1 exited with status 7",
		},
		"no init": {
			ramdisks: [][]byte{ramdisk(t, false, cpio.StaticFile("etc/x", "", 0o644))},
			start:    "have no /init",
		},
		"hostile": {
			ramdisks: [][]byte{init, archive(entry{name: "../../../tmp/x", mode: 0o100644, data: "x"})},
			start:    `unpack ramdisk 2 of the EIF: unpack "../../../tmp/x": a name with .. could climb out`,
		},
		"too big": {
			ramdisks: [][]byte{init, ramdisk(t, true, cpio.StaticFile("x", string(make([]byte, overhead+2<<20)), 0o644))},
			start:    "no space left on device",
		},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := Driver{Dir: runDir(t)}.Create(1)
			if err != nil {
				t.Fatal(err)
			}
			defer e.Stop()
			image := writeEIF(t, tc.cmdline, tc.ramdisks...)
			err = within(t, func() error {
				return e.Start(t.Context(), driver.Image{EIF: image, Memory: 1 << 20, Console: os.Stderr})
			})
			if tc.start != "" {
				if err == nil || !strings.Contains(err.Error(), tc.start) {
					t.Errorf("Start: %v, want %q", err, tc.start)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := within(t, e.Wait); err.Error() != tc.wait {
				t.Errorf("Wait: %v, want %q", err, tc.wait)
			}
		})
	}
}

// TestParentDies kills a process that holds an enclave: nothing of the enclave may outlive it.
func TestParentDies(t *testing.T) {
	needRoot(t)
	name := uniqueName()
	image := writeEIF(t, "test.name="+name, ramdisk(t, false, cpio.StaticFile("init", string(buildInit(t)), 0o755)))
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestHoldEnclave$")
	cmd.Env = append(os.Environ(), "PROCESS_TEST_HOLD="+runDir(t), "PROCESS_TEST_EIF="+image)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	line := within(t, func() string {
		b := make([]byte, len("started\n"))
		io.ReadFull(stdout, b)
		return string(b)
	})
	if line != "started\n" || processes(t, name) == 0 {
		t.Fatalf("the enclave did not start: %q", line)
	}
	cmd.Process.Kill()
	cmd.Wait()
	drivertest.Until(t, "the enclave has gone with the process that held it", func() bool { return processes(t, name) == 0 })
}

// TestHoldEnclave is TestParentDies' other process.
func TestHoldEnclave(t *testing.T) {
	dir := os.Getenv("PROCESS_TEST_HOLD")
	if dir == "" {
		t.Skip("part of TestParentDies")
	}
	e, err := Driver{Dir: dir}.Create(1)
	if err != nil {
		t.Fatal(err)
	}
	l, err := e.Listen(9000)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(t.Context(), driver.Image{EIF: os.Getenv("PROCESS_TEST_EIF"), Memory: 64 << 20, Console: os.Stderr}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	fmt.Println("started")
	t.Fatal(errors.Join(e.Wait()))
}
