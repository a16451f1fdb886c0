package signed

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

var errKind = errors.New("the key must be ECDSA on P-256 or P-384, or Ed25519: make one with `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256`")

// Types of PEM blocks: PKCS #8 (RFC 5958) and SubjectPublicKeyInfo (RFC 5280), as RFC 7468 names them.
const (
	privateBlock = "PRIVATE KEY"
	publicBlock  = "PUBLIC KEY"
)

// ParsePrivateKey reads the one key of a PEM file, in PKCS #8 and not encrypted, of a kind that Sign takes.
func ParsePrivateKey(file []byte) (crypto.Signer, error) {
	der, err := block(file, privateBlock, "a private key in PKCS #8 without a password; `openssl pkcs8 -topk8 -nocrypt -in KEY` converts others")
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("read private key: %w", err)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errKind
	}
	if err := checkKind(signer.Public()); err != nil {
		return nil, err
	}
	return signer, nil
}

// ParsePublicKey reads the one key of a PEM file, a SubjectPublicKeyInfo, of a kind that Parse takes.
func ParsePublicKey(file []byte) (crypto.PublicKey, error) {
	der, err := block(file, publicBlock, "a public key; `openssl pkey -pubout -in KEY` prints that of a private one")
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, fmt.Errorf("read public key: %w", err)
	}
	if err := checkKind(key); err != nil {
		return nil, err
	}
	return key, nil
}

// block returns the content of the one PEM block of a file. wanted says what it should be.
func block(file []byte, kind, wanted string) ([]byte, error) {
	b, rest := pem.Decode(file)
	switch {
	case b == nil:
		return nil, fmt.Errorf("the file holds no PEM block: it must be %s", wanted)
	case b.Type != kind:
		return nil, fmt.Errorf("the file holds a PEM block %q, not %q: it must be %s", b.Type, kind, wanted)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, errors.New("the file holds more than one key: which one counts is not guessed")
	}
	return b.Bytes, nil
}
