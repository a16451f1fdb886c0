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

// watch calls apply with every state of the enclave that initboot reports on its socket, until ctx
// ends. When initboot cannot be asked its enclave is gone, or will be: apply gets an empty state, and
// watch tries again, for ever.
func watch(ctx context.Context, log *slog.Logger, socket string, apply func(*podsock.EnclaveState)) {
	conn, err := podsock.Dial(socket)
	if err != nil { // only for options that do not fit together
		panic(err)
	}
	defer conn.Close()
	client := podsock.NewPodClient(conn)
	for ctx.Err() == nil {
		err := watchOnce(ctx, client, apply)
		if ctx.Err() != nil {
			return
		}
		log.Warn("initboot does not answer; trying again", "error", err)
		apply(&podsock.EnclaveState{})
		select {
		case <-ctx.Done():
		case <-time.After(retryPause):
		}
	}
}

func watchOnce(ctx context.Context, client podsock.PodClient, apply func(*podsock.EnclaveState)) error {
	stream, err := client.Watch(ctx, &podsock.WatchRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	for {
		state, err := stream.Recv()
		if err != nil {
			return err
		}
		apply(state)
	}
}
