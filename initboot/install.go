package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"cloister.dev/cloister/manifests/seccomp"
)

// installSeccomp writes the seccomp profile for AF_VSOCK to the node and then waits for SIGTERM: it is the
// container of a DaemonSet.
func installSeccomp(args []string) int {
	f := flags("install seccomp")
	folder := f.String("folder", "/var/lib/kubelet/seccomp/profiles", "`folder` of the node's seccomp profiles")
	if !parse(f, args, os.Stderr) {
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := writeProfile(*folder); err != nil {
		slog.Error("the seccomp profile is not installed", "error", err.Error())
		return 1
	}
	slog.Info("seccomp profile installed", "file", filepath.Join(*folder, seccomp.Name))
	<-ctx.Done()
	return 0
}

// writeProfile replaces the profile at once: the kubelet may be starting a container with it.
func writeProfile(folder string) error {
	file, err := os.CreateTemp(folder, "."+seccomp.Name)
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	defer os.Remove(file.Name())
	_, err = file.Write(seccomp.Profile)
	if err == nil {
		err = file.Chmod(0o644)
	}
	if err == nil {
		err = file.Sync()
	}
	if failed := file.Close(); err == nil {
		err = failed
	}
	if err != nil {
		return fmt.Errorf("write profile: %w", err)
	}
	return os.Rename(file.Name(), filepath.Join(folder, seccomp.Name))
}
