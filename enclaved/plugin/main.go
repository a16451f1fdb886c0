package plugin

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

// Environment of a plugin's process.
const (
	// EnvSocket is the path of the unix socket on which the plugin listens.
	EnvSocket = "CLOISTER_PLUGIN_SOCKET"
	// EnvConfig is the JSON object of the plugin's configuration.
	EnvConfig = "CLOISTER_PLUGIN_CONFIG"
	// EnvProxy is the path of a unix socket that speaks HTTP CONNECT (RFC 9110, section 9.3.6) to what the
	// plugin may reach. It is not set where that is nothing.
	EnvProxy = "CLOISTER_PLUGIN_PROXY"
)

// Main does nothing in a program that was not started as "PROGRAM NAME" of a built-in plugin that is a
// process. In one that was it never returns.
func Main() {
	if len(os.Args) != 2 {
		return
	}
	for _, b := range order {
		if b.process != nil && b.name == os.Args[1] {
			slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)))
			if err := b.serve(); err != nil {
				slog.Error("the plugin ends", "error", err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
}

// serve runs the plugin until SIGTERM.
func (b builtin) serve() error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	s, err := b.process(json.RawMessage(os.Getenv(EnvConfig)), throughProxy(os.Getenv(EnvProxy)))
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", os.Getenv(EnvSocket))
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	server, status := grpc.NewServer(), health.NewServer()
	status.SetServingStatus("", healthv1.HealthCheckResponse_NOT_SERVING)
	healthv1.RegisterHealthServer(server, status)
	authv3.RegisterAuthorizationServer(server, s)
	go s.Run(ctx, func(serving bool) {
		if serving {
			status.SetServingStatus("", healthv1.HealthCheckResponse_SERVING)
		} else {
			status.SetServingStatus("", healthv1.HealthCheckResponse_NOT_SERVING)
		}
	})
	context.AfterFunc(ctx, server.GracefulStop)
	return server.Serve(l)
}
