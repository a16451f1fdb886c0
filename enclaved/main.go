// Enclaved is PID 1 of an enclave, the /init of its ramdisk: supervisor of the workload, its gateway to
// the world and keeper of its keys. Its only way in or out is vsock, and the first thing it does is to
// dial the host, which speaks the control channel from then on. When that ends, the enclave ends.
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"

	"cloister.dev/cloister/enclaved/plugin"
	"cloister.dev/cloister/enclaved/supervise"
	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/vsock"
)

// dialTimeout bounds the first connection: the host listens before it starts an enclave.
const dialTimeout = 20 * time.Second

func main() {
	process.Helper()
	plugin.Main()
	slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("component", "enclaved"))
	// net/http's client logs the first bytes of an answer that nobody asked for through this logger. They
	// are the workload's, and the host reads what is logged.
	log.SetOutput(io.Discard)
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "enclaved is the init of an enclave and runs nowhere else: initboot starts it")
		os.Exit(2)
	}
	if err := run(); err != nil {
		slog.Error("the enclave ends", "error", err)
		supervise.End(1)
	}
	slog.Info("the enclave ends with its control channel")
	supervise.End(0)
}

// run returns when the control channel has ended.
func run() error {
	system, err := supervise.Prepare()
	if err != nil {
		return err
	}
	children := process.NewChildren()
	go children.Reap()
	guest, err := vsock.NewGuest()
	if err != nil {
		return fmt.Errorf("open vsock: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	c, err := guest.Dial(ctx, channel.Port)
	if err != nil {
		return fmt.Errorf("dial the host's port %d: %w", channel.Port, err)
	}
	enclave := supervise.New(supervise.Config{
		Guest: guest, Children: children, Self: system.Self, Dir: system.Dir, Memory: system.Memory, Sealed: system.Sealed,
		OpenModule: func(dial func(context.Context) (net.Conn, error)) (nsm.Provider, error) {
			if system.Module == "dev" {
				return nsm.NewDevelopment(dial), nil
			}
			return nsm.OpenDevice()
		},
	})
	return channel.ServeEnclave(c, func(r grpc.ServiceRegistrar) { channel.RegisterEnclaveServer(r, enclave) })
}
