// Package stream is what the tests of e2e/vm and their enclave's init have in common.
package stream

import (
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
)

// Ports of the init, and ReadyPort of its host.
const (
	EchoPort = 7001 + iota
	SourcePort
	SinkPort
	CountPort
	DialPort
	NSMPort
	EndPort
	ReadyPort
)

// Manifest stands for a workload manifest.
const Manifest = `{"of":"a test"}`

// Report is what the security module has answered.
type Report struct {
	Error        string
	ModuleID     string
	Digest       string
	MaxPCRs      uint16
	LockedBefore []uint16
	Random       []byte
	PCRs         [3][]byte
	Document     []byte
	PCR16        []byte
	PCR16Locked  bool
	ExtendLocked string
}

// chunk is the size of a write, in bytes.
const chunk = 128 << 10

// Source writes n random bytes and the SHA-256 of them.
func Source(w io.Writer, n int64) error {
	h := sha256.New()
	random := rand.NewChaCha8([32]byte{1})
	b := make([]byte, chunk)
	for n > 0 {
		part := b[:min(n, chunk)]
		random.Read(part)
		h.Write(part)
		if _, err := w.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
	}
	_, err := w.Write(h.Sum(nil))
	return err
}

// Check reads what Source writes, up to the end.
func Check(r io.Reader, n int64) error {
	h := sha256.New()
	if _, err := io.CopyN(h, r, n); err != nil {
		return err
	}
	rest, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	if string(rest) != string(h.Sum(nil)) {
		return fmt.Errorf("the checksum differs, or %d bytes follow", len(rest))
	}
	return nil
}

// Sink reads up to the end and answers with the SHA-256.
func Sink(c net.Conn) error {
	h := sha256.New()
	if _, err := io.Copy(h, c); err != nil {
		return err
	}
	_, err := c.Write(h.Sum(nil))
	return err
}

// CloseWrite ends the sending direction.
func CloseWrite(c net.Conn) error { return c.(interface{ CloseWrite() error }).CloseWrite() }
