package nitro

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/e2e/nitroemu"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/drivertest"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/vsockemu"
)

// node is a machine of 8 vCPUs on 2 NUMA nodes, 6 of them for enclaves.
func node(t *testing.T, change func(*nitroemu.Options)) *nitroemu.Node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the emulator needs root")
	}
	o := nitroemu.Options{Dir: drivertest.Dir(t), CPUs: 8, Threads: 2, Pool: []uint32{1, 2, 3, 5, 6, 7}, NUMANode: 1}
	if change != nil {
		change(&o)
	}
	n, err := nitroemu.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		drivertest.Until(t, "the node has its vCPUs back", func() bool { return n.FreeCPUs() == len(o.Pool) })
		n.Close()
	})
	return n
}

// launch makes an enclave of the node and starts it; it is stopped with the test.
func launch(t *testing.T, n *nitroemu.Node, d Driver, image driver.Image) (driver.Enclave, error) {
	t.Helper()
	d.Transport = n.Ports
	if d.Log == nil {
		d.Log = slog.New(slog.DiscardHandler)
	}
	e, err := d.Create(1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Stop(); err != nil {
			t.Error(err)
		}
	})
	return e, begin(t, n, e, image)
}

// begin prepares and starts an enclave as initboot does.
func begin(t *testing.T, n *nitroemu.Node, e driver.Enclave, image driver.Image) (err error) {
	t.Helper()
	trap := n.Do(func() {
		if err = e.(driver.Preparer).Prepare(image); err == nil {
			err = e.Start(t.Context(), image)
		}
	})
	if trap != nil {
		t.Fatal(trap)
	}
	return err
}

const memory = 64<<20 - 2<<20 // so that it is rounded up to nothing

func TestStart(t *testing.T) {
	const pages = (memory + podenv.NitroOverhead) / (2 << 20)
	nitroemu.HugePages(t, 2<<20, pages)
	image := driver.Image{EIF: drivertest.WriteEIF(t, "quiet"), Memory: memory}
	content, err := os.ReadFile(image.EIF)
	if err != nil {
		t.Fatal(err)
	}
	die := make(chan struct{})
	n := node(t, func(o *nitroemu.Options) {
		o.Boot = func(ctx context.Context, _ nitroemu.Enclave) {
			select {
			case <-die:
			case <-ctx.Done():
			}
		}
	})
	want := nitroemu.Enclave{
		Calls: []string{
			"NE_CREATE_VM", "NE_GET_IMAGE_LOAD_INFO", "NE_SET_USER_MEMORY_REGION", "NE_ADD_VCPU", "NE_ADD_VCPU", "NE_ADD_VCPU", "NE_ADD_VCPU", "NE_START_ENCLAVE",
		},
		Memory: memory + podenv.NitroOverhead, CPUs: []uint32{1, 5, 2, 6}, EIF: content, Ports: []uint32{9000},
	}
	for i, end := range []func(driver.Enclave) error{
		driver.Enclave.Stop,
		func(driver.Enclave) error { close(die); return nil },
	} {
		want.Slot, want.CID = uint64(i+1), uint32(i+16)
		want.Folder = n.Ports.Folder(want.CID)
		if i > 0 { // the first's cores come back in another order
			want.CPUs = nil
		}
		d := Driver{CPUs: 4, Transport: n.Ports, Log: slog.New(slog.DiscardHandler)}
		e, err := d.Create(1)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Stop()
		if err := e.Wait(); err == nil || err.Error() != "the enclave was not started" {
			t.Errorf("Wait before the start: %v", err)
		}
		l, err := e.Listen(9000)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(t.Context(), image); err == nil || err.Error() != "the enclave was not prepared" {
			t.Errorf("Start without Prepare: %v", err)
		}
		if err := begin(t, n, e, image); err != nil {
			t.Fatal(err)
		}
		if got, want := e.Target(), n.Ports.Target(want.CID); got != want {
			t.Errorf("target %s, want %s", got, want)
		}
		got := n.Enclaves()[i]
		if i > 0 {
			got.CPUs = nil
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the enclave (-want +got):\n%s", diff)
		}
		if err := end(e); err != nil {
			t.Error(err)
		}
		how := map[int]string{0: "the enclave was stopped", 1: "the enclave has ended by itself"}[i]
		if err := e.Wait(); err == nil || !strings.Contains(err.Error(), how) {
			t.Errorf("Wait: %v, want %q", err, how)
		}
		l.Close()
		if err := e.Stop(); err != nil {
			t.Error(err)
		}
		drivertest.Until(t, "the enclave's descriptor is closed", func() bool {
			return n.FreeCPUs() == 6 && slices.Contains(n.Enclaves()[i].Calls, "close")
		})
	}
}

// TestGigantic: pages of 1 GiB are preferred.
func TestGigantic(t *testing.T) {
	nitroemu.HugePages(t, 1<<30, 1)
	n := node(t, func(o *nitroemu.Options) { o.MaxRegions = 1 })
	if _, err := launch(t, n, Driver{CPUs: 2}, driver.Image{EIF: drivertest.WriteEIF(t, ""), Memory: memory}); err != nil {
		t.Fatal(err)
	}
	if got := n.Enclaves()[0].Memory; got != 1<<30 {
		t.Errorf("the enclave has %d bytes", got)
	}
}

// TestSentences: whatever the device answers, to whatever call, has a sentence that says what to do, and
// leaves nothing behind.
func TestSentences(t *testing.T) {
	nitroemu.HugePages(t, 2<<20, (memory+podenv.NitroOverhead)/(2<<20))
	type failure struct {
		call  string
		errno unix.Errno
	}
	var next atomic.Pointer[failure] // the race detector does not know that a system call comes before its answer
	n := node(t, func(o *nitroemu.Options) {
		o.Fail = func(c string) unix.Errno {
			if f := next.Load(); f.call == c {
				return f.errno
			}
			return 0
		}
	})
	image := driver.Image{EIF: drivertest.WriteEIF(t, ""), Memory: memory}
	calls := map[unix.Errno]string{
		unix.ENOENT: "open", unix.EACCES: "open", unix.EPERM: "open", unix.ENODEV: "open",
		unix.EIO: "NE_ADD_VCPU", unix.ENOMEM: "NE_CREATE_VM", unix.EBUSY: "NE_CREATE_VM", unix.ETIMEDOUT: "NE_START_ENCLAVE",
	}
	for e := range unix.Errno(275 - 256 + 1) {
		e += 256
		switch {
		case e == nitroemu.ErrNoCPUsAvailableInPool:
			calls[e] = "NE_CREATE_VM"
		case e <= nitroemu.ErrVCPUInvalidCPUCore || e == nitroemu.ErrInvalidVCPU:
			calls[e] = "NE_ADD_VCPU"
		case e <= nitroemu.ErrMemMaxRegions || e == nitroemu.ErrInvalidPageSize:
			calls[e] = "NE_SET_USER_MEMORY_REGION"
		case e == nitroemu.ErrInvalidFlagValue:
			calls[e] = "NE_GET_IMAGE_LOAD_INFO"
		default:
			calls[e] = "NE_START_ENCLAVE"
		}
	}
	seen := map[string]bool{}
	for errno, call := range calls {
		t.Run(fmt.Sprint(int(errno)), func(t *testing.T) {
			next.Store(&failure{call, errno})
			_, err := launch(t, n, Driver{CPUs: 2}, image)
			if err == nil || !errors.Is(err, Error(errno)) || !errors.Is(err, errno) {
				t.Fatalf("%s: error %d became %v", call, int(errno), err)
			}
			if s := err.Error(); seen[s] || !strings.Contains(s, ": ") || strings.Contains(s, "errno") || call != "open" && !strings.HasPrefix(s, call) {
				t.Errorf("%s", s)
			} else {
				seen[s] = true
			}
		})
	}
	if !errors.Is(Error(unix.ENOENT), fs.ErrNotExist) {
		t.Error("ENOENT is not fs.ErrNotExist")
	}
}

// TestRefusals are those of the device's own rules, and what the driver finds before it.
func TestRefusals(t *testing.T) {
	nitroemu.HugePages(t, 2<<20, (memory+podenv.NitroOverhead)/(2<<20))
	small := drivertest.WriteEIF(t, "")
	for name, tc := range map[string]struct {
		change func(*nitroemu.Options)
		cpus   int
		image  driver.Image
		err    string // nothing: it starts
	}{
		"half a core":     {cpus: 3, err: "NE_ERR_FULL_CORES_NOT_USED"},
		"no vCPUs":        {cpus: 0, err: "NE_ERR_NO_VCPUS_ADDED"},
		"too many vCPUs":  {cpus: 8, err: "NE_ERR_NO_CPUS_AVAIL_IN_POOL"},
		"the whole pool":  {cpus: 6},
		"no pool":         {change: func(o *nitroemu.Options) { o.Pool = nil }, cpus: 2, err: "NE_ERR_NO_CPUS_AVAIL_IN_POOL"},
		"one NUMA node":   {change: func(o *nitroemu.Options) { o.NUMANode = 0 }, cpus: 2},
		"three":           {change: func(o *nitroemu.Options) { o.NUMANode = 2 }, cpus: 2},
		"pieces":          {change: func(o *nitroemu.Options) { o.MaxRegions = 1 }, cpus: 2, err: "NE_ERR_MEM_MAX_REGIONS"},
		"no huge pages":   {cpus: 2, image: driver.Image{EIF: small, Memory: 1 << 40}, err: "not enough free huge pages on the enclave pool's NUMA node 1 for initboot"},
		"no EIF":          {cpus: 2, image: driver.Image{EIF: "/nonexistent", Memory: memory}, err: "no such file"},
		"not quite empty": {cpus: 2, image: driver.Image{EIF: os.DevNull, Memory: memory}, err: "invalid argument"},
	} {
		t.Run(name, func(t *testing.T) {
			n := node(t, tc.change)
			if tc.image == (driver.Image{}) {
				tc.image = driver.Image{EIF: small, Memory: memory}
			}
			_, err := launch(t, n, Driver{CPUs: tc.cpus}, tc.image)
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("%v, want %q", err, tc.err)
			}
		})
	}
}

func TestMemory(t *testing.T) {
	nitroemu.HugePages(t, 2<<20, (memory+podenv.NitroOverhead)/(2<<20))
	for name, tc := range map[string]struct {
		size    int64
		warning bool
		err     string
	}{
		"a quarter":      {size: (memory + podenv.NitroOverhead) / 4},
		"more":           {size: (memory+podenv.NitroOverhead)/4 + 1, warning: true},
		"more than fits": {size: memory + podenv.NitroOverhead - 8<<20 + 1, warning: true, err: "belongs at 8388608"},
	} {
		t.Run(name, func(t *testing.T) {
			path := drivertest.WriteEIF(t, "")
			if err := os.Truncate(path, tc.size); err != nil {
				t.Fatal(err)
			}
			var log bytes.Buffer
			_, err := launch(t, node(t, nil), Driver{CPUs: 2, Log: slog.New(slog.NewTextHandler(&log, nil))}, driver.Image{EIF: path, Memory: memory})
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("%v, want %q", err, tc.err)
			}
			if got := strings.Contains(log.String(), "less than 4 times"); got != tc.warning {
				t.Errorf("warning: %v\n%s", got, log.String())
			}
		})
	}
}

// TestStrangers connect to every port first, and are not heard.
func TestStrangers(t *testing.T) {
	nitroemu.HugePages(t, 2<<20, (memory+podenv.NitroOverhead)/(2<<20))
	n := node(t, nil)
	d := Driver{CPUs: 2, Transport: n.Ports, Log: slog.New(slog.DiscardHandler)}
	e, err := d.Create(1)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Stop()
	l, err := e.Listen(9000)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := e.Listen(9000); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("the port again: %v", err)
	}
	// refused waits until a connection is closed.
	refused := func(c *net.UnixConn) {
		t.Helper()
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
			t.Errorf("a stranger reads %q, %v", b, err)
		}
		c.Close()
	}
	dial := func(cid uint32) *net.UnixConn {
		t.Helper()
		c, err := n.Ports.Dial(cid, 9000)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	// Before there is an enclave: more of another pod than a queue is long, and other enclaves'.
	for range 5000 {
		refused(dial(vsockemu.HostCID))
	}
	other := dial(17)
	refused(dial(17))
	defer dial(16).Close() // the hypervisor is sometimes faster than the device
	if err := begin(t, n, e, driver.Image{EIF: drivertest.WriteEIF(t, ""), Memory: memory}); err != nil {
		t.Fatal(err)
	}
	refused(other)
	refused(dial(17))
	refused(dial(0))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if cid, err := n.Ports.PeerCID(c); err != nil || cid != 16 {
		t.Errorf("accepted %d, %v", cid, err)
	}
	l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	if l, err = e.Listen(9000); err != nil {
		t.Errorf("the port is not free after Close: %v", err)
	} else {
		l.Close()
	}
}
