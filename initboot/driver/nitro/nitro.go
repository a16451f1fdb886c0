package nitro

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/vsock"
)

// Transport carries streams between the host and its enclaves.
type Transport interface {
	// Listen binds a port of the host. It is EADDRINUSE where another process of the node has it.
	Listen(port uint32) (net.Listener, error)
	// PeerCID returns the context id at the other end of a connection that was accepted.
	PeerCID(c net.Conn) (uint32, error)
	// Target is where the ports of an enclave are dialled, for vsock.Dial.
	Target(cid uint32) string
}

// Vsock is AF_VSOCK.
type Vsock struct{}

// Listen binds a port of the host.
func (Vsock) Listen(port uint32) (net.Listener, error) { return vsock.ListenAny(port) }

// PeerCID returns the context id of an enclave, or 1 to 3 for who is none.
func (Vsock) PeerCID(c net.Conn) (uint32, error) { return vsock.PeerCID(c) }

// Target is vsock://CID.
func (Vsock) Target(cid uint32) string { return fmt.Sprintf("vsock://%d", cid) }

// Driver is a driver.Driver.
type Driver struct {
	// CPUs is the number of vCPUs of an enclave. They must make full cores.
	CPUs      int
	Transport Transport
	Log       *slog.Logger
}

// Create takes nothing from the node. What it returns is a driver.Preparer.
func (d Driver) Create(uint64) (driver.Enclave, error) {
	return &enclave{driver: d, hasCID: make(chan struct{}), ended: make(chan struct{})}, nil
}

// enclave is a driver.Enclave.
type enclave struct {
	driver Driver

	hasCID chan struct{} // closed with the start
	cid    uint32        // since then

	mu     sync.Mutex
	fd     uintptr  // of vm
	vm     *os.File // the enclave's life
	memory []byte   // of huge pages, which are the enclave's own once they are set

	started bool
	stopped atomic.Bool
	ended   chan struct{} // closed with the end of a started enclave
	how     error         // once ended
}

// Target is where the enclave's ports are dialled once it has been started.
func (e *enclave) Target() string { return e.driver.Transport.Target(e.cid) }

// Listen binds a port of the host, of which Accept returns the enclave's own connections only.
func (e *enclave) Listen(port uint32) (net.Listener, error) {
	l, err := e.driver.Transport.Listen(port)
	if err != nil {
		return nil, err
	}
	return newListener(e, l, port), nil
}

// minRatio is how many times the size of its EIF an enclave's memory should be at least, as nitro-cli asks:
// the EIF, the kernel's copy of its ramdisks, and what is unpacked from them lie in it.
const minRatio = 4

// Prepare makes the enclave and gives it memory, with the EIF in it, and vCPUs. Its memory is what the image says
// and podenv.NitroOverhead, as the webhook has requested, rounded up to huge pages.
func (e *enclave) Prepare(image driver.Image) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	file, err := os.Open(image.EIF)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if err := e.create(); err != nil {
		return err
	}
	node, err := poolNode()
	if err != nil {
		return err
	}
	if e.memory, err = allocate(image.Memory+podenv.NitroOverhead, node); err != nil {
		return err
	}
	if size := int64(len(e.memory)); size < minRatio*info.Size() {
		e.driver.Log.Warn("the enclave's memory is less than 4 times its EIF, so it may not boot: raise memory in cloister.dev/config, or the container's memory limit",
			"memory", size, "eif", info.Size())
	}
	return e.load(file, info.Size())
}

// Start starts the enclave that Prepare has made, and returns when the hypervisor has.
func (e *enclave) Start(ctx context.Context, _ driver.Image) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if e.vm == nil {
		return errors.New("the enclave was not prepared")
	}
	start := startInfo{}
	if _, err := ioctl(e.fd, startEnclave, unsafe.Pointer(&start)); err != nil {
		return err
	}
	e.cid = uint32(start.cid)
	close(e.hasCID)
	return e.watch()
}

// create asks the device for an enclave.
func (e *enclave) create() error {
	dev, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return Error(err.(unix.Errno))
	}
	defer unix.Close(dev)
	var slot uint64
	fd, err := ioctl(uintptr(dev), createVM, unsafe.Pointer(&slot))
	if err != nil {
		return err
	}
	e.fd = fd
	err = unix.SetNonblock(int(fd), true) // else the runtime does not poll it
	e.vm = os.NewFile(fd, fmt.Sprintf("enclave in slot %#x", slot))
	return err
}

// load puts the EIF into the memory, and gives that and the vCPUs to the enclave.
func (e *enclave) load(file io.Reader, size int64) error {
	place := imageLoadInfo{flags: eifImage}
	if _, err := ioctl(e.fd, getImageLoadInfo, unsafe.Pointer(&place)); err != nil {
		return err
	}
	memory := uint64(len(e.memory))
	if place.memoryOffset > memory || uint64(size) > memory-place.memoryOffset {
		return fmt.Errorf("the EIF has %d bytes and belongs at %d of the enclave's memory, which has only %d: raise memory in cloister.dev/config, or the container's memory limit",
			size, place.memoryOffset, memory)
	}
	if _, err := io.ReadFull(file, e.memory[place.memoryOffset:][:size]); err != nil {
		return fmt.Errorf("read the EIF: %w", err)
	}
	// From here on the memory is the enclave's: this process must not touch it.
	region := userMemoryRegion{memorySize: memory, userspaceAddr: uint64(uintptr(unsafe.Pointer(&e.memory[0])))}
	if _, err := ioctl(e.fd, setUserMemoryRegion, unsafe.Pointer(&region)); err != nil {
		return err
	}
	for range e.driver.CPUs {
		// With 0 the device takes the rest of a core before it begins another.
		var cpu uint32
		if _, err := ioctl(e.fd, addVCPU, unsafe.Pointer(&cpu)); err != nil {
			return err
		}
	}
	return nil
}

// watch waits for the enclave's end, which the device tells by EPOLLHUP.
func (e *enclave) watch() error {
	raw, err := e.vm.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch the enclave: %w", err)
	}
	e.started = true
	go func() {
		err := raw.Read(func(fd uintptr) bool {
			p := []unix.PollFd{{Fd: int32(fd)}}
			n, _ := unix.Poll(p, 0)
			return n > 0 && p[0].Revents&unix.POLLHUP != 0
		})
		switch {
		case e.stopped.Load():
			e.how = errors.New("the enclave was stopped")
		case err == nil:
			e.how = errors.New("the enclave has ended by itself: its PID 1 exited, its kernel panicked, or it ran out of memory; the device does not say which")
		default:
			e.how = fmt.Errorf("watch the enclave: %w", err)
		}
		close(e.ended)
	}()
	return nil
}

// Wait says that the enclave has ended; the device knows no more.
func (e *enclave) Wait() error {
	e.mu.Lock()
	started := e.started
	e.mu.Unlock()
	if !started {
		return errors.New("the enclave was not started")
	}
	<-e.ended
	return e.how
}

// Stop closes the enclave's descriptor, which ends it and gives vCPUs and memory back to the node.
func (e *enclave) Stop() error {
	e.stopped.Store(true)
	e.mu.Lock()
	defer e.mu.Unlock()
	var errs []error
	if e.vm != nil {
		if err := e.vm.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close the enclave: %w", err))
		}
		e.vm = nil
		if e.started {
			<-e.ended
		}
	}
	if e.memory != nil {
		if err := unix.Munmap(e.memory); err != nil {
			errs = append(errs, fmt.Errorf("free the enclave's memory: %w", err))
		}
		e.memory = nil
	}
	return errors.Join(errs...)
}
