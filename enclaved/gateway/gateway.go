// Package gateway is the only way in: it ends TLS inside the enclave and forwards to the workload.
package gateway

import (
	"context"
	"crypto/tls"
	"net"

	"cloister.dev/cloister/workload"
)

// Vault is what the gateway needs of the vault.
type Vault interface {
	// Certificate returns the attested certificate without waiting.
	Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// FreshDocument returns an attestation document with nonce, or vault.ErrBusy.
	FreshDocument(ctx context.Context, nonce []byte) ([]byte, error)
}

// Config is what a gateway serves and with what.
type Config struct {
	Manifest *workload.Manifest
	// Listen returns a listener for a port of the manifest whose connections come from this enclave's
	// own sidecar.
	Listen func(port uint32) (net.Listener, error)
	Vault  Vault
}

// Gateway serves the ports of one manifest.
type Gateway struct{ config Config }

// New returns a gateway that does not listen yet.
func New(config Config) (*Gateway, error) { return &Gateway{config: config}, nil }

// Start listens on every port of the manifest.
func (g *Gateway) Start() error { return nil }

// Drain asks clients to leave without failing a request.
func (g *Gateway) Drain() {}

// Close ends the gateway: gracefully as long as ctx allows, then hard.
func (g *Gateway) Close(ctx context.Context) error { return nil }
