// Package podsock is the protocol between initboot and the other containers of its pod, the console and
// the sidecar: the gRPC service Pod on a unix socket.
package podsock

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"cloister.dev/cloister/internal/podenv"
)

// Path is where initboot listens, in a volume that only containers of ours mount.
const Path = podenv.RunDir + "/pod.sock"

// Dial returns a connection to the socket at path, which need not be there yet: calls fail until it is, or
// wait for it with grpc.WaitForReady. The caller closes it.
func Dial(path string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithIdleTimeout(0),
		grpc.WithConnectParams(grpc.ConnectParams{
			// Short pauses: while initboot does not answer, no traffic flows.
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
	)
}
