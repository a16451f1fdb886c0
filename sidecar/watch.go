package main

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/grpc"

	"cloister.dev/cloister/internal/podsock"
)

// retryPause is short: while initboot does not answer, no traffic flows.
const retryPause = 100 * time.Millisecond

// dialPod returns a client of initboot's socket, and what closes it.
func dialPod(socket string) (client podsock.PodClient, closeConn func() error) {
	conn, err := podsock.Dial(socket)
	if err != nil { // only for options that do not fit together
		panic(err)
	}
	return podsock.NewPodClient(conn), conn.Close
}

// watch calls apply with every state of the enclave that initboot reports, until ctx ends. When initboot
// cannot be asked its enclave is gone, or will be: apply gets an empty state, and watch tries again, for
// ever. It also does when apply fails, with the state as it is then.
func watch(ctx context.Context, log *slog.Logger, client podsock.PodClient, apply func(context.Context, *podsock.EnclaveState) error) {
	for ctx.Err() == nil {
		err, applied := watchOnce(ctx, client, apply)
		if ctx.Err() != nil {
			return
		}
		if applied != nil {
			log.Error("follow the enclave; trying again", "error", applied)
		} else {
			log.Warn("initboot does not answer; trying again", "error", err)
			apply(ctx, &podsock.EnclaveState{}) // closes only
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryPause):
		}
	}
}

// watchOnce returns why initboot cannot be asked, or why apply failed.
func watchOnce(ctx context.Context, client podsock.PodClient, apply func(context.Context, *podsock.EnclaveState) error) (err, applied error) {
	ctx, cancel := context.WithCancel(ctx) // ends the stream
	defer cancel()
	stream, err := client.Watch(ctx, &podsock.WatchRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return err, nil
	}
	for {
		state, err := stream.Recv()
		if err != nil {
			return err, nil
		}
		if err := apply(ctx, state); err != nil {
			return nil, err
		}
	}
}
