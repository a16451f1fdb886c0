package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"cloister.dev/cloister/attestation"
)

// handshake is one line of output of handshakes.
type handshake struct {
	Start time.Time     `json:"start"`
	Took  time.Duration `json:"took"`            // nanoseconds
	Bytes int           `json:"bytes"`           // received from the server
	Key   string        `json:"key,omitempty"`   // SHA-256 of the server's public key, if the handshake succeeded
	Error string        `json:"error,omitempty"` // otherwise
}

// handshakes makes a TLS handshake with args[0] every 50 ms, without waiting for the one before, and
// prints a handshake for each when it is over. Its ready line ends with the key of the first one.
func handshakes(ctx context.Context, args []string) error {
	first := shake(args[0])
	if first.Error != "" {
		return errors.New(first.Error)
	}
	fmt.Println("ready", first.Key)
	out := json.NewEncoder(os.Stdout)
	var mu sync.Mutex
	var pending sync.WaitGroup
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			pending.Wait()
			return nil
		case <-tick.C:
			pending.Go(func() {
				h := shake(args[0])
				mu.Lock()
				defer mu.Unlock()
				out.Encode(h)
			})
		}
	}
}

// shake makes one handshake, which may take 5 seconds.
func shake(addr string) handshake {
	h := handshake{Start: time.Now()}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := func() error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", addr)
		if err != nil {
			return err
		}
		defer c.Close()
		// Whose key it is, the tests compare; whether to trust it is not the question here.
		s := tls.Client(&counted{c, &h.Bytes}, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1", attestation.ALPN}})
		if err := s.HandshakeContext(ctx); err != nil {
			return err
		}
		key := sha256.Sum256(s.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo)
		h.Key = hex.EncodeToString(key[:])
		return nil
	}()
	if err != nil {
		h.Error = err.Error()
	}
	h.Took = time.Since(h.Start)
	return h
}

// counted counts the bytes that are read from a connection.
type counted struct {
	net.Conn
	n *int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	*c.n += n
	return n, err
}
