package vsock

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

// SecretSize is the length of a Secret in bytes.
const SecretSize = 32

// Secret is what both ends of every vsock stream of one enclave know, and nobody else on the node. It
// keeps strangers out; it says nothing about trust, which attestation alone gives.
type Secret []byte

const (
	nonceSize = 16
	proofSize = sha256.Size
)

// ErrProof is returned when the other end does not know the secret.
var ErrProof = errors.New("the other end of the stream does not know the enclave's secret")

// NewSecret returns a random secret.
func NewSecret() Secret {
	s := make(Secret, SecretSize)
	rand.Read(s)
	return s
}

// proof is HMAC-SHA256(secret, role || port || nonce of the dialler || nonce of the acceptor). The role
// keeps an answer from being reflected, the port from being used for another service.
func (s Secret) proof(role byte, port uint32, dialler, acceptor []byte) []byte {
	h := hmac.New(sha256.New, s)
	h.Write([]byte{role})
	binary.Write(h, binary.BigEndian, port)
	h.Write(dialler)
	h.Write(acceptor)
	return h.Sum(nil)
}

// Dial connects with dial and proves the secret both ways: the dialler sends a nonce of 16 bytes, reads
// the acceptor's nonce and proof of 32 bytes, and sends its own proof.
func (s Secret) Dial(ctx context.Context, port uint32, dial func(context.Context, uint32) (net.Conn, error)) (net.Conn, error) {
	c, err := dial(ctx, port)
	if err != nil {
		return nil, err
	}
	if err := s.proveDialler(c, port); err != nil {
		c.Close()
		return nil, fmt.Errorf("prove secret to port %d: %w", port, err)
	}
	return c, nil
}

func (s Secret) proveDialler(c net.Conn, port uint32) error {
	if err := c.SetDeadline(time.Now().Add(preambleTimeout)); err != nil {
		return err
	}
	mine := make([]byte, nonceSize)
	rand.Read(mine)
	if _, err := c.Write(mine); err != nil {
		return err
	}
	answer := make([]byte, nonceSize+proofSize)
	if _, err := io.ReadFull(c, answer); err != nil {
		return err
	}
	theirs, got := answer[:nonceSize], answer[nonceSize:]
	if !hmac.Equal(got, s.proof('a', port, mine, theirs)) {
		return ErrProof
	}
	if _, err := c.Write(s.proof('d', port, mine, theirs)); err != nil {
		return err
	}
	return c.SetDeadline(time.Time{})
}

func (s Secret) proveAcceptor(c net.Conn, port uint32) error {
	if err := c.SetDeadline(time.Now().Add(preambleTimeout)); err != nil {
		return err
	}
	theirs := make([]byte, nonceSize)
	if _, err := io.ReadFull(c, theirs); err != nil {
		return err
	}
	mine := make([]byte, nonceSize)
	rand.Read(mine)
	if _, err := c.Write(append(mine[:nonceSize:nonceSize], s.proof('a', port, theirs, mine)...)); err != nil {
		return err
	}
	got := make([]byte, proofSize)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !hmac.Equal(got, s.proof('d', port, theirs, mine)) {
		return ErrProof
	}
	return c.SetDeadline(time.Time{})
}

// maxUnproven is how many connections of one listener may be without a proof at a time. Whoever fills
// them delays others for preambleTimeout at most, instead of taking all descriptors.
const maxUnproven = 256

// Listen returns a listener that accepts from l, and whose Accept returns only connections whose other
// end has proven the secret for port. Closing it closes l.
func (s Secret) Listen(l net.Listener, port uint32) net.Listener {
	p := newPortListener(l.Addr(), func() { l.Close() })
	unproven := make(chan struct{}, maxUnproven)
	go func() {
		defer p.Close()
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				select {
				case <-p.done:
					return
				case <-time.After(10 * time.Millisecond): // out of descriptors: the next try may find one
				}
				continue
			}
			unproven <- struct{}{}
			go func() {
				err := s.proveAcceptor(c, port)
				if err != nil {
					c.Close()
				}
				<-unproven
				if err == nil {
					p.deliver(c)
				}
			}()
		}
	}()
	return p
}
