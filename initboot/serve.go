package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"cloister.dev/cloister/initboot/boot"
	"cloister.dev/cloister/initboot/content"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/nitro"
	"cloister.dev/cloister/initboot/driver/process"
	"cloister.dev/cloister/initboot/driver/qemu"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/registry"
	"cloister.dev/cloister/workload"
)

// serve boots the enclave and serves the pod socket until SIGTERM. It never gives up: what does not
// work is tried again, and probe boot says why.
func serve(args []string) int {
	f := flags("serve")
	driverName := f.String("driver", "process", "how the enclave is launched: `process`, qemu or nitro")
	qemuDir := f.String("qemu", "/qemu", "`folder` of QEMU, which is called run, and its firmware; driver qemu only")
	image := f.String("eif", "/base.eif", "enclave image `file`")
	runDir := f.String("run-dir", podenv.RunDir, "`folder` that the pod's containers of Cloister share")
	cacheDir := f.String("cache-dir", podenv.CacheDir, "`folder` of the image cache")
	keyDir := f.String("dev-keys", "/etc/cloister/dev", "`folder` of the development NSM's root.pem and key.pem, in builds that have one")
	plain := f.String("plain-http-registries", "", "`registries`, HOST or HOST:PORT with commas between, that may be reached without TLS")
	if !parse(f, args, os.Stderr) {
		return 2
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	go func() {
		<-signals
		cancel(errors.New("initboot was told to shut down"))
	}()

	cfg := boot.Config{EIF: *image, Console: os.Stderr, Log: slog.Default()}
	cfg.Driver, cfg.Invalid = newDriver(*driverName, *runDir, *qemuDir, cfg.Log)
	if err := configure(&cfg, registry.Client{PlainHTTP: registry.ParseList(*plain)}, *cacheDir, *keyDir); err != nil {
		cfg.Invalid = errors.Join(cfg.Invalid, err)
	}
	machine := boot.New(cfg)
	server := grpc.NewServer(grpc.MaxRecvMsgSize(channel.MaxMessage))
	podsock.RegisterPodServer(server, machine)

	go servePod(ctx, server, filepath.Join(*runDir, filepath.Base(podsock.Path)))
	machine.Serve(ctx)
	// The enclave is gone; console and sidecar are told before the socket goes.
	stop := time.AfterFunc(farewell, server.Stop)
	defer stop.Stop()
	server.GracefulStop()
	slog.Info("shut down")
	return 0
}

// newDriver returns the driver of a name.
func newDriver(name, runDir, qemuDir string, log *slog.Logger) (driver.Driver, error) {
	switch name {
	case "process":
		return process.Driver{Dir: runDir}, nil
	case "qemu":
		return qemu.Driver{Dir: runDir, Program: filepath.Join(qemuDir, "run"), Firmware: filepath.Join(qemuDir, "firmware")}, nil
	case "nitro":
		cpus, err := strconv.Atoi(os.Getenv(podenv.EnvCPUs))
		if err != nil || cpus < 1 {
			return nil, fmt.Errorf("%s is %q: it must be the enclave's number of vCPUs, a decimal number", podenv.EnvCPUs, os.Getenv(podenv.EnvCPUs))
		}
		return nitro.Driver{CPUs: cpus, Transport: transport(), Log: log}, nil
	default:
		return nil, fmt.Errorf("there is no driver %q: --driver must be process, qemu or nitro", name)
	}
}

// configure reads what the webhook put into the environment.
func configure(cfg *boot.Config, registries registry.Client, cacheDir, keyDir string) (err error) {
	cfg.Manifest = []byte(os.Getenv(podenv.EnvManifest))
	if len(cfg.Manifest) == 0 {
		return errors.New(podenv.EnvManifest + " is not set: it must be the workload manifest")
	}
	if cfg.Workload, err = workload.Parse(cfg.Manifest); err != nil {
		return fmt.Errorf("%s: %w", podenv.EnvManifest, err)
	}
	cfg.Memory, err = strconv.ParseInt(os.Getenv(podenv.EnvMemory), 10, 64)
	if err != nil || cfg.Memory <= 0 {
		return fmt.Errorf("%s is %q: it must be the enclave's memory in bytes, a decimal number", podenv.EnvMemory, os.Getenv(podenv.EnvMemory))
	}
	var plugins []string
	if list := os.Getenv(podenv.EnvPluginImages); list != "" {
		if err := json.Unmarshal([]byte(list), &plugins); err != nil {
			return fmt.Errorf("%s must be a JSON array of image references: %w", podenv.EnvPluginImages, err)
		}
	}
	if cfg.Content, err = content.New(os.Getenv(podenv.EnvImage), plugins, registries, podenv.PullSecretsDir, cacheDir, cfg.Memory, cfg.Log); err != nil {
		return fmt.Errorf("%s or %s: %w", podenv.EnvImage, podenv.EnvPluginImages, err)
	}
	if name := os.Getenv(podenv.EnvPodName); name != "" {
		cfg.Pod = &channel.Pod{Name: name, Namespace: os.Getenv(podenv.EnvPodNamespace), Uid: os.Getenv(podenv.EnvPodUID)}
	}
	cfg.NSM, err = devNSM(keyDir)
	return err
}

// farewell is how long calls may take to end once the enclave has.
const farewell = time.Second

// servePod serves the pod socket until the server is stopped.
func servePod(ctx context.Context, server *grpc.Server, socket string) {
	for {
		l, err := listenPod(socket)
		if err == nil {
			if err = server.Serve(l); err == nil || errors.Is(err, grpc.ErrServerStopped) {
				return
			}
		}
		slog.Error("serve pod socket", "path", socket, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// listenPod listens on the pod socket, in place of one that a former initboot left.
func listenPod(socket string) (net.Listener, error) {
	if err := os.Remove(socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	// Console and sidecar have uids of their own; only they mount the folder.
	if err := os.Chmod(socket, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}
