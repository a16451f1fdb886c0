//go:build devnsm

package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"cloister.dev/cloister/eif"
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
		module := nsmdev.NewModule(signer, map[uint][]byte{0: m.PCR0, 1: m.PCR1, 2: m.PCR2, 8: m.PCR8})
		return func(c net.Conn) { nsmdev.Serve(c, module.Answer) } // its end is the enclave's own
	}, nil
}
