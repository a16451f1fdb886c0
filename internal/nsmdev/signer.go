// Package nsmdev is the development NSM, a Nitro Security Module in software, and the signer of its
// attestation documents. These verify only against a root of its own, never against AWS's, and prove
// nothing about a real enclave.
//
// In production code only the files of initboot with the build tag devnsm import it, so that a
// release cannot sign.
package nsmdev

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"cloister.dev/cloister/internal/cbor"
)

// Lifetimes, after AWS's: a long-lived root, intermediates of about a day, leaves of 3 hours.
const (
	rootLife         = 10 * 365 * 24 * time.Hour
	intermediateLife = 24 * time.Hour
	leafLife         = 3 * time.Hour

	// renewBefore is the life that certificates have left at least when a document is signed, so
	// that the document can still be verified for some time.
	renewBefore = 30 * time.Minute
)

// Document is what a document attests. Absent optional fields are nil; 0 bytes are not absent.
type Document struct {
	ModuleID  string
	Timestamp time.Time
	PCRs      map[uint][]byte // locked registers by index, 48 bytes each

	PublicKey []byte
	UserData  []byte
	Nonce     []byte
}

// authority is a certificate and its key.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// Signer signs documents below one root. It makes the certificates between root and document itself
// and renews them. It is safe for concurrent use.
type Signer struct {
	root authority

	mu                 sync.Mutex
	intermediate, leaf authority
}

// NewRoot makes a root certificate, valid for ten years from now, and its key, both in PEM form.
func NewRoot(now time.Time) (certPEM, keyPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("create development root: %w", err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "cloister development root, not a real enclave"},
		NotBefore:             now,
		NotAfter:              now.Add(rootLife),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	cert, err := issue(template, authority{template, key}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("create development root: %w", err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("create development root: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}

// New returns a signer below the root that NewRoot made.
func New(certPEM, keyPEM []byte) (*Signer, error) {
	certBlock, _ := pem.Decode(certPEM)
	keyBlock, _ := pem.Decode(keyPEM)
	if certBlock == nil || keyBlock == nil {
		return nil, errors.New("read development root: certificate or key is not in PEM form")
	}
	cert, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read development root: %w", err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read development root: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P384() {
		return nil, errors.New("read development root: the key is not on P-384")
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("read development root: the key is not that of the certificate")
	}
	return &Signer{root: authority{cert, key}}, nil
}

// Root returns the root certificate, for attestation.Options.Root.
func (s *Signer) Root() *x509.Certificate { return s.root.cert }

// Sign returns a signed document: an untagged COSE_Sign1 (RFC 9052) with ES384 over the CBOR map
// that AWS describes in nsm-api docs/attestation_process.md.
func (s *Signer) Sign(d Document) ([]byte, error) {
	intermediate, leaf, err := s.certificates(d.ModuleID, d.Timestamp)
	if err != nil {
		return nil, fmt.Errorf("sign attestation document: %w", err)
	}
	payload := cbor.AppendMap(nil, 9)
	payload = cbor.AppendText(cbor.AppendText(payload, "module_id"), d.ModuleID)
	payload = cbor.AppendText(cbor.AppendText(payload, "digest"), "SHA384")
	payload = cbor.AppendUint(cbor.AppendText(payload, "timestamp"), uint64(d.Timestamp.UnixMilli()))
	payload = cbor.AppendMap(cbor.AppendText(payload, "pcrs"), len(d.PCRs))
	for _, index := range slices.Sorted(maps.Keys(d.PCRs)) {
		payload = cbor.AppendBytes(cbor.AppendUint(payload, uint64(index)), d.PCRs[index])
	}
	payload = cbor.AppendBytes(cbor.AppendText(payload, "certificate"), leaf.cert.Raw)
	payload = cbor.AppendArray(cbor.AppendText(payload, "cabundle"), 2)
	payload = cbor.AppendBytes(payload, s.root.cert.Raw)
	payload = cbor.AppendBytes(payload, intermediate.cert.Raw)
	payload = cbor.AppendOptionalBytes(cbor.AppendText(payload, "public_key"), d.PublicKey)
	payload = cbor.AppendOptionalBytes(cbor.AppendText(payload, "user_data"), d.UserData)
	payload = cbor.AppendOptionalBytes(cbor.AppendText(payload, "nonce"), d.Nonce)

	doc, err := SignPayload(leaf.key, payload)
	if err != nil {
		return nil, fmt.Errorf("sign attestation document: %w", err)
	}
	return doc, nil
}

// SignPayload wraps payload in a COSE_Sign1 with ES384. The key must be on P-384.
func SignPayload(key *ecdsa.PrivateKey, payload []byte) ([]byte, error) {
	const algorithm, es384, half = 1, -35, 48
	protected := cbor.AppendInt(cbor.AppendUint(cbor.AppendMap(nil, 1), algorithm), es384)

	signed := cbor.AppendText(cbor.AppendArray(nil, 4), "Signature1")
	signed = cbor.AppendBytes(signed, protected)
	signed = cbor.AppendBytes(signed, nil)
	signed = cbor.AppendBytes(signed, payload)
	digest := sha512.Sum384(signed)
	r, sv, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return nil, err
	}
	signature := make([]byte, 2*half)
	r.FillBytes(signature[:half])
	sv.FillBytes(signature[half:])

	doc := cbor.AppendArray(nil, 4)
	doc = cbor.AppendBytes(doc, protected)
	doc = cbor.AppendMap(doc, 0)
	doc = cbor.AppendBytes(doc, payload)
	return cbor.AppendBytes(doc, signature), nil
}

// certificates returns intermediate and leaf that are valid at the time at, renewed if needed.
func (s *Signer) certificates(moduleID string, at time.Time) (intermediate, leaf authority, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !fits(s.intermediate.cert, at) {
		template := &x509.Certificate{
			Subject:               pkix.Name{CommonName: "cloister development zone"},
			KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			BasicConstraintsValid: true,
			IsCA:                  true,
			MaxPathLenZero:        true,
		}
		if s.intermediate, err = newAuthority(template, s.root, at, intermediateLife); err != nil {
			return authority{}, authority{}, err
		}
		s.leaf = authority{}
	}
	if !fits(s.leaf.cert, at) || s.leaf.cert.Subject.CommonName != moduleID {
		template := &x509.Certificate{
			Subject:               pkix.Name{CommonName: moduleID},
			KeyUsage:              x509.KeyUsageDigitalSignature,
			BasicConstraintsValid: true,
		}
		if s.leaf, err = newAuthority(template, s.intermediate, at, leafLife); err != nil {
			return authority{}, authority{}, err
		}
	}
	return s.intermediate, s.leaf, nil
}

// fits reports whether a document of the time at can be signed below cert.
func fits(cert *x509.Certificate, at time.Time) bool {
	return cert != nil && !at.Before(cert.NotBefore) && at.Add(renewBefore).Before(cert.NotAfter)
}

// newAuthority issues a certificate for a new key, valid from at (cut to the second) for life.
func newAuthority(template *x509.Certificate, issuer authority, at time.Time, life time.Duration) (authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	template.NotBefore, template.NotAfter = at.Truncate(time.Second), at.Add(life)
	cert, err := issue(template, issuer, key)
	return authority{cert, key}, err
}

func issue(template *x509.Certificate, issuer authority, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	template.SignatureAlgorithm = x509.ECDSAWithSHA384
	der, err := x509.CreateCertificate(rand.Reader, template, issuer.cert, key.Public(), issuer.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}
