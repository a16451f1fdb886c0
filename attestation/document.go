package attestation

import (
	"bytes"
	"crypto/sha512"
	"errors"
	"fmt"
	"math"
	"time"

	"cloister.dev/cloister/internal/cbor"
	"cloister.dev/cloister/workload"
)

// MaxDocumentSize is the largest document that is looked at, in bytes. The Nitro Security Module
// answers into a buffer of 12 KiB (linux drivers/misc/nsm.c); real documents have 4 to 6 KiB.
const MaxDocumentSize = 16 << 10

const (
	maxBundle = 8  // certificates in cabundle; AWS sends 4
	maxPCRs   = 32 // registers of a Nitro Security Module

	coseSign1Tag   = 18  // RFC 9052, section 2
	coseHeaderAlg  = 1   // RFC 9052, section 3.1
	coseES384      = -35 // RFC 9053, section 2.1
	signatureBytes = 96  // r and s of P-384, 48 bytes each
)

// Document is the content of an attestation document (AWS nsm-api docs/attestation_process.md).
type Document struct {
	ModuleID  string          // the issuing module, for example "i-0123456789abcdef0-enc0123456789abcdef"
	Digest    string          // always "SHA384"
	Timestamp time.Time       // when the document was made, to the millisecond
	PCRs      map[uint][]byte // the locked registers, 48 bytes each

	Certificate []byte   // DER of the certificate whose key signed the document
	CABundle    [][]byte // DER of the issuing certificates as sent: root first. The root is never trusted from here

	// PublicKey, UserData and Nonce are what the enclave asked to have attested: nil if absent,
	// empty but not nil if present with 0 bytes.
	PublicKey []byte
	UserData  []byte
	Nonce     []byte

	// Development says that Options.Root stood in for the AWS root: not a real enclave.
	Development bool
}

// Debug reports whether the enclave runs in debug mode, in which all registers are zero and its
// operator reads its console.
func (d *Document) Debug() bool {
	return bytes.Equal(d.PCRs[0], make([]byte, workload.PCRSize))
}

// envelope is a COSE_Sign1 around a document.
type envelope struct {
	protected, payload, signature []byte
}

// signed returns the SHA-384 of the Sig_structure (RFC 9052, section 4.4) with the protected header
// exactly as received.
func (e *envelope) signed() []byte {
	b := make([]byte, 0, len(e.payload)+64)
	b = cbor.AppendArray(b, 4)
	b = cbor.AppendText(b, "Signature1")
	b = cbor.AppendBytes(b, e.protected)
	b = cbor.AppendBytes(b, nil) // external_aad
	b = cbor.AppendBytes(b, e.payload)
	sum := sha512.Sum384(b)
	return sum[:]
}

// ParseUnverified reads a document without verifying anything but its form, for display and to
// learn the time at which an archived document has to be verified. Trust nothing in it.
func ParseUnverified(doc []byte) (*Document, error) {
	_, d, err := parse(doc)
	return d, err
}

func parse(doc []byte) (*envelope, *Document, error) {
	if len(doc) > MaxDocumentSize {
		return nil, nil, refuse(RuleFormat, "the document has %d bytes, more than %d", len(doc), MaxDocumentSize)
	}
	env, err := parseEnvelope(doc)
	if err != nil {
		return nil, nil, refuse(RuleFormat, "not a COSE_Sign1 message with ES384: %w", err)
	}
	d, err := parsePayload(env.payload)
	if err != nil {
		return nil, nil, refuse(RuleFormat, "not an attestation document: %w", err)
	}
	return env, d, nil
}

func parseEnvelope(doc []byte) (*envelope, error) {
	var env envelope
	dec := cbor.NewDecoder(doc)
	dec.Tag(coseSign1Tag)
	elements := 0
	err := dec.Array(func(i int) (err error) {
		elements++
		switch i {
		case 0:
			if env.protected, err = dec.Bytes(); err == nil {
				err = parseProtected(env.protected)
			}
			return wrap("protected header", err)
		case 1:
			return wrap("unprotected header", dec.Map(func() error {
				return errors.New("it must be empty")
			}))
		case 2:
			env.payload, err = dec.Bytes()
			return wrap("payload", err)
		case 3:
			env.signature, err = dec.Bytes()
			if err == nil && len(env.signature) != signatureBytes {
				err = fmt.Errorf("%d bytes, not %d", len(env.signature), signatureBytes)
			}
			return wrap("signature", err)
		}
		return errors.New("more than 4 elements")
	})
	if err == nil && elements != 4 {
		err = fmt.Errorf("%d elements, not 4", elements)
	}
	if err == nil {
		err = dec.End()
	}
	return &env, err
}

// parseProtected accepts {1: -35} and nothing else, so no header that would have to be understood
// ("crit") is overlooked.
func parseProtected(header []byte) error {
	dec := cbor.NewDecoder(header)
	entries := 0
	err := dec.Map(func() error {
		entries++
		key, err := dec.Int()
		if err != nil {
			return err
		}
		if key != coseHeaderAlg || entries > 1 {
			return fmt.Errorf("unexpected entry %d", key)
		}
		alg, err := dec.Int()
		if err == nil && alg != coseES384 {
			err = fmt.Errorf("algorithm %d, but only ES384 (%d) is accepted", alg, coseES384)
		}
		return err
	})
	if err == nil && entries == 0 {
		err = errors.New("no algorithm")
	}
	if err == nil {
		err = dec.End()
	}
	return err
}

// parsePayload reads the document proper. Fields that it does not know are skipped: they are signed
// and AWS may add some.
func parsePayload(payload []byte) (*Document, error) {
	var d Document
	dec := cbor.NewDecoder(payload)
	seen := map[string]bool{}
	err := dec.Map(func() (err error) {
		key, err := dec.Text()
		if err != nil {
			return err
		}
		if seen[key] {
			return fmt.Errorf("field %q appears twice", key)
		}
		seen[key] = true
		switch key {
		case "module_id":
			d.ModuleID, err = dec.Text()
		case "digest":
			d.Digest, err = dec.Text()
		case "timestamp":
			d.Timestamp, err = parseTime(dec)
		case "pcrs":
			d.PCRs, err = parsePCRs(dec)
		case "certificate":
			d.Certificate, err = dec.Bytes()
		case "cabundle":
			err = dec.Array(func(i int) error {
				if i == maxBundle {
					return fmt.Errorf("more than %d certificates", maxBundle)
				}
				der, err := dec.Bytes()
				d.CABundle = append(d.CABundle, der)
				return err
			})
		case "public_key":
			d.PublicKey, err = dec.OptionalBytes()
		case "user_data":
			d.UserData, err = dec.OptionalBytes()
		case "nonce":
			d.Nonce, err = dec.OptionalBytes()
		default:
			err = dec.Skip()
		}
		return wrap(fmt.Sprintf("field %q", key), err)
	})
	if err != nil {
		return nil, err
	}
	if err := dec.End(); err != nil {
		return nil, err
	}
	for _, key := range []string{"module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle"} {
		if !seen[key] {
			return nil, fmt.Errorf("field %q is missing", key)
		}
	}
	switch {
	case d.ModuleID == "":
		return nil, errors.New(`field "module_id" is empty`)
	case d.Digest != "SHA384":
		return nil, fmt.Errorf(`field "digest" is %q, not "SHA384"`, d.Digest)
	case d.PCRs[0] == nil:
		return nil, errors.New(`field "pcrs" lacks PCR0`)
	case len(d.Certificate) == 0:
		return nil, errors.New(`field "certificate" is empty`)
	case len(d.CABundle) == 0:
		return nil, errors.New(`field "cabundle" is empty`)
	}
	return &d, nil
}

// parseTime reads milliseconds since 1970.
func parseTime(dec *cbor.Decoder) (time.Time, error) {
	ms, err := dec.Uint()
	if err != nil {
		return time.Time{}, err
	}
	if ms == 0 || ms > math.MaxInt64/1_000_000 { // nanoseconds since 1970 fit into an int64
		return time.Time{}, fmt.Errorf("%d ms is no sensible time", ms)
	}
	return time.UnixMilli(int64(ms)).UTC(), nil
}

func parsePCRs(dec *cbor.Decoder) (map[uint][]byte, error) {
	pcrs := make(map[uint][]byte, 16)
	err := dec.Map(func() error {
		index, err := dec.Uint()
		if err != nil {
			return err
		}
		if index >= maxPCRs {
			return fmt.Errorf("there is no PCR%d", index)
		}
		if pcrs[uint(index)] != nil {
			return fmt.Errorf("PCR%d appears twice", index)
		}
		value, err := dec.Bytes()
		if err == nil && len(value) != workload.PCRSize {
			err = fmt.Errorf("PCR%d has %d bytes, not %d", index, len(value), workload.PCRSize)
		}
		pcrs[uint(index)] = value
		return err
	})
	return pcrs, err
}

// wrap adds the part in which err arose, if there is an error.
func wrap(part string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", part, err)
}
