package main

import (
	"context"
	"log/slog"
	"time"

	"cloister.dev/cloister/internal/podsock"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
)

// retryPause is short: while initboot does not answer, no traffic flows.
const retryPause = 100 * time.Millisecond

// watch calls apply with every state of the enclave that initboot reports on its socket, until ctx
// ends. When initboot cannot be asked its enclave is gone, or will be: apply gets an empty state, and
// watch tries again, for ever.
func watch(ctx context.Context, log *slog.Logger, socket string, apply func(*podsock.EnclaveState)) {
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: retryPause, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}),
	)
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
