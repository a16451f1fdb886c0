package eif

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	_ "crypto/sha256" // for crypto.SHA256
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"math/big"
	"slices"
	"time"

	"cloister.dev/cloister/internal/cbor"
)

// maxSignature is the largest signature section in bytes (aws-nitro-enclaves-image-format,
// src/defs/mod.rs).
const maxSignature = 32768

// algorithm is a COSE signature algorithm for signed EIFs (RFC 9053, section 2.1).
type algorithm struct {
	id    int64
	curve elliptic.Curve
	hash  crypto.Hash
}

var algorithms = []algorithm{
	{-7, elliptic.P256(), crypto.SHA256},
	{-35, elliptic.P384(), crypto.SHA384},
	{-36, elliptic.P521(), crypto.SHA512},
}

// half returns the bytes of each of the two numbers of a signature.
func (a algorithm) half() int { return (a.curve.Params().BitSize + 7) / 8 }

// digest hashes what a COSE_Sign1 signs (RFC 9052, section 4.4).
func (a algorithm) digest(protected, payload []byte) []byte {
	b := cbor.AppendText(cbor.AppendArray(nil, 4), "Signature1")
	b = cbor.AppendBytes(b, protected)
	b = cbor.AppendBytes(b, nil)
	b = cbor.AppendBytes(b, payload)
	h := a.hash.New()
	h.Write(b)
	return h.Sum(nil)
}

// Signer signs EIFs.
type Signer struct {
	pem  []byte // as it is written
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	alg  algorithm
}

// NewSigner returns a signer with a certificate and its key, on the curve P-256, P-384 or P-521 and
// not encrypted, both in PEM form (RFC 7468; the key as PKCS #8 or as "EC PRIVATE KEY", RFC 5915). The
// first certificate counts; all of certPEM goes into the EIF, as with AWS's builder.
func NewSigner(certPEM, keyPEM []byte) (*Signer, error) {
	cert, err := ParseCertificate(certPEM)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("read signing key: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("the signing key is not that of the signing certificate")
	}
	for _, alg := range algorithms {
		if alg.curve == key.Curve {
			return &Signer{certPEM, cert, key, alg}, nil
		}
	}
	return nil, fmt.Errorf("the signing key is on the curve %s: only P-256, P-384 and P-521 can sign an EIF", key.Curve.Params().Name)
}

// Certificate returns the signer's certificate.
func (s *Signer) Certificate() *x509.Certificate { return s.cert }

// ParseCertificate reads the first certificate of a PEM file.
func ParseCertificate(certPEM []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("the signing certificate must be a certificate in PEM form")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read signing certificate: %w", err)
	}
	return cert, nil
}

// parseKey reads the first private key of a PEM file.
func parseKey(keyPEM []byte) (*ecdsa.PrivateKey, error) {
	for {
		var block *pem.Block
		if block, keyPEM = pem.Decode(keyPEM); block == nil {
			return nil, errors.New("the file has no unencrypted private key in PEM form")
		}
		switch block.Type {
		case "EC PRIVATE KEY":
			if block.Headers["DEK-Info"] != "" {
				return nil, errors.New("the key is encrypted")
			}
			return x509.ParseECPrivateKey(block.Bytes)
		case "PRIVATE KEY":
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			if key, ok := key.(*ecdsa.PrivateKey); ok {
				return key, nil
			}
			return nil, errors.New("the key is not an elliptic curve key")
		}
	}
}

// CheckValidity reports an error if a certificate is not valid at the given time.
func CheckValidity(cert *x509.Certificate, at time.Time) error {
	if at.Before(cert.NotBefore) || at.After(cert.NotAfter) {
		return fmt.Errorf("the signing certificate is valid from %s to %s, not at %s: no enclave starts with it",
			cert.NotBefore.UTC().Format(time.RFC3339), cert.NotAfter.UTC().Format(time.RFC3339), at.UTC().Format(time.RFC3339))
	}
	return nil
}

// pcr8 measures a certificate.
func pcr8(cert *x509.Certificate) []byte {
	sum := sha512.Sum384(cert.Raw)
	return register(sum[:])
}

// sign returns a signature section, as verifySignature reads it. The same key signs the same PCR0 with
// the same bytes (RFC 6979).
func (s *Signer) sign(pcr0 []byte) ([]byte, error) {
	payload := cbor.AppendMap(nil, 2)
	payload = cbor.AppendUint(cbor.AppendText(payload, fieldIndex), 0)
	payload = appendByteArray(cbor.AppendText(payload, fieldValue), pcr0)
	protected := cbor.AppendInt(cbor.AppendInt(cbor.AppendMap(nil, 1), headerAlgorithm), s.alg.id)
	der, err := s.key.Sign(nil, s.alg.digest(protected, payload), s.alg.hash)
	if err != nil {
		return nil, fmt.Errorf("sign PCR0: %w", err)
	}
	var numbers struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &numbers); err != nil {
		return nil, fmt.Errorf("sign PCR0: %w", err)
	}
	signature := make([]byte, 2*s.alg.half())
	numbers.R.FillBytes(signature[:s.alg.half()])
	numbers.S.FillBytes(signature[s.alg.half():])

	sign1 := cbor.AppendBytes(cbor.AppendArray(nil, 4), protected)
	sign1 = cbor.AppendBytes(cbor.AppendMap(sign1, 0), payload)
	sign1 = cbor.AppendBytes(sign1, signature)
	section := cbor.AppendMap(cbor.AppendArray(nil, 1), 2)
	section = appendByteArray(cbor.AppendText(section, fieldCertificate), s.pem)
	section = appendByteArray(cbor.AppendText(section, fieldSignature), sign1)
	if len(section) > maxSignature {
		return nil, fmt.Errorf("the signature section has %d bytes, more than %d: the certificate's file must be smaller", len(section), maxSignature)
	}
	return section, nil
}

// Names in a signature section and in its signed payload, and the COSE header of the algorithm
// (RFC 9052, section 3.1).
const (
	fieldCertificate = "signing_certificate"
	fieldSignature   = "signature"
	fieldIndex       = "register_index"
	fieldValue       = "register_value"
	headerAlgorithm  = 1
)

// verifySignature reads a signature section, checks that its first entry signs pcr0 and returns the
// entry's certificate. As in AWS's loader, other entries do not count.
//
// The section is a CBOR array of maps {"signing_certificate", "signature"}, both as arrays of
// integers: a certificate in PEM form and an untagged COSE_Sign1 whose payload is a map
// {"register_index": 0, "register_value": PCR0 as an array of integers}.
func verifySignature(section, pcr0 []byte) (*x509.Certificate, error) {
	var certPEM, sign1 []byte
	dec := cbor.NewDecoder(section)
	entries := 0
	err := dec.Array(func(i int) error {
		entries++
		if i > 0 {
			return dec.Skip()
		}
		return readFields(dec, map[string]func() error{
			fieldCertificate: func() (err error) { certPEM, err = readByteArray(dec); return err },
			fieldSignature:   func() (err error) { sign1, err = readByteArray(dec); return err },
		})
	})
	if err == nil && entries == 0 {
		err = errors.New("the section has no entry")
	}
	if err == nil {
		err = dec.End()
	}
	if err != nil {
		return nil, fmt.Errorf("read signature section: %w", err)
	}
	cert, err := ParseCertificate(certPEM)
	if err != nil {
		return nil, err
	}
	payload, err := openSign1(sign1, cert)
	if err != nil {
		return nil, err
	}
	if err := checkSigned(payload, pcr0); err != nil {
		return nil, err
	}
	return cert, nil
}

// openSign1 checks a COSE_Sign1 (RFC 9052, section 4.2) by the key of cert and returns its payload.
func openSign1(sign1 []byte, cert *x509.Certificate) ([]byte, error) {
	var protected, payload, signature []byte
	dec := cbor.NewDecoder(sign1)
	elements := 0
	err := dec.Array(func(i int) (err error) {
		elements++
		switch i {
		case 0:
			protected, err = dec.Bytes()
		case 1:
			err = dec.Skip() // unprotected header: carries nothing that is used
		case 2:
			payload, err = dec.Bytes()
		case 3:
			signature, err = dec.Bytes()
		default:
			err = errors.New("more than 4 elements")
		}
		return err
	})
	if err == nil && elements != 4 {
		err = fmt.Errorf("%d elements, not 4", elements)
	}
	if err == nil {
		err = dec.End()
	}
	if err != nil {
		return nil, fmt.Errorf("read COSE_Sign1: %w", err)
	}
	alg, err := readAlgorithm(protected)
	if err != nil {
		return nil, fmt.Errorf("read COSE_Sign1: %w", err)
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != alg.curve {
		return nil, errors.New("the signing certificate's key does not fit the signature's algorithm")
	}
	half := alg.half()
	if len(signature) != 2*half {
		return nil, fmt.Errorf("the signature has %d bytes, not %d", len(signature), 2*half)
	}
	r, s := new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:])
	if !ecdsa.Verify(key, alg.digest(protected, payload), r, s) {
		return nil, errors.New("the signature is not that of the signing certificate")
	}
	return payload, nil
}

// readAlgorithm reads a protected header, which holds the algorithm and nothing else.
func readAlgorithm(protected []byte) (algorithm, error) {
	var out algorithm
	dec := cbor.NewDecoder(protected)
	err := dec.Map(func() error {
		key, err := dec.Int()
		if err != nil {
			return err
		}
		if key != headerAlgorithm || out.curve != nil {
			return fmt.Errorf("unexpected header %d", key)
		}
		id, err := dec.Int()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(algorithms, func(a algorithm) bool { return a.id == id })
		if i < 0 {
			return fmt.Errorf("algorithm %d is none of ES256 (-7), ES384 (-35) and ES512 (-36)", id)
		}
		out = algorithms[i]
		return nil
	})
	if err == nil && out.curve == nil {
		err = errors.New("no algorithm")
	}
	if err == nil {
		err = dec.End()
	}
	return out, err
}

// checkSigned checks that payload names pcr0.
func checkSigned(payload, pcr0 []byte) error {
	var index uint64
	var value []byte
	dec := cbor.NewDecoder(payload)
	err := readFields(dec, map[string]func() error{
		fieldIndex: func() (err error) { index, err = dec.Uint(); return err },
		fieldValue: func() (err error) { value, err = readByteArray(dec); return err },
	})
	if err == nil {
		err = dec.End()
	}
	if err != nil {
		return fmt.Errorf("read signed registers: %w", err)
	}
	if index != 0 {
		return fmt.Errorf("the signature is over PCR%d, not PCR0", index)
	}
	if string(value) != string(pcr0) {
		return fmt.Errorf("the signature is over PCR0 %x, but the EIF has %x", value, pcr0)
	}
	return nil
}

// readFields reads a map that has exactly the given text keys.
func readFields(dec *cbor.Decoder, fields map[string]func() error) error {
	seen := map[string]bool{}
	err := dec.Map(func() error {
		key, err := dec.Text()
		if err != nil {
			return err
		}
		read, ok := fields[key]
		if !ok || seen[key] {
			return fmt.Errorf("unknown or repeated field %q", key)
		}
		seen[key] = true
		if err := read(); err != nil {
			return fmt.Errorf("field %q: %w", key, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for key := range fields {
		if !seen[key] {
			return fmt.Errorf("field %q is missing", key)
		}
	}
	return nil
}

// readByteArray reads bytes that serde encodes as an array of integers.
func readByteArray(dec *cbor.Decoder) ([]byte, error) {
	var out []byte
	err := dec.Array(func(int) error {
		v, err := dec.Uint()
		if err == nil && v > math.MaxUint8 {
			err = fmt.Errorf("%d is no byte", v)
		}
		out = append(out, byte(v))
		return err
	})
	return out, err
}

func appendByteArray(b, v []byte) []byte {
	b = cbor.AppendArray(b, len(v))
	for _, x := range v {
		b = cbor.AppendUint(b, uint64(x))
	}
	return b
}
