package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/internal/vsock"
)

// overhead is how much the root file system may grow beyond the enclave's memory: the base EIF's own
// files, in bytes.
const overhead = 64 << 20

// Driver is a driver.Driver.
type Driver struct {
	// Dir is a writable folder. It gets a mount point, which is in use inside of enclaves only, and the
	// hybrid sockets at vsock/<generation>/vsock.sock.
	Dir string
}

// Create makes the folder of the generation's sockets, in place of all former ones.
func (d Driver) Create(generation uint64) (driver.Enclave, error) {
	e := &enclave{
		root: filepath.Join(d.Dir, "root"),
		dir:  filepath.Join(d.Dir, "vsock", strconv.FormatUint(generation, 10)),
	}
	// An initboot that was killed has left sockets, perhaps of a higher generation.
	if err := os.RemoveAll(filepath.Dir(e.dir)); err != nil {
		return nil, fmt.Errorf("remove sockets of an older enclave: %w", err)
	}
	for _, dir := range []string{e.root, e.dir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("create folder of the enclave: %w", err)
		}
	}
	// The sidecar, which has a uid of its own, binds host ports here too; nobody can take away another's.
	if err := os.Chmod(e.dir, os.ModeSticky|0o777); err != nil {
		return nil, fmt.Errorf("open folder of the enclave: %w", err)
	}
	return e, nil
}

// enclave is a driver.Enclave.
type enclave struct {
	root, dir string

	mu      sync.Mutex
	process *os.Process   // nil before the start
	ended   chan struct{} // closed when the process has been reaped
	how     error         // once ended
}

func (e *enclave) socket() string { return filepath.Join(e.dir, vsock.HybridName) }

func (e *enclave) Target() string { return "unix://" + e.socket() }

func (e *enclave) Listen(port uint32) (net.Listener, error) {
	return net.Listen("unix", vsock.HostPath(e.socket(), port))
}

// config goes to the child on descriptor 3.
type config struct {
	EIF, Root, Sockets string
	// Size is that of the root file system in bytes.
	Size int64
}

// Start executes this binary again as the enclave's PID 1, which prepares the namespaces that it was
// born into and then executes /init.
func (e *enclave) Start(ctx context.Context, image driver.Image) error {
	cfg, err := json.Marshal(config{EIF: image.EIF, Root: e.root, Sockets: e.dir, Size: image.Memory + overhead})
	if err != nil {
		return err
	}
	cfgR, cfgW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start enclave process: %w", err)
	}
	defer cfgR.Close()
	defer cfgW.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start enclave process: %w", err)
	}
	defer errR.Close()
	defer errW.Close()

	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{childName}
	cmd.Env = []string{"HOME=/", "TERM=linux"} // as the kernel starts /init (init/main.c)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = image.Console, image.Console
	cmd.ExtraFiles = []*os.File{cfgR, errW}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Setsid:     true,
		// With initboot, even when it is killed, PID 1 dies, and with PID 1 its whole namespace.
		Pdeathsig: syscall.SIGKILL,
	}
	started := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		// The kernel sends Pdeathsig when the *thread* ends that made the child, so this thread must live
		// as long as the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		e.mu.Lock()
		e.process, e.ended = cmd.Process, ended
		e.mu.Unlock()
		started <- nil
		how := sentence(cmd.Wait())
		e.mu.Lock()
		e.how = how
		e.mu.Unlock()
		close(ended)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start enclave process (initboot must be root and have CAP_SYS_ADMIN): %w", err)
	}
	cfgR.Close()
	errW.Close()
	stop := context.AfterFunc(ctx, func() { e.kill() })
	defer stop()
	if _, err := cfgW.Write(cfg); err != nil {
		return fmt.Errorf("start enclave process: %w", err)
	}
	cfgW.Close()
	// The descriptor closes by itself when /init is executed.
	failure, err := io.ReadAll(errR)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("start enclave process: %w", err)
	case len(failure) > 0:
		return errors.New(strings.TrimSpace(string(failure)))
	}
	return nil
}

// sentence says how PID 1 ended.
func sentence(err error) error {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return errors.New("the enclave's PID 1 exited with status 0")
	case errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled():
		return fmt.Errorf("the enclave's PID 1 was ended by signal %q", exit.Sys().(syscall.WaitStatus).Signal())
	case errors.As(err, &exit):
		return fmt.Errorf("the enclave's PID 1 exited with status %d", exit.ExitCode())
	}
	return fmt.Errorf("wait for the enclave's PID 1: %w", err)
}

func (e *enclave) kill() chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.process != nil {
		// The kernel kills all of PID 1's namespace and reaps it before PID 1 itself can be waited for
		// (zap_pid_ns_processes, kernel/pid_namespace.c). An error says that it has ended already.
		e.process.Kill()
	}
	return e.ended
}

// Wait says how PID 1 ended.
func (e *enclave) Wait() error {
	e.mu.Lock()
	ended := e.ended
	e.mu.Unlock()
	if ended == nil {
		return errors.New("the enclave was not started")
	}
	<-ended
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.how
}

// Stop kills every process of the enclave and removes its sockets. Its file systems go with the last
// process.
func (e *enclave) Stop() error {
	if ended := e.kill(); ended != nil {
		<-ended
	}
	if err := os.RemoveAll(e.dir); err != nil {
		return fmt.Errorf("remove sockets of the enclave: %w", err)
	}
	return nil
}
