package attestation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"
)

// aws-nitro-root-g1.pem is the certificate that AWS publishes at
// https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip. Its SHA-256 (DER) is
// 641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b.
//
//go:embed aws-nitro-root-g1.pem
var awsRootPEM []byte

// AWSRoot returns the root certificate of Nitro enclaves in AWS's commercial regions, G1, valid
// until 2049. The caller must not change it.
var AWSRoot = sync.OnceValue(func() *x509.Certificate {
	root, err := ParseRoot(awsRootPEM)
	if err != nil {
		panic("attestation: built-in root: " + err.Error())
	}
	return root
})

// ParseRoot reads one root certificate in PEM form, for Options.Root.
func ParseRoot(data []byte) (*x509.Certificate, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("read root certificate: no PEM block of type CERTIFICATE")
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("read root certificate: more than one PEM block, but exactly one root is trusted")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read root certificate: %w", err)
	}
	return cert, nil
}

// chain is what a verified chain of certificates says.
type chain struct {
	key   *ecdsa.PublicKey // the leaf's
	valid period           // in which all of its certificates are valid
}

// verifyChain walks from the pinned root down to the leaf. bundle[0] is the sender's idea of the root and
// is ignored.
//
// The walk is linear, as AWS builds the bundle, so a document cannot make the verifier search; it
// ends at the first certificate that its predecessor did not sign.
func verifyChain(root *x509.Certificate, bundle [][]byte, leaf []byte, now time.Time) (chain, error) {
	ders := append(bundle[1:len(bundle):len(bundle)], leaf)
	key, err := checkCertificate(root, now)
	if err == nil {
		err = checkCA(root, len(ders)-1)
	}
	if err != nil {
		return chain{}, fmt.Errorf("root certificate: %w", err)
	}
	issuer, valid := root, validity(root)
	for i, der := range ders {
		name := "intermediate certificate " + strconv.Itoa(i+1)
		isLeaf := i == len(ders)-1
		if isLeaf {
			name = "leaf certificate"
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return chain{}, fmt.Errorf("%s: %w", name, err)
		}
		key, err = checkCertificate(cert, now)
		if err == nil {
			err = checkIssued(issuer, cert)
		}
		if err == nil && isLeaf {
			err = checkLeaf(cert)
		} else if err == nil {
			err = checkCA(cert, len(ders)-2-i)
		}
		if err != nil {
			return chain{}, fmt.Errorf("%s: %w", name, err)
		}
		issuer, valid = cert, valid.and(validity(cert))
	}
	return chain{key, valid}, nil
}

// checkCertificate holds every certificate of the chain to the same form: P-384, in its time,
// nothing in it that this package does not evaluate.
func checkCertificate(cert *x509.Certificate, now time.Time) (*ecdsa.PublicKey, error) {
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() {
		return nil, errors.New("its key is not on P-384")
	}
	if cert.SignatureAlgorithm != x509.ECDSAWithSHA384 {
		return nil, fmt.Errorf("it is signed with %s, not ECDSA-SHA384", cert.SignatureAlgorithm)
	}
	if now.Add(Skew).Before(cert.NotBefore) {
		return nil, fmt.Errorf("it is valid from %s, which is after %s", stamp(cert.NotBefore), stamp(now))
	}
	if now.Add(-Skew).After(cert.NotAfter) {
		return nil, fmt.Errorf("it expired at %s, which is before %s", stamp(cert.NotAfter), stamp(now))
	}
	if len(cert.UnhandledCriticalExtensions) > 0 {
		return nil, fmt.Errorf("it has the unknown critical extension %s", cert.UnhandledCriticalExtensions[0])
	}
	if hasNameConstraints(cert) {
		return nil, errors.New("it has name constraints, which attestation chains do not use")
	}
	return key, nil
}

func hasNameConstraints(cert *x509.Certificate) bool {
	const nameConstraints = "2.5.29.30" // RFC 5280, section 4.2.1.10
	for _, ext := range cert.Extensions {
		if ext.Id.String() == nameConstraints {
			return true
		}
	}
	return false
}

// checkCA checks that cert may issue certificates with the given number of intermediate
// certificates between it and the leaf (RFC 5280, section 4.2.1.9).
func checkCA(cert *x509.Certificate, below int) error {
	if cert.Version != 3 || !cert.BasicConstraintsValid || !cert.IsCA {
		return errors.New("it is not the certificate of a certificate authority")
	}
	if cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("its key usage lacks keyCertSign")
	}
	if (cert.MaxPathLen > 0 || cert.MaxPathLenZero) && below > cert.MaxPathLen {
		return fmt.Errorf("its path length is %d, but %d intermediate certificates follow", cert.MaxPathLen, below)
	}
	return nil
}

func checkLeaf(cert *x509.Certificate) error {
	if cert.IsCA {
		return errors.New("it is the certificate of a certificate authority")
	}
	if cert.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return errors.New("its key usage lacks digitalSignature")
	}
	return nil
}

// checkIssued checks that issuer's name and key are on cert.
func checkIssued(issuer, cert *x509.Certificate) error {
	if !bytes.Equal(cert.RawIssuer, issuer.RawSubject) {
		return fmt.Errorf("its issuer is %q, not %q", cert.Issuer, issuer.Subject)
	}
	if err := issuer.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		return fmt.Errorf("it is not signed by %q", issuer.Subject)
	}
	return nil
}

// stamp formats a time for messages.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
