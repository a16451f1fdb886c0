package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/hybrid"
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
	sockets, err := hybrid.Create(d.Dir, generation)
	if err != nil {
		return nil, err
	}
	e := &enclave{Enclave: sockets, root: filepath.Join(d.Dir, "root")}
	if err := os.MkdirAll(e.root, 0o755); err != nil {
		return nil, fmt.Errorf("create folder of the enclave: %w", err)
	}
	return e, nil
}

// enclave is a driver.Enclave. When its PID 1 is killed, the kernel kills all of its namespace and reaps it
// before PID 1 itself can be waited for (zap_pid_ns_processes, kernel/pid_namespace.c). Its file systems go
// with the last process.
type enclave struct {
	*hybrid.Enclave
	root string // a mount point
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
	cfg, err := json.Marshal(config{EIF: image.EIF, Root: e.root, Sockets: e.Dir, Size: image.Memory + overhead})
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
	}
	if _, err := e.Run(cmd, sentence); err != nil {
		return fmt.Errorf("start enclave process (initboot must be root and have CAP_SYS_ADMIN): %w", err)
	}
	cfgR.Close()
	errW.Close()
	stop := context.AfterFunc(ctx, func() { e.Kill() })
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
