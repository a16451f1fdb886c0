package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exit statuses of a command that could not be started, as container runtimes report them.
const (
	StatusFailed        = 125 // what the workload needs around it could not be made
	StatusNotExecutable = 126
	StatusNotFound      = 127
)

// StartError says why a command could not be started.
type StartError struct {
	Status  int    `json:"status"` // one of the statuses above
	Message string `json:"message"`
}

func (e *StartError) Error() string { return e.Message }

// Process is the workload.
type Process struct {
	spec     *Spec
	self     string
	children *Children
	cmd      *exec.Cmd
	// Its namespaces stay open: commands beside it enter them.
	pid, mnt, ipc, uts *os.File
}

// Start runs the workload of spec as PID 1 of new pid, mount, ipc and uts namespaces, with stdout and
// stderr as they are and /dev/null as its input. Self is the path of this program. It returns when the
// workload's own program runs, and a *StartError when it does not. Wait must be called afterwards.
func Start(self string, children *Children, spec *Spec, stdout, stderr *os.File) (*Process, error) {
	p := &Process{spec: spec, self: self, children: children}
	p.cmd = command(self, "workload")
	p.cmd.Stdout, p.cmd.Stderr = stdout, stderr
	p.cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	if spec.NoNetwork {
		p.cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	}
	err := p.run(p.cmd, spec, children.start, func() error {
		for name, f := range map[string]**os.File{"pid": &p.pid, "mnt": &p.mnt, "ipc": &p.ipc, "uts": &p.uts} {
			var err error
			if *f, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", p.cmd.Process.Pid, name)); err != nil {
				return fmt.Errorf("open the workload's %s namespace: %w", name, err)
			}
		}
		return nil
	})
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// command is this program as a helper.
func command(self, role string) *exec.Cmd {
	return &exec.Cmd{
		Path: self, Args: []string{"enclaved", role}, Env: []string{}, Dir: "/",
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
}

// run starts a helper, calls started while the helper waits, hands over spec and waits until the helper
// has become its command. When it fails, nothing is left to wait for.
func (p *Process) run(cmd *exec.Cmd, spec *Spec, start func(*exec.Cmd) error, started func() error) error {
	failed := func(err error) error { return &StartError{StatusFailed, err.Error()} }
	specR, specW, err := os.Pipe()
	if err != nil {
		return failed(err)
	}
	defer specW.Close()
	statusR, statusW, err := os.Pipe()
	if err != nil {
		specR.Close()
		return failed(err)
	}
	defer statusR.Close()
	cmd.ExtraFiles = append([]*os.File{specR, statusW}, cmd.ExtraFiles...)
	err = start(cmd)
	specR.Close()
	statusW.Close()
	if err != nil {
		return failed(fmt.Errorf("start a process: %w", err))
	}
	err = started()
	if err == nil {
		err = json.NewEncoder(specW).Encode(spec)
	}
	specW.Close() // a helper without a whole spec ends
	status, readErr := io.ReadAll(statusR)
	switch {
	case err != nil:
		err = failed(err)
	case readErr != nil:
		err = failed(readErr)
	case len(status) > 0:
		e := &StartError{}
		if err = json.Unmarshal(status, e); err == nil {
			err = e
		}
	}
	if err != nil {
		cmd.Process.Kill()
		p.children.wait(cmd)
	}
	return err
}

func (p *Process) close() {
	for _, f := range []*os.File{p.pid, p.mnt, p.ipc, p.uts} {
		f.Close() // nil is an error only
	}
}

// Wait waits for the workload's end and returns its exit status, 128+n when signal n ended it. Then
// nothing of its pid namespace is left.
func (p *Process) Wait() (status int, err error) {
	ws, err := p.children.wait(p.cmd)
	if err != nil {
		return 0, fmt.Errorf("wait for the workload: %w", err)
	}
	return exitStatus(ws), nil
}

// Close releases the namespaces; no command can be run beside the workload any more.
func (p *Process) Close() { p.close() }

// Stop asks the workload to end, with the signal that its image names.
func (p *Process) Stop() error { return p.Signal(p.spec.StopSignal) }

// Kill ends the workload at once.
func (p *Process) Kill() error { return p.Signal(unix.SIGKILL) }

// ProbeArgs expands a probe's command; see Spec.ProbeArgs.
func (p *Process) ProbeArgs(command []string) []string { return p.spec.ProbeArgs(command) }

// Signal sends a signal to the workload's first process. One that has ended is no error.
func (p *Process) Signal(sig unix.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %s to the workload: %w", unix.SignalName(sig), err)
	}
	return nil
}

func exitStatus(ws syscall.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// Exec runs args beside the workload, in its namespaces and as its user, without input and output. It
// returns the exit status, 128+n when signal n ended it, a *StartError when it could not be started, and
// ctx's cause when ctx ended first: then the command and its process group have been killed.
func (p *Process) Exec(ctx context.Context, args []string) (status int, err error) {
	spec := *p.spec
	spec.Args = args
	cmd := command(p.self, "exec")
	cmd.ExtraFiles = []*os.File{p.mnt, p.ipc, p.uts}
	done := make(chan struct{})
	defer close(done)
	err = p.run(cmd, &spec, p.startBeside, func() error {
		go func() {
			select {
			case <-ctx.Done():
				unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
			case <-done:
			}
		}()
		return nil
	})
	if err == nil {
		var ws syscall.WaitStatus
		ws, err = p.children.wait(cmd)
		status = exitStatus(ws)
	}
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	return status, err
}

// startBeside starts cmd in the workload's pid namespace, which only a new process can enter.
func (p *Process) startBeside(cmd *exec.Cmd) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread, whose children are born elsewhere now, ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(p.pid.Fd()), unix.CLONE_NEWPID); err != nil {
			result <- fmt.Errorf("enter the workload's pid namespace: %w", err)
			return
		}
		result <- p.children.start(cmd)
	}()
	return <-result
}
