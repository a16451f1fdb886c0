// Package hybrid is what drivers share whose enclaves are processes of this machine and have hybrid sockets
// for vsock (package vsock).
package hybrid

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"cloister.dev/cloister/internal/vsock"
)

// Enclave is all of a driver.Enclave but Start, which calls Run.
type Enclave struct {
	// Dir is the folder of the sockets.
	Dir string

	mu      sync.Mutex
	process *os.Process   // nil before the start
	ended   chan struct{} // closed when the process has been reaped
	how     error         // once ended
}

// Create makes the folder of the generation's sockets, dir/vsock/<generation>, in place of all former ones.
func Create(dir string, generation uint64) (*Enclave, error) {
	e := &Enclave{Dir: filepath.Join(dir, "vsock", strconv.FormatUint(generation, 10))}
	// An initboot that was killed has left sockets, perhaps of a higher generation.
	if err := os.RemoveAll(filepath.Dir(e.Dir)); err != nil {
		return nil, fmt.Errorf("remove sockets of an older enclave: %w", err)
	}
	if err := os.MkdirAll(e.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("create folder of the enclave: %w", err)
	}
	// The sidecar, which has a uid of its own, binds host ports here too; nobody can take away another's.
	if err := os.Chmod(e.Dir, os.ModeSticky|0o777); err != nil {
		return nil, fmt.Errorf("open folder of the enclave: %w", err)
	}
	return e, nil
}

// Socket is where ports of the enclave are dialled.
func (e *Enclave) Socket() string { return filepath.Join(e.Dir, vsock.HybridName) }

// Target implements driver.Enclave.
func (e *Enclave) Target() string { return "unix://" + e.Socket() }

// Listen implements driver.Enclave.
func (e *Enclave) Listen(port uint32) (net.Listener, error) {
	return net.Listen("unix", vsock.HostPath(e.Socket(), port))
}

// Run starts the process, at most once. With initboot, even when it is killed, the process dies. When it
// has been reaped, end is called with what cmd.Wait returned; what end returns is what Wait returns, and then
// ended is closed. After an error of Run there is no process, and end is not called.
func (e *Enclave) Run(cmd *exec.Cmd, end func(error) error) (ended <-chan struct{}, err error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setsid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGKILL
	started := make(chan error, 1)
	over := make(chan struct{})
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
		e.process, e.ended = cmd.Process, over
		e.mu.Unlock()
		started <- nil
		how := end(cmd.Wait())
		e.mu.Lock()
		e.how = how
		e.mu.Unlock()
		close(over)
	}()
	return over, <-started
}

// Kill ends the process if it runs. The channel is closed when it has been reaped, and nil if it was never
// started.
func (e *Enclave) Kill() (ended <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.process != nil {
		e.process.Kill() // an error says that it has ended already
	}
	return e.ended
}

// Wait implements driver.Enclave.
func (e *Enclave) Wait() error {
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

// Stop implements driver.Enclave: it kills the process and removes the sockets.
func (e *Enclave) Stop() error {
	if ended := e.Kill(); ended != nil {
		<-ended
	}
	if err := os.RemoveAll(e.Dir); err != nil {
		return fmt.Errorf("remove sockets of the enclave: %w", err)
	}
	return nil
}
