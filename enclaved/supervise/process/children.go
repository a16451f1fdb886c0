package process

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Children keeps apart whom somebody waits for and who is left over: PID 1 inherits every process of
// its namespace whose parent has ended, and nobody else can reap it.
type Children struct {
	mu   sync.Mutex
	own  map[int]bool
	wake chan os.Signal
}

// NewChildren returns Children that do not reap anybody yet.
func NewChildren() *Children {
	return &Children{own: map[int]bool{}, wake: make(chan os.Signal, 1)}
}

// start starts cmd, which wait must wait for.
func (c *Children) start(cmd *exec.Cmd) error {
	// Held until the child is known: it may have ended by then.
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	c.own[cmd.Process.Pid] = true
	return nil
}

// wait waits for cmd to end and returns its status. It fails only when somebody else has reaped it.
func (c *Children) wait(cmd *exec.Cmd) (syscall.WaitStatus, error) {
	err := cmd.Wait()
	c.mu.Lock()
	delete(c.own, cmd.Process.Pid)
	c.mu.Unlock()
	select {
	case c.wake <- unix.SIGCHLD: // others may have ended behind this one
	default:
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, err
	}
	return cmd.ProcessState.Sys().(syscall.WaitStatus), nil
}

// Reap reaps those that are left over, for ever. Only PID 1 needs it.
func (c *Children) Reap() {
	signal.Notify(c.wake, unix.SIGCHLD)
	for range c.wake {
		for c.reapOne() {
		}
	}
}

// reapOne looks at one process that has ended and reaps it, unless somebody waits for it: that one will
// be gone soon, and then wait wakes us.
func (c *Children) reapOne() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil {
		return err == unix.EINTR
	}
	// si_pid, behind three ints and one of padding (include/uapi/asm-generic/siginfo.h, 64 bits).
	pid := int(*(*int32)(unsafe.Add(unsafe.Pointer(&info), 16)))
	if pid == 0 || c.own[pid] {
		return false
	}
	_, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
	return err == nil
}
