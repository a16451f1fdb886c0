//go:build !vsockemu

package main

import "cloister.dev/cloister/initboot/driver/nitro"

// transport is how the host and Nitro enclaves reach each other.
func transport() nitro.Transport { return nitro.Vsock{} }
