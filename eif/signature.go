package eif

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math"
	"math/big"

	"cloister.dev/cloister/internal/cbor"
)

// maxSignature is the largest signature section in bytes (aws-nitro-enclaves-image-format,
// src/defs/mod.rs).
const maxSignature = 32768

// algorithm is a COSE signature algorithm for signed EIFs (RFC 9053, section 2.1).
type algorithm struct {
	curve elliptic.Curve
	sum   func([]byte) []byte
}

var algorithms = map[int64]algorithm{
	-7:  {elliptic.P256(), func(b []byte) []byte { s := sha256.Sum256(b); return s[:] }},
	-35: {elliptic.P384(), func(b []byte) []byte { s := sha512.Sum384(b); return s[:] }},
	-36: {elliptic.P521(), func(b []byte) []byte { s := sha512.Sum512(b); return s[:] }},
}

// verifySignature reads a signature section, checks that its first entry signs pcr0 and returns
// PCR8, which measures the entry's certificate. As in AWS's loader, other entries do not count.
//
// The section is a CBOR array of maps {"signing_certificate", "signature"}, both as arrays of
// integers: a certificate in PEM form and an untagged COSE_Sign1 whose payload is a map
// {"register_index": 0, "register_value": PCR0 as an array of integers}.
func verifySignature(section, pcr0 []byte) (pcr8 []byte, err error) {
	var certPEM, sign1 []byte
	dec := cbor.NewDecoder(section)
	entries := 0
	err = dec.Array(func(i int) error {
		entries++
		if i > 0 {
			return dec.Skip()
		}
		return readFields(dec, map[string]func() error{
			"signing_certificate": func() (err error) { certPEM, err = readByteArray(dec); return err },
			"signature":           func() (err error) { sign1, err = readByteArray(dec); return err },
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

	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("the signing certificate is not in PEM form")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read signing certificate: %w", err)
	}
	payload, err := openSign1(sign1, cert)
	if err != nil {
		return nil, err
	}
	if err := checkSigned(payload, pcr0); err != nil {
		return nil, err
	}
	sum := sha512.Sum384(cert.Raw)
	return register(sum[:]), nil
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
	half := (alg.curve.Params().BitSize + 7) / 8
	if len(signature) != 2*half {
		return nil, fmt.Errorf("the signature has %d bytes, not %d", len(signature), 2*half)
	}
	signed := cbor.AppendText(cbor.AppendArray(nil, 4), "Signature1")
	signed = cbor.AppendBytes(signed, protected)
	signed = cbor.AppendBytes(signed, nil)
	signed = cbor.AppendBytes(signed, payload)
	r, s := new(big.Int).SetBytes(signature[:half]), new(big.Int).SetBytes(signature[half:])
	if !ecdsa.Verify(key, alg.sum(signed), r, s) {
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
		if key != 1 || out.curve != nil {
			return fmt.Errorf("unexpected header %d", key)
		}
		id, err := dec.Int()
		if err != nil {
			return err
		}
		alg, ok := algorithms[id]
		if !ok {
			return fmt.Errorf("algorithm %d is none of ES256 (-7), ES384 (-35) and ES512 (-36)", id)
		}
		out = alg
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
		"register_index": func() (err error) { index, err = dec.Uint(); return err },
		"register_value": func() (err error) { value, err = readByteArray(dec); return err },
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
