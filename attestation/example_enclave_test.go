package attestation_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log"
	"strings"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

// enclave stands in the examples for an enclave: a development signer in the place of a Nitro Security
// Module.
type enclave struct {
	signer *nsmdev.Signer
	key    *ecdsa.PrivateKey
}

func startEnclave() *enclave {
	certificate, rootKey, err := nsmdev.NewRoot(time.Now().Add(-time.Hour))
	if err != nil {
		log.Fatal(err)
	}
	signer, err := nsmdev.New(certificate, rootKey)
	if err != nil {
		log.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		log.Fatal(err)
	}
	return &enclave{signer, key}
}

// document is what the module answers.
func (e *enclave) document(userData, nonce, publicKey []byte) []byte {
	document, err := e.signer.Sign(nsmdev.Document{
		ModuleID:  "i-0123456789abcdef0-enc0123456789abcdef",
		Timestamp: time.Now(),
		PCRs:      map[uint][]byte{0: []byte(strings.Repeat("\x0a", 48)), 16: []byte(strings.Repeat("\x0b", 48))},
		UserData:  userData, Nonce: nonce, PublicKey: publicKey,
	})
	if err != nil {
		log.Fatal(err)
	}
	return document
}

// certificate is the attested certificate for one use.
func (e *enclave) certificate(userData string) tls.Certificate {
	publicKey, err := x509.MarshalPKIXPublicKey(e.key.Public())
	if err != nil {
		log.Fatal(err)
	}
	der, err := attestation.NewCertificate(e.key, e.document([]byte(userData), nil, publicKey), time.Now().Add(-time.Minute), time.Now().Add(time.Hour))
	if err != nil {
		log.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: e.key}
}

// root verifies its documents. For a real enclave it is left out of attestation.Options, and the built-in
// AWS root is used.
func (e *enclave) root() *x509.Certificate { return e.signer.Root() }

// measurements is what a program reads from a file, with workload.ParseMeasurements.
var measurements = workload.MeasurementSet{{
	Label: "1.4.0",
	PCR0:  strings.Repeat("0a", 48),
	PCR16: strings.Repeat("0b", 48),
}}
