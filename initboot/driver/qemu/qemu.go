package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/hybrid"
	"cloister.dev/cloister/internal/vhostvsock"
	"cloister.dev/cloister/internal/vsock"
)

// Driver is a driver.Driver.
type Driver struct {
	// Dir is a writable folder. It gets the hybrid sockets at vsock/<generation>/vsock.sock.
	Dir string
	// Program is QEMU for x86-64, with the nitro-enclave machine.
	Program string
	// Firmware is the folder of qboot.rom and linuxboot_dma.bin.
	Firmware string
}

// Create makes the folder of the generation's sockets, in place of all former ones.
func (d Driver) Create(generation uint64) (driver.Enclave, error) {
	sockets, err := hybrid.Create(d.Dir, generation)
	if err != nil {
		return nil, err
	}
	return &enclave{Enclave: sockets, d: d}, nil
}

// enclave is a driver.Enclave.
type enclave struct {
	*hybrid.Enclave
	d Driver
}

// dialHost is the enclave's way to a port of its host.
func (e *enclave) dialHost(port uint32) (*net.UnixConn, error) {
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: vsock.HostPath(e.Socket(), port), Net: "unix"})
}

// Start runs QEMU. It returns when the enclave's /init has found its vsock device.
func (e *enclave) Start(ctx context.Context, image driver.Image) error {
	l, err := listen(e.Socket())
	if err != nil {
		return fmt.Errorf("listen for the enclave: %w", err)
	}
	ours, theirs, err := socketpair()
	if err != nil {
		l.Close()
		return fmt.Errorf("start QEMU: %w", err)
	}
	device := vhostvsock.New(e.dialHost)
	var parts sync.WaitGroup
	parts.Go(func() { accept(l, device) })
	parts.Go(func() {
		if err := device.Serve(ours); err != nil {
			slog.Error("serve the enclave's vsock device", "error", err)
		}
	})

	var complaint tail
	cmd := exec.Command(e.d.Program,
		"-M", "nitro-enclave,vsock=vsock", "-accel", "tcg", "-cpu", "max", "-L", e.d.Firmware,
		"-m", strconv.FormatInt((image.Memory+1<<20-1)>>20, 10)+"M", "-kernel", image.EIF,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-chardev", "socket,id=vsock,fd=3",
	)
	cmd.Env = []string{}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = image.Console, &complaint
	cmd.ExtraFiles = []*os.File{theirs}
	release := func() {
		l.Close()
		ours.Close()
		parts.Wait()
	}
	ended, err := e.Run(cmd, func(err error) error {
		release()
		return sentence(err, complaint.String())
	})
	theirs.Close()
	if err != nil {
		release()
		return fmt.Errorf("start QEMU: %w", err)
	}
	select {
	case <-device.Started():
		return nil
	case <-ended:
		return e.Wait()
	case <-ctx.Done():
		<-e.Kill()
		return context.Cause(ctx)
	}
}

// listen binds the socket by which the enclave's ports are reached.
func listen(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	// The sidecar has another uid. The directory is mounted in this pod's own containers only.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// accept leads connections to the ports that they ask for, until l is closed.
func accept(l net.Listener, device *vhostvsock.Device) {
	for n := 1; ; n++ {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of descriptors: the next try may find one
			continue
		}
		go func() {
			port, err := vsock.ReadConnect(c)
			if err != nil {
				c.Close()
				return
			}
			device.Connect(c.(*net.UnixConn), port, fmt.Sprintf("OK %d\n", n))
		}()
	}
}

// socketpair returns both ends of a connection, the second to be handed over.
func socketpair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	theirs := os.NewFile(uintptr(fds[1]), "vsock")
	f := os.NewFile(uintptr(fds[0]), "vsock")
	defer f.Close()
	ours, err := net.FileConn(f)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours.(*net.UnixConn), theirs, nil
}

// tail keeps the last of what is written to it.
type tail struct{ b []byte }

// maxTail is how much a sentence may quote, in bytes.
const maxTail = 512

func (t *tail) Write(b []byte) (int, error) {
	t.b = append(t.b, b...)
	t.b = bytes.Clone(t.b[max(0, len(t.b)-maxTail):])
	return len(b), nil
}

func (t *tail) String() string { return strings.Join(strings.Fields(string(t.b)), " ") }

// sentence says how QEMU ended; complaint is what it wrote to its standard error.
func sentence(err error, complaint string) error {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return errors.New("the enclave has powered off")
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled():
		return fmt.Errorf("the enclave's QEMU was ended by signal %q", exit.Sys().(syscall.WaitStatus).Signal())
	case errors.As(err, &exit):
		return fmt.Errorf("the enclave's QEMU exited with status %d: %s", exit.ExitCode(), complaint)
	}
	return fmt.Errorf("wait for the enclave's QEMU: %w", err)
}
