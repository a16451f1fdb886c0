// Package driver is what initboot asks of every way to launch an enclave.
package driver

import (
	"context"
	"net"
	"os"
)

// Driver launches enclaves, one after the other.
type Driver interface {
	// Create prepares the enclave of a generation without starting it, so that host ports can be bound
	// first. The caller must Stop what it returns.
	Create(generation uint64) (Enclave, error)
}

// Enclave is one enclave, from before its start to after its end.
type Enclave interface {
	// Listen binds a vsock port of the host for this enclave alone. The caller closes the listener.
	Listen(port uint32) (net.Listener, error)

	// Start boots the image and returns when its /init is running. It is called at most once. Ctx bounds
	// Start only, not the life of the enclave.
	Start(ctx context.Context, image Image) error

	// Target is where ports of the enclave are dialled, for vsock.Dial: unix://PATH or vsock://CID.
	Target() string

	// Wait blocks until a started enclave has ended, and says how it did in a sentence. It may be called
	// more than once.
	Wait() error

	// Stop ends the enclave if it runs, waits for its end and frees everything that Create and Start
	// took. It may be called more than once.
	Stop() error
}

// Preparer is an Enclave that takes its share of the node, and the image into it, before it is started. Host ports
// are bound between the two: where they are the node's, they are not held while pages are zeroed.
type Preparer interface {
	// Prepare is called at most once, before Start and with the same image.
	Prepare(image Image) error
}

// Image is what an enclave is booted from.
type Image struct {
	// EIF is the path of the enclave image file.
	EIF string
	// Memory is the size of the enclave's memory in bytes.
	Memory int64
	// Console takes what the enclave's kernel and PID 1 print.
	Console *os.File
}
