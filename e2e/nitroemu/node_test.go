package nitroemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/initboot/driver/drivertest"
)

// newNode is a machine of 8 vCPUs, 4 of them for enclaves.
func newNode(t *testing.T, change func(*Options)) *Node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("seccomp notification needs root")
	}
	dir, err := os.MkdirTemp("/tmp", "n")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o := Options{Dir: dir, CPUs: 8, Threads: 2, Pool: []uint32{1, 5, 2, 6}}
	if change != nil {
		change(&o)
	}
	n, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		drivertest.Until(t, "all vCPUs are free", func() bool { return n.FreeCPUs() == len(o.Pool) })
		n.Close()
	})
	return n
}

// call is an ioctl with 8-byte words, or one of 4 bytes for NE_ADD_VCPU.
func call(fd int, request uintptr, words ...uint64) (int, []uint64, unix.Errno) {
	words = append(slices.Clone(words), 0)
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&words[0])))
	return int(r), words, errno
}

// machine is a process that misuses the device.
type machine struct {
	t   *testing.T
	dev int
	vm  int
}

func (m *machine) create() {
	m.t.Helper()
	var errno unix.Errno
	if m.vm, _, errno = call(m.dev, createVM); errno != 0 {
		m.t.Fatal(errno)
	}
}

// try calls a request of the enclave.
func (m *machine) try(what string, want unix.Errno, request uintptr, words ...uint64) []uint64 {
	m.t.Helper()
	_, out, errno := call(m.vm, request, words...)
	if errno != want {
		m.t.Errorf("%s: error %d, want %d", what, int(errno), int(want))
	}
	return out
}

// pages maps size bytes, with more flags.
func (m *machine) pages(size, flags int) ([]byte, uint64) {
	m.t.Helper()
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|flags)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { unix.Munmap(b) })
	return b, uint64(uintptr(unsafe.Pointer(&b[0])))
}

const huge = unix.MAP_HUGETLB | unix.MAP_HUGE_2MB

// onNode runs f as a process with an open device.
func onNode(t *testing.T, n *Node, f func(m *machine)) {
	t.Helper()
	err := n.Do(func() {
		dev, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer unix.Close(dev)
		f(&machine{t: t, dev: dev})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// image is the smallest EIF that the emulator knows the size of.
func image(size int) []byte {
	b := make([]byte, size)
	copy(b, ".eif")
	binary.BigEndian.PutUint16(b[26:], 1)
	binary.BigEndian.PutUint64(b[28:], headerSize)
	binary.BigEndian.PutUint64(b[28+32*8:], uint64(size-headerSize-12))
	return b
}

// TestRules has the device misused in every way that its driver refuses.
func TestRules(t *testing.T) {
	HugePages(t, 2<<20, 34)
	n := newNode(t, nil)
	onNode(t, n, func(m *machine) {
		if _, _, errno := call(m.dev, addVCPU); errno != unix.ENOTTY {
			t.Errorf("a vCPU for the device: %d", errno)
		}
		m.create()
		defer unix.Close(m.vm)
		if flags, err := unix.FcntlInt(uintptr(m.vm), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("the enclave's descriptor is inherited: %v", err)
		}
		m.try("an unknown number", unix.ENOTTY, 0xC004AE25)

		m.try("no kind of image", ErrInvalidFlagValue, getImageLoadInfo, 0)
		m.try("another kind of image", ErrInvalidFlagValue, getImageLoadInfo, 2)
		if out := m.try("image", 0, getImageLoadInfo, 1, 0); out[1] != 8<<20 {
			t.Errorf("images begin at %d", out[1])
		}

		start := func(what string, want unix.Errno, flags, cid uint64) uint64 {
			t.Helper()
			return m.try(what, want, startEnclave, flags, cid)[1]
		}
		start("flag 2", ErrInvalidFlagValue, 2, 0)
		for _, cid := range []uint64{1, 2, 3, 1<<32 - 1, 1 << 32} {
			start(fmt.Sprintf("context id %d", cid), ErrInvalidEnclaveCID, 0, cid)
		}
		start("no memory", ErrNoMemRegionsAdded, 0, 0)

		region := func(what string, want unix.Errno, flags, size, addr uint64) {
			t.Helper()
			m.try(what, want, setUserMemoryRegion, flags, size, addr)
		}
		memory, at := m.pages(68<<20, huge)
		copy(memory[8<<20:], image(3<<20))
		_, ordinary := m.pages(6<<20, 0)
		ordinary += (2<<20 - ordinary%(2<<20)) % (2 << 20)
		region("a flag", ErrInvalidFlagValue, 1, 2<<20, at)
		region("an odd size", ErrInvalidMemRegionSize, 0, 2<<20-4096, at)
		region("an odd address", ErrUnalignedMemRegion, 0, 2<<20, at+4096)
		region("the kernel's", ErrInvalidMemRegionAddr, 0, 2<<20, 1<<63)
		region("nothing", unix.ENOMEM, 0, 0, at)
		region("nowhere", unix.EFAULT, 0, 2<<20, 2<<20)
		region("ordinary pages", ErrMemNotHugePage, 0, 2<<20, ordinary)
		region("10 MiB", 0, 0, 10<<20, at)
		region("the same", ErrMemRegionAlreadyUsed, 0, 2<<20, at+8<<20)
		start("10 MiB", ErrEnclaveMemMinSize, 0, 0)
		region("more", 0, 0, 58<<20, at+10<<20)
		start("no vCPUs", ErrNoVCPUsAdded, 0, 0)

		cpu := func(what string, want unix.Errno, id uint64) uint64 {
			t.Helper()
			return m.try(what, want, addVCPU, id)[0]
		}
		cpu("of no machine", ErrInvalidVCPU, 8)
		cpu("of the host", ErrVCPUNotInCPUPool, 3)
		cpu("of the pool", 0, 2)
		cpu("again", ErrVCPUAlreadyUsed, 2)
		start("half a core", ErrFullCoresNotUsed, 0, 0)
		for i, want := range []uint64{6, 1, 5} {
			if got := cpu("any", 0, 0); got != want {
				t.Errorf("vCPU %d: got %d, want %d", i, got, want)
			}
		}
		cpu("of an empty pool", ErrNoCPUsAvailableInPool, 0)
		if _, _, errno := call(m.dev, createVM); errno != ErrNoCPUsAvailableInPool {
			t.Errorf("another enclave: %d", errno)
		}

		if cid := start("start", 0, 1, 0); cid != firstCID {
			t.Errorf("context id %d", cid)
		}
		start("start again", ErrNotInInitState, 0, 0)
		cpu("late", ErrNotInInitState, 0)
		region("late", ErrNotInInitState, 0, 2<<20, at)
		m.try("late", ErrNotInInitState, getImageLoadInfo, 1, 0)
	})
	e := n.Enclaves()[0]
	if !bytes.Equal(image(3<<20), e.EIF) {
		t.Errorf("the EIF came out with %d bytes", len(e.EIF))
	}
	if e.Memory != 68<<20 || !e.Debug || !slices.Equal(e.CPUs, []uint32{2, 6, 1, 5}) || !slices.Contains(e.Calls, "NE_ADD_VCPU error 257") {
		e.EIF = nil
		t.Errorf("%+v", e)
	}
}

// TestEnd: the last close of the descriptor ends the enclave; its own end is EPOLLHUP and nothing else.
func TestEnd(t *testing.T) {
	HugePages(t, 2<<20, 32)
	die := make(chan struct{})
	n := newNode(t, func(o *Options) {
		o.Boot = func(context.Context, Enclave) { <-die }
	})
	onNode(t, n, func(m *machine) {
		m.create()
		defer unix.Close(m.vm)
		memory, at := m.pages(64<<20, huge)
		copy(memory[8<<20:], image(1<<20))
		m.try("memory", 0, setUserMemoryRegion, 0, 64<<20, at)
		m.try("vCPU", 0, addVCPU, 0)
		m.try("vCPU", 0, addVCPU, 0)
		m.try("start", 0, startEnclave, 0, 4711)
		p := []unix.PollFd{{Fd: int32(m.vm), Events: unix.POLLIN | unix.POLLOUT}}
		if c, err := unix.Poll(p, 0); c != 0 || err != nil {
			t.Errorf("a living enclave: events %#x, %v", p[0].Revents, err)
		}
		close(die)
		if c, err := unix.Poll(p, 30000); c != 1 || err != nil || p[0].Revents != unix.POLLHUP {
			t.Errorf("a dead enclave: events %#x, %v", p[0].Revents, err)
		}
		if free := n.FreeCPUs(); free != 2 {
			t.Errorf("%d vCPUs are free before the descriptor is closed", free)
		}
		other, err := unix.Dup(m.vm)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(other)
		if n.Enclaves()[0].Calls[len(n.Enclaves()[0].Calls)-1] == "close" {
			t.Error("the first close was the last")
		}
	})
}

// TestOtherProcess: an enclave is that of one process, and goes with it.
func TestOtherProcess(t *testing.T) {
	n := newNode(t, nil)
	onNode(t, n, func(m *machine) {
		m.create()
		defer unix.Close(m.vm)
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestChild$")
		cmd.Env = append(os.Environ(), "NITROEMU_TEST=1")
		fd, err := unix.Dup(m.vm)
		if err != nil {
			t.Fatal(err)
		}
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "vm")}
		out, err := cmd.CombinedOutput()
		cmd.ExtraFiles[0].Close()
		if !strings.Contains(string(out), "vCPU: input/output error\nenclave: 0\n") {
			t.Errorf("%v: %s", err, out)
		}
	})
	drivertest.Until(t, "both enclaves are closed", func() bool {
		for _, e := range n.Enclaves() {
			if e.Calls[len(e.Calls)-1] != "close" {
				return false
			}
		}
		return len(n.Enclaves()) == 2
	})
}

// TestChild is TestOtherProcess' other process.
func TestChild(t *testing.T) {
	if os.Getenv("NITROEMU_TEST") == "" {
		t.Skip("part of TestOtherProcess")
	}
	_, _, errno := call(3, addVCPU)
	fmt.Println("vCPU:", errno)
	dev, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _, errno = call(dev, createVM)
	fmt.Println("enclave:", int(errno))
	unix.Kill(os.Getpid(), unix.SIGKILL)
}

// TestNUMA: memory is where mbind has put it, and on node 0 else.
func TestNUMA(t *testing.T) {
	HugePages(t, 2<<20, 2)
	n := newNode(t, func(o *Options) { o.NUMANode = 1 })
	onNode(t, n, func(m *machine) {
		m.create()
		defer unix.Close(m.vm)
		_, at := m.pages(4<<20, huge)
		m.try("of node 0", ErrMemDifferentNUMANode, setUserMemoryRegion, 0, 4<<20, at)
		mask := []uint64{1 << 1, 0}
		if _, _, errno := unix.Syscall6(unix.SYS_MBIND, uintptr(at), 2<<20, 2, uintptr(unsafe.Pointer(&mask[0])), 64, 0); errno != 0 {
			t.Error(errno)
		}
		m.try("of both", ErrMemDifferentNUMANode, setUserMemoryRegion, 0, 4<<20, at)
		m.try("of node 1", 0, setUserMemoryRegion, 0, 2<<20, at)
	})
}
