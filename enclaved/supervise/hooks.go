package supervise

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

const (
	// leastGrace is what a preStop hook leaves to the workload after its stop signal (k8s.io/kubernetes,
	// pkg/kubelet/kuberuntime, minimumGracePeriodInSeconds).
	leastGrace = 2 * time.Second
	// hookGrace is how long a workload may take to end when its postStart hook has failed. Nobody has
	// told the pod's grace period then; this is what it is by default.
	hookGrace = 30 * time.Second
	// maxMessage is what the kubelet takes of a termination message, in bytes.
	maxMessage = 4096
)

var errEnded = errors.New("the workload has ended")

// afterStart runs the postStart hook and tells that the workload has been started. When the hook fails the
// workload is stopped, as the kubelet does.
func (e *Enclave) afterStart(p *process.Process, out *events) {
	if l := e.manifest.Lifecycle; l != nil && l.PostStart != nil {
		out.progress("running the postStart hook", "")
		ctx, cancel := e.whileRunning()
		defer cancel()
		err := runHook(ctx, l.PostStart, p)
		if e.hasEnded() {
			return
		}
		if err != nil {
			out.progress("running the postStart hook", err.Error())
			e.because(fmt.Sprintf("the postStart hook failed, so the workload was stopped: %v", err))
			e.stopWorkload(p, e.gateway, 0, hookGrace)
			return
		}
	}
	out.send(&channel.RunEvent{Event: &channel.RunEvent_Started{Started: &channel.Started{}}})
}

// startPreStop runs the preStop hook, once, for at most limit. The channel is closed when it has ended.
func (e *Enclave) startPreStop(p *process.Process, limit time.Duration) <-chan struct{} {
	done := make(chan struct{})
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.hasEnded() {
		close(done)
		return done
	}
	e.hooks.Go(func() {
		defer close(done)
		e.preStop.Do(func() {
			l := e.manifest.Lifecycle
			if l == nil || l.PreStop == nil {
				return
			}
			running, cancel := e.whileRunning()
			defer cancel()
			ctx, cancel := context.WithTimeoutCause(running, limit, fmt.Errorf("it did not end within %s", limit))
			defer cancel()
			if err := runHook(ctx, l.PreStop, p); err != nil && !e.hasEnded() {
				e.events.progress("running the preStop hook", err.Error())
			}
		})
	})
	return done
}

func (e *Enclave) hasEnded() bool {
	select {
	case <-e.ended:
		return true
	default:
		return false
	}
}

// whileRunning returns a context that ends with the workload.
func (e *Enclave) whileRunning() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() {
		select {
		case <-e.ended:
			cancel(errEnded)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// runHook does what the kubelet does (k8s.io/kubernetes, pkg/kubelet/lifecycle), inside. The error has no
// word of the workload's own.
func runHook(ctx context.Context, h *workload.Hook, p *process.Process) error {
	switch {
	case h.Exec != nil:
		// Not expanded, unlike a probe's command.
		return named("exec hook", runExec(ctx, h.Exec.Command, p))
	case h.HTTP != nil:
		return named("http hook", runHTTP(ctx, h.HTTP, "kube-lifecycle", false))
	default:
		t := time.NewTimer(time.Duration(h.Sleep) * time.Second)
		defer t.Stop()
		select {
		case <-t.C:
			return nil
		case <-ctx.Done():
			return named("sleep hook", context.Cause(ctx))
		}
	}
}

// takeTerminationMessage gives the workload a file for its termination message.
func (e *Enclave) takeTerminationMessage(spec *process.Spec) error {
	file := e.terminationFile()
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		return fmt.Errorf("make the file for the termination message: %w", err)
	}
	if err := os.Chmod(file, 0o666); err != nil { // whatever the umask
		return fmt.Errorf("open the termination message to every user: %w", err)
	}
	target := e.manifest.TerminationMessagePath
	if target == "" {
		target = workload.DefaultTerminationMessagePath
	}
	spec.Binds = append(spec.Binds, process.Bind{Source: file, Target: target})
	return nil
}

func (e *Enclave) terminationFile() string { return filepath.Join(e.cfg.Dir, "termination-log") }

// terminationMessage returns the end of what the workload left. Where its output does not go to the
// host, this does not either.
func (e *Enclave) terminationMessage() []byte {
	if e.manifest.Logs == workload.LogsOTLP {
		return nil
	}
	f, err := os.Open(e.terminationFile())
	if err != nil {
		return nil
	}
	defer f.Close()
	i, err := f.Stat()
	if err != nil {
		return nil
	}
	b := make([]byte, min(i.Size(), maxMessage))
	n, _ := f.ReadAt(b, i.Size()-int64(len(b)))
	return b[:n]
}
