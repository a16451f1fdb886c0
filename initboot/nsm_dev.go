//go:build devnsm

package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/initboot/nsm"
	"cloister.dev/cloister/internal/nsmdev"
)

// devNSM returns what makes development NSMs, whose root key is in dir.
func devNSM(dir string) (func(*eif.Measurements) func(net.Conn), error) {
	root, err := os.ReadFile(filepath.Join(dir, "root.pem"))
	if err != nil {
		return nil, fmt.Errorf("read development root: %w", err)
	}
	key, err := os.ReadFile(filepath.Join(dir, "key.pem"))
	if err != nil {
		return nil, fmt.Errorf("read development root: %w", err)
	}
	signer, err := nsmdev.New(root, key)
	if err != nil {
		return nil, err
	}
	return func(m *eif.Measurements) func(net.Conn) {
		n := nsm.New(signer, m)
		return func(c net.Conn) { n.Serve(c) } // its end is the enclave's own
	}, nil
}
