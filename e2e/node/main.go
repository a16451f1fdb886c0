// Node is what the end-to-end tests run on the cluster's node: the untrusted host, and clients inside
// the cluster's network.
//
//	node record DIR [SOCKET] stands between sidecar and enclave, prints all bytes at the end
//	node tamper DIR          stands between enclave and initboot, changes what the enclave gets
//	node handshakes ADDR     one TLS handshake every 50 ms, a line of JSON for each
//	node registry FLAGS      a registry that is slow or wrong
//	node load FLAGS          clients that never stop asking
//	node kms FLAGS           a KMS that decrypts for attested enclaves
//	node mutate FLAGS        somebody else's mutating webhook
//
// Every command prints one line when it is ready and runs until its standard input ends, so that
// none outlives its test.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "node:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	commands := map[string]func(context.Context, []string) error{
		"record": record, "tamper": tamper, "handshakes": handshakes, "registry": registry, "load": load, "kms": kms, "mutate": mutate,
	}
	if len(args) == 0 || commands[args[0]] == nil {
		return errors.New("want record, tamper, handshakes, registry, load, kms or mutate")
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return commands[args[0]](ctx, args[1:])
}
