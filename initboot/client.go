package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/status"

	"cloister.dev/cloister/initboot/console"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/podsock"
)

// pollFiles is how often mounts are looked at where inotify is used up: a kernel has 128 instances for all
// containers of one uid (fs.inotify.max_user_instances).
const pollFiles = 5 * time.Second

// consoleMemory is where the console's collector begins to spare no effort, in bytes: a run with all that the
// host may supply must not end it, whose container has 64 MiB.
const consoleMemory = 40 << 20

// runConsole is the console.
func runConsole(args []string) int {
	f := flags("console")
	grace := f.Duration("grace-period", 30*time.Second, "the pod's terminationGracePeriodSeconds")
	startup := f.Duration("startup-grace-period", 0, "the startup probe's terminationGracePeriodSeconds, if it has one")
	liveness := f.Duration("liveness-grace-period", 0, "the liveness probe's, if it has one")
	socket := f.String("socket", podsock.Path, "initboot's `socket`")
	listen := f.String("listen", fmt.Sprintf(":%d", podenv.ConsolePort), "`address` of the probe server")
	messages := f.String("termination-log", "/dev/termination-log", "`file` for the termination message")
	if !parse(f, args, os.Stderr) {
		return 2
	}
	debug.SetMemoryLimit(consoleMemory)
	stop, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT)
	defer cancel()

	code, last := func() (int, console.LastWord) {
		conn, err := podsock.Dial(*socket)
		if err != nil {
			return console.ExitLost, console.LastWord{Message: fmt.Sprintf("cannot use initboot's socket %s: %v", *socket, err)}
		}
		defer conn.Close()
		c := &console.Console{Pod: podsock.NewPodClient(conn), Stdout: os.Stdout, Stderr: os.Stderr, Grace: *grace, ProbeGrace: map[channel.ProbeKind]time.Duration{}}
		for kind, d := range map[channel.ProbeKind]time.Duration{channel.ProbeKind_PROBE_KIND_STARTUP: *startup, channel.ProbeKind_PROBE_KIND_LIVENESS: *liveness} {
			if d > 0 {
				c.ProbeGrace[kind] = d
			}
		}
		c.Supplied = console.Supplied{Environ: os.Environ(), Poll: pollFiles}
		if list := os.Getenv(podenv.EnvMounts); list != "" {
			if err := json.Unmarshal([]byte(list), &c.Supplied.Mounts); err != nil {
				return console.ExitLost, console.LastWord{Message: fmt.Sprintf("%s must be a JSON array of paths: %v", podenv.EnvMounts, err)}
			}
		}
		l, err := net.Listen("tcp", *listen)
		if err != nil {
			return console.ExitLost, console.LastWord{Message: fmt.Sprintf("cannot answer probes: %v", err)}
		}
		server := &http.Server{Handler: c.Handler(), ReadHeaderTimeout: 10 * time.Second}
		go server.Serve(l)
		defer server.Close()
		return c.Run(stop)
	}()
	if err := last.Write(*messages); err != nil {
		slog.Error("write termination message", "message", last.Message, "error", err)
	}
	return code
}

// probeTimeout bounds the answer of initboot itself, which has it at hand.
const probeTimeout = 5 * time.Second

// probeBoot is initboot's startupProbe.
func probeBoot(args []string) int {
	f := flags("probe boot")
	socket := f.String("socket", podsock.Path, "initboot's `socket`")
	if !parse(f, args, os.Stderr) {
		return 2
	}
	return report(os.Stdout, withPod(*socket, probeTimeout, func(ctx context.Context, pod podsock.PodClient) string {
		s, why := state(ctx, pod)
		if why != "" || s.GetPhase() >= podsock.EnclaveState_PHASE_BOOTED {
			return why
		}
		return "the enclave has not booted yet: " + doing(s)
	}))
}

// probeStartup is the console's startupProbe.
func probeStartup(args []string) int {
	f := flags("probe startup")
	socket := f.String("socket", podsock.Path, "initboot's `socket`")
	delay := f.Duration("initial-delay", 0, "time from the workload's start to its first startup probe")
	timeout := f.Duration("timeout", time.Second, "how long the workload's startup probe may take")
	if !parse(f, args, os.Stderr) {
		return 2
	}
	return report(os.Stdout, withPod(*socket, probeTimeout+*timeout, func(ctx context.Context, pod podsock.PodClient) string {
		s, why := state(ctx, pod)
		switch {
		case why != "":
			return why
		case s.GetRunningNs() == 0:
			return "the workload has not been started yet: " + doing(s)
		case time.Duration(s.GetRunningNs()) < *delay:
			return fmt.Sprintf("the workload was started less than %s ago", *delay)
		}
		answer, err := pod.Probe(ctx, &channel.ProbeRequest{
			Kind: channel.ProbeKind_PROBE_KIND_STARTUP, TimeoutMs: uint32(timeout.Milliseconds()),
		})
		switch {
		case err != nil:
			return "initboot did not run the probe: " + status.Convert(err).Message()
		case !answer.GetOk():
			return "the workload's startup probe failed: " + answer.GetMessage()
		}
		return ""
	}))
}

// withPod calls f with a client of initboot.
func withPod(socket string, timeout time.Duration, f func(context.Context, podsock.PodClient) string) string {
	conn, err := podsock.Dial(socket)
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return f(ctx, podsock.NewPodClient(conn))
}

// state returns the present state of the enclave, or why there is none.
func state(ctx context.Context, pod podsock.PodClient) (s *podsock.EnclaveState, why string) {
	stream, err := pod.Watch(ctx, &podsock.WatchRequest{})
	if err == nil {
		s, err = stream.Recv()
	}
	if err != nil {
		return nil, "initboot does not answer: " + status.Convert(err).Message()
	}
	return s, ""
}

// doing says what is under way and why the last try failed.
func doing(s *podsock.EnclaveState) string {
	step, lastError := s.GetProgress().GetStep(), s.GetProgress().GetError()
	if step == "" {
		step = "starting"
	}
	if lastError == "" {
		return step
	}
	return step + " (last error: " + lastError + ")"
}

// report prints why, if anything, as the one line that the kubelet puts into the pod's Event, and
// returns the exit code.
func report(w io.Writer, why string) int {
	if why == "" {
		return 0
	}
	fmt.Fprintln(w, strings.Join(strings.Fields(why), " "))
	return 1
}
