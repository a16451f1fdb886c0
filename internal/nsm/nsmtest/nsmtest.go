// Package nsmtest is the development module as tests need it: they see each request, refuse some, and
// choose the age of documents.
package nsmtest

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/hex"
	"io"
	"net"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/hf/nsm/response"

	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

// Module is the software module.
type Module struct {
	*nsmdev.Module
	// Before, if set before the first Dial, is called with the name of each request and may block. An
	// error code that it returns is the answer.
	Before func(op string) response.ErrorCode
	// Age is how old documents are when they are made.
	Age time.Duration

	signer *nsmdev.Signer
}

// pcr0 is PCR0 of every module.
var pcr0 = bytes.Repeat([]byte{1}, workload.PCRSize)

// New returns a module whose PCR0, 1 and 2 are not zero, below a new root.
func New(t testing.TB) *Module {
	t.Helper()
	cert, key, err := nsmdev.NewRoot(time.Now().Add(-24 * time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := nsmdev.New(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return boot(signer)
}

// Next returns the module of the next enclave of the same EIF, below the same root.
func (m *Module) Next() *Module { return boot(m.signer) }

func boot(signer *nsmdev.Signer) *Module {
	m := &Module{signer: signer, Module: nsmdev.NewModule(signer, map[uint][]byte{
		0: pcr0, 1: bytes.Repeat([]byte{2}, workload.PCRSize), 2: bytes.Repeat([]byte{3}, workload.PCRSize),
	})}
	m.Now = func() time.Time { return time.Now().Add(-m.Age) }
	return m
}

// Root verifies the module's documents.
func (m *Module) Root() *x509.Certificate { return m.signer.Root() }

// Measurements is the set that pins the module's PCR0 and a workload.
func (m *Module) Measurements(canonicalManifest []byte) workload.MeasurementSet {
	return workload.MeasurementSet{{
		Label: "test",
		PCR0:  hex.EncodeToString(pcr0),
		PCR16: hex.EncodeToString(workload.PCR16(canonicalManifest)),
	}}
}

// Open returns a client of the module that is closed with the test.
func (m *Module) Open(t testing.TB) *nsm.Module {
	t.Helper()
	c := nsm.New(nsm.NewDevelopment(m.Dial))
	t.Cleanup(func() { c.Close() })
	return c
}

// Dial is for nsm.NewDevelopment.
func (m *Module) Dial(context.Context) (net.Conn, error) {
	client, server := net.Pipe()
	go func() {
		defer server.Close()
		m.Serve(server)
	}()
	return client, nil
}

// Serve answers the requests on rw until it ends.
func (m *Module) Serve(rw io.ReadWriter) {
	nsmdev.Serve(rw, func(request []byte) []byte {
		if m.Before != nil {
			if code := m.Before(name(request)); code != "" {
				answer, err := cbor.Marshal(map[string]response.ErrorCode{"Error": code})
				if err != nil {
					panic(err)
				}
				return answer
			}
		}
		return m.Answer(request)
	})
}

// name returns the name of a request: it is a text, or a map from its name to its fields.
func name(request []byte) string {
	var op string
	if cbor.Unmarshal(request, &op) == nil {
		return op
	}
	var call map[string]cbor.RawMessage
	if cbor.Unmarshal(request, &call) == nil {
		for op := range call {
			return op
		}
	}
	return ""
}
