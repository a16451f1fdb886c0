// Sidecar is the container cloister-sidecar of a confidential pod: it supervises an Envoy, which listens
// on the workload's ports, and carries what Envoy accepts to the enclave. It sees ciphertext only.
//
//	sidecar serve          runs until SIGTERM
//	sidecar probe startup  exits 0 when Envoy answers; the container's startupProbe
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/sidecar/envoy"
	"cloister.dev/cloister/workload"
)

const usage = "usage: sidecar serve | sidecar probe startup"

func main() {
	switch strings.Join(os.Args[1:], " ") {
	case "serve":
		log := slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("component", "sidecar")
		if err := serve(log); err != nil {
			log.Error("the sidecar ends", "error", err)
			terminationMessage(err.Error())
			os.Exit(1)
		}
	case "probe startup":
		if err := probeStartup(envoy.AdminSocket(envoyDir(defaults().dir))); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	default:
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
}

func serve(log *slog.Logger) error {
	c := defaults()
	var err error
	if c.ports, err = parsePorts(os.Getenv(podenv.EnvPorts)); err != nil {
		return err
	}
	if c.egress, err = parseEgress(os.Getenv(podenv.EnvEgress)); err != nil {
		return err
	}
	c.awsRegion = os.Getenv(podenv.EnvAWSRegion)
	if err := raiseFileLimit(); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return run(ctx, log, c)
}

// parsePorts reads podenv.EnvPorts, a JSON array of port numbers as the webhook writes it.
func parsePorts(s string) ([]uint16, error) {
	var ports []uint16
	if err := json.Unmarshal([]byte(s), &ports); err != nil {
		return nil, fmt.Errorf("read %s, a JSON array of port numbers: %w", podenv.EnvPorts, err)
	}
	slices.Sort(ports)
	if len(slices.Compact(slices.Clone(ports))) != len(ports) || slices.Contains(ports, 0) {
		return nil, fmt.Errorf("read %s: %s has a port twice, or port 0", podenv.EnvPorts, s)
	}
	return ports, nil
}

// parseEgress reads podenv.EnvEgress, a JSON array of "host:port" as the webhook writes it, or nothing.
func parseEgress(s string) ([]string, error) {
	if s == "" {
		return nil, nil
	}
	var endpoints []string
	if err := json.Unmarshal([]byte(s), &endpoints); err != nil {
		return nil, fmt.Errorf("read %s, a JSON array of host:port: %w", podenv.EnvEgress, err)
	}
	for _, e := range endpoints {
		if _, _, err := workload.ParseEndpoint(e); err != nil {
			return nil, fmt.Errorf("read %s: %q: %w", podenv.EnvEgress, e, err)
		}
	}
	return endpoints, nil
}

// raiseFileLimit lets this process and Envoy have as many descriptors as the container may. (Go does the
// same at its start, but for itself alone.)
func raiseFileLimit() error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("read limit of open files: %w", err)
	}
	l.Cur = l.Max
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("raise limit of open files: %w", err)
	}
	return nil
}

// probeStartup asks once: the kubelet repeats.
func probeStartup(adminSocket string) error {
	ctx, cancel := context.WithTimeout(context.Background(), adminTimeout)
	defer cancel()
	if err := envoy.NewAdmin(adminSocket).Live(ctx); err != nil {
		return fmt.Errorf("Envoy has not started yet: %w", err)
	}
	return nil
}

// terminationMessage is shown by `kubectl describe`. The kubelet makes the file; there is none outside
// a pod.
func terminationMessage(s string) {
	f, err := os.OpenFile("/dev/termination-log", os.O_WRONLY|os.O_TRUNC, 0)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		slog.Warn("write termination message", "error", err)
		return
	}
	defer f.Close()
	fmt.Fprintln(f, s)
}
