// Package nsmtest is a security module for tests: registers and signed documents as a Nitro Security
// Module has them, behind the stream of the development module.
package nsmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/hex"
	"maps"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/hf/nsm/response"

	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

const (
	registers = 32
	firstFree = 16 // lower ones are locked at boot
	maxSize   = 0x1000
)

// Module is the software module.
type Module struct {
	// Before, if set before the first Dial, is called with the name of each request and may block. An
	// error code that it returns is the answer.
	Before func(op string) response.ErrorCode
	// Age is how old documents are when they are made.
	Age time.Duration

	signer *nsmdev.Signer
	mu     sync.Mutex
	pcrs   map[uint][]byte
	locked map[uint]bool
}

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
	m := &Module{signer: signer, pcrs: map[uint][]byte{}, locked: map[uint]bool{}}
	for i := range uint(registers) {
		m.pcrs[i] = make([]byte, workload.PCRSize)
		m.locked[i] = i < firstFree
	}
	for i := range uint(3) {
		m.pcrs[i] = bytes.Repeat([]byte{byte(i + 1)}, workload.PCRSize)
	}
	return m
}

// Root verifies the module's documents.
func (m *Module) Root() *x509.Certificate { return m.signer.Root() }

// Measurements is the set that pins the module's PCR0 and a workload.
func (m *Module) Measurements(canonicalManifest []byte) workload.MeasurementSet {
	m.mu.Lock()
	defer m.mu.Unlock()
	return workload.MeasurementSet{{
		Label: "test",
		PCR0:  hex.EncodeToString(m.pcrs[0]),
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
		for {
			req, err := nsm.ReadMessage(server, maxSize)
			if err != nil {
				return
			}
			res, err := cbor.Marshal(m.Answer(req))
			if err != nil {
				panic(err)
			}
			if nsm.WriteMessage(server, res) != nil {
				return
			}
		}
	}()
	return client, nil
}

// Answer returns what the module answers to one CBOR request, before it is encoded.
func (m *Module) Answer(req []byte) any {
	op, args := "", struct {
		Index     uint   `cbor:"index"`
		Data      []byte `cbor:"data"`
		UserData  []byte `cbor:"user_data"`
		Nonce     []byte `cbor:"nonce"`
		PublicKey []byte `cbor:"public_key"`
	}{}
	if cbor.Unmarshal(req, &op) != nil {
		var call map[string]cbor.RawMessage
		if cbor.Unmarshal(req, &call) != nil || len(call) != 1 {
			return fail(response.ECInvalidOperation)
		}
		for name, raw := range call {
			op = name
			if cbor.Unmarshal(raw, &args) != nil {
				return fail(response.ECInvalidArgument)
			}
		}
	}
	if m.Before != nil {
		if code := m.Before(op); code != "" {
			return fail(code)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch op {
	case "GetRandom":
		random := make([]byte, 256)
		rand.Read(random)
		return answer(op, map[string]any{"random": random})
	case "DescribeNSM":
		return answer(op, map[string]any{
			"version_major": 1, "version_minor": 0, "version_patch": 0,
			"module_id": "i-0-enc0", "max_pcrs": registers, "locked_pcrs": []int{}, "digest": "SHA384",
		})
	case "Attestation":
		return m.attest(args.UserData, args.Nonce, args.PublicKey)
	}
	value, ok := m.pcrs[args.Index]
	switch {
	case !ok:
		return fail("InvalidIndex")
	case op == "DescribePCR":
		return answer(op, map[string]any{"lock": m.locked[args.Index], "data": value})
	case m.locked[args.Index]:
		return fail(response.ECReadOnlyIndex)
	case op == "ExtendPCR":
		sum := sha512.Sum384(append(bytes.Clone(value), args.Data...))
		m.pcrs[args.Index] = sum[:]
		return answer(op, map[string]any{"data": sum[:]})
	case op == "LockPCR":
		m.locked[args.Index] = true
		return op
	}
	return fail(response.ECInvalidOperation)
}

func (m *Module) attest(userData, nonce, publicKey []byte) any {
	pcrs := maps.Clone(m.pcrs)
	for i := range pcrs {
		if !m.locked[i] {
			delete(pcrs, i)
		}
	}
	document, err := m.signer.Sign(nsmdev.Document{
		ModuleID: "i-0-enc0", Timestamp: time.Now().Add(-m.Age), PCRs: pcrs,
		UserData: userData, Nonce: nonce, PublicKey: publicKey,
	})
	if err != nil {
		return fail(response.ECInternalError)
	}
	return answer("Attestation", map[string]any{"document": document})
}

func answer(op string, fields map[string]any) any { return map[string]any{op: fields} }

func fail(code response.ErrorCode) any { return map[string]any{"Error": code} }
