//go:build vsockemu

package main

import (
	"os"

	"cloister.dev/cloister/initboot/driver/nitro"
	"cloister.dev/cloister/internal/vsockemu"
)

// transport is the vsock of a node that has none.
func transport() nitro.Transport { return vsockemu.Node(os.Getenv(vsockemu.EnvNode)) }
