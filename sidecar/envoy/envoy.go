// Package envoy runs an Envoy as a child process and asks it for its state.
package envoy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// logFormat makes Envoy's log lines look like those of log/slog's JSON handler. %j is the message
// escaped for JSON (Envoy, "Command line options", --log-format).
const logFormat = `{"time":"%Y-%m-%dT%T.%f%z","level":"%l","msg":"%j","component":"envoy","logger":"%n"}`

// Config says how to run Envoy.
type Config struct {
	Binary         string    // path
	Dir            string    // on tmpfs; made with mode 0700; holds the bootstrap and the admin socket
	NodeID         string    // what Envoy calls itself to the xDS server
	XDSSocket      string    // unix socket of the xDS server
	Concurrency    int       // worker threads
	MaxConnections int64     // of clients, at once
	Log            io.Writer // takes JSON lines
}

// AdminSocket returns the path of the admin socket of an Envoy with that Config.Dir.
func AdminSocket(dir string) string { return filepath.Join(dir, "admin.sock") }

// Process is a running Envoy.
type Process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Start runs Envoy. It ends with the calling process, in whatever way that ends. Stop must be called.
func Start(c Config) (*Process, error) {
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	admin := AdminSocket(c.Dir)
	if err := os.Remove(admin); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	b, err := bootstrap(c, admin)
	if err != nil {
		return nil, err
	}
	file := filepath.Join(c.Dir, "bootstrap.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}

	cmd := exec.Command(c.Binary,
		"--config-path", file,
		"--disable-hot-restart",
		"--concurrency", strconv.Itoa(c.Concurrency),
		// How long a listener that was taken away keeps its connections. The relay closes them, with the
		// enclave; this is the time for slow clients to take what was sent before.
		"--drain-time-s", "10", "--drain-strategy", "immediate",
		"--log-level", "warning",
		"--log-format", logFormat,
	)
	cmd.Env = []string{} // nothing of the sidecar's
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	p := &Process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends (prctl(2)), so it must not end
		// before Envoy.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start envoy: %w", err)
	}
	return p, nil
}

// Done is closed when Envoy has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err returns how Envoy ended, as exec.Cmd.Wait does. It may be called after Done is closed.
func (p *Process) Err() error { return p.err }

// Stop asks Envoy to end, ends its process group after timeout, and returns when it has ended.
func (p *Process) Stop(timeout time.Duration) {
	if p.cmd.Process.Signal(syscall.SIGTERM) == nil {
		select {
		case <-p.done:
		case <-time.After(timeout):
		}
	}
	// The group outlives its leader if Envoy left children; an empty one is no error.
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.done
}
