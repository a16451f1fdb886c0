// Package nsm talks to a Nitro Security Module: the device of a real enclave, or the software module
// that initboot serves to a development enclave. Which of the two is decided by the measured kernel
// command line; there is no fallback from one to the other.
//
// Requests and answers are those of AWS's nsm-api (src/api/mod.rs), in the encoding of hf/nsm.
package nsm

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/hf/nsm/request"
	"github.com/hf/nsm/response"
	"golang.org/x/sync/semaphore"
)

const (
	// MaxData is the largest user data or nonce in bytes. AWS's documents disagree about the limit
	// (512 or 1024 in attestation_process.md); the smaller one works everywhere.
	MaxData = 512
	// MaxPublicKey is the largest public key in bytes (nsm-api docs/attestation_process.md).
	MaxPublicKey = 1024

	maxRequest  = 0x1000 // bytes, linux drivers/misc/nsm.c
	maxResponse = 0x3000
)

// Provider is one Nitro Security Module. A Module calls it from one goroutine at a time.
type Provider interface {
	// Send hands over one request and waits for the answer, as long as ctx allows where a wait can be
	// interrupted.
	Send(ctx context.Context, req request.Request) (response.Response, error)
	Close() error
}

// Error is a request that the module refused.
type Error struct {
	Op   string             // the request, for example "ExtendPCR"
	Code response.ErrorCode // the module's name of the error, for example "ReadOnlyIndex"
}

func (e *Error) Error() string {
	return fmt.Sprintf("the security module refused %s: %s", e.Op, e.Code)
}

// Module serves requests one after the other, in the order in which they came: the device does not do
// more at a time. It is safe for concurrent use.
type Module struct {
	provider Provider
	turn     *semaphore.Weighted // serves its waiters first in, first out
	calls    atomic.Uint64
}

// New returns a module that owns p.
func New(p Provider) *Module {
	return &Module{provider: p, turn: semaphore.NewWeighted(1)}
}

// Close waits for the request that is under way and closes the provider. Requests that follow fail.
func (m *Module) Close() error {
	if err := m.turn.Acquire(context.Background(), 1); err != nil {
		return err
	}
	defer m.turn.Release(1)
	return m.provider.Close()
}

// Calls returns how many requests were sent, also those that failed.
func (m *Module) Calls() uint64 { return m.calls.Load() }

// send waits for its turn, as long as ctx allows, and for the answer.
func (m *Module) send(ctx context.Context, op string, req request.Request) (response.Response, error) {
	if err := m.turn.Acquire(ctx, 1); err != nil {
		return response.Response{}, fmt.Errorf("wait for the security module: %w", err)
	}
	defer m.turn.Release(1)
	m.calls.Add(1)
	res, err := m.provider.Send(ctx, req)
	if err != nil {
		return response.Response{}, fmt.Errorf("ask the security module for %s: %w", op, err)
	}
	if res.Error != "" && res.Error != response.ECSuccess {
		return response.Response{}, &Error{Op: op, Code: res.Error}
	}
	return res, nil
}

// errAnswer is an answer to another request than the one that was sent.
func errAnswer(op string) error {
	return fmt.Errorf("the security module answered %s with something else", op)
}

// Attest returns an attestation document (an untagged or tagged COSE_Sign1) of the locked registers
// with user data and nonce of at most MaxData bytes and a public key of at most MaxPublicKey bytes.
// Nil means absent, which is not the same as empty.
func (m *Module) Attest(ctx context.Context, userData, nonce, publicKey []byte) ([]byte, error) {
	const op = "Attestation"
	if len(userData) > MaxData || len(nonce) > MaxData || len(publicKey) > MaxPublicKey {
		return nil, &Error{Op: op, Code: response.ECInputTooLarge}
	}
	res, err := m.send(ctx, op, &request.Attestation{UserData: userData, Nonce: nonce, PublicKey: publicKey})
	if err != nil {
		return nil, err
	}
	if res.Attestation == nil || len(res.Attestation.Document) == 0 {
		return nil, errAnswer(op)
	}
	return res.Attestation.Document, nil
}

// ExtendPCR replaces a register's value with SHA384(value || data) and returns the new value, 48 bytes.
func (m *Module) ExtendPCR(ctx context.Context, index uint16, data []byte) ([]byte, error) {
	const op = "ExtendPCR"
	res, err := m.send(ctx, op, &request.ExtendPCR{Index: index, Data: data})
	if err != nil {
		return nil, err
	}
	if res.ExtendPCR == nil {
		return nil, errAnswer(op)
	}
	return res.ExtendPCR.Data, nil
}

// LockPCR makes a register immutable for the rest of the enclave's life. Only locked registers appear
// in documents.
func (m *Module) LockPCR(ctx context.Context, index uint16) error {
	const op = "LockPCR"
	res, err := m.send(ctx, op, &request.LockPCR{Index: index})
	if err != nil {
		return err
	}
	if res.LockPCR == nil {
		return errAnswer(op)
	}
	return nil
}

// DescribePCR returns a register's value, 48 bytes, and whether it is locked.
func (m *Module) DescribePCR(ctx context.Context, index uint16) (value []byte, locked bool, err error) {
	const op = "DescribePCR"
	res, err := m.send(ctx, op, &request.DescribePCR{Index: index})
	if err != nil {
		return nil, false, err
	}
	if res.DescribePCR == nil {
		return nil, false, errAnswer(op)
	}
	return res.DescribePCR.Data, res.DescribePCR.Lock, nil
}

// DescribeNSM returns the module's version, id and locked registers.
func (m *Module) DescribeNSM(ctx context.Context) (*response.DescribeNSM, error) {
	const op = "DescribeNSM"
	res, err := m.send(ctx, op, &request.DescribeNSM{})
	if err != nil {
		return nil, err
	}
	if res.DescribeNSM == nil {
		return nil, errAnswer(op)
	}
	return res.DescribeNSM, nil
}

// Random returns random bytes: as many as the module gives for one request, 256 on AWS's hardware.
func (m *Module) Random(ctx context.Context) ([]byte, error) {
	const op = "GetRandom"
	res, err := m.send(ctx, op, &request.GetRandom{})
	if err != nil {
		return nil, err
	}
	if res.GetRandom == nil || len(res.GetRandom.Random) == 0 {
		return nil, errAnswer(op)
	}
	return res.GetRandom.Random, nil
}

var errClosed = errors.New("the connection to the security module is closed")
