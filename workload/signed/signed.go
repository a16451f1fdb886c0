// Package signed keeps measurement sets with the signature of whoever vouches for them, so that a set can
// be fetched from anywhere: a DSSE envelope (secure-systems-lab/dsse, protocol.md and envelope.md, v1)
// around an in-toto Statement v1 (in-toto/attestation, spec/v1).
//
//	{"payload":"<base64>","payloadType":"application/vnd.in-toto+json","signatures":[{"keyid":"","sig":"<base64>"}]}
//
// The payload is
//
//	{"_type":"https://in-toto.io/Statement/v1",
//	 "subject":[{"name":"measurements.json","digest":{"sha256":"…"}}],
//	 "predicateType":"https://cloister.dev/measurements/v1",
//	 "predicate":{"measurements":[{"label":"1.4.0","PCR0":"…","PCR16":"…"}]}}
//
// The one subject is the set as a file: its canonical form (workload.MeasurementSet.MarshalJSON) and a
// newline, as `cloister measure` prints it. Registers are no subjects: two digest sets match when any of
// their digests does (spec/v1/digest_set.md), and enclaves that share PCR0 are not the same.
//
// Contrary to in-toto's parsing rules, a field that is not listed here is refused everywhere, and an
// envelope has exactly one signature. The keyid is optional, a hint that every library makes in its own way:
// it is written empty, so that all of them try their key, and not looked at.
package signed

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"cloister.dev/cloister/internal/strictjson"
	"cloister.dev/cloister/workload"
)

const (
	payloadType   = "application/vnd.in-toto+json"
	statementType = "https://in-toto.io/Statement/v1"
	subjectName   = "measurements.json"
)

// PredicateType says that the predicate of a statement is a measurement set.
const PredicateType = "https://cloister.dev/measurements/v1"

// Errors of Parse that say that it was called with a key for an unsigned set, or without one for a signed
// set.
var (
	ErrUnsigned = errors.New("the measurement set is not signed")
	ErrSigned   = errors.New("the measurement set is signed, and nothing says whose signature counts")
)

type envelope struct {
	Payload     string      `json:"payload"`
	PayloadType string      `json:"payloadType"`
	Signatures  []signature `json:"signatures"`
}

type signature struct {
	KeyID string `json:"keyid"`
	Sig   string `json:"sig"`
}

type statement struct {
	Type          string                  `json:"_type"`
	Subject       []subject               `json:"subject"`
	PredicateType string                  `json:"predicateType"`
	Predicate     workload.MeasurementSet `json:"predicate"`
}

type subject struct {
	Name   string            `json:"name"`
	Digest map[string]string `json:"digest"`
}

// Sign returns the envelope of a set, one line of JSON. The key is one of ECDSA on P-256 (signs SHA-256,
// in ASN.1 DER) or P-384 (SHA-384), or of Ed25519.
func Sign(set workload.MeasurementSet, key crypto.Signer) ([]byte, error) {
	if err := checkKind(key.Public()); err != nil {
		return nil, err
	}
	digest, err := subjectDigest(set)
	if err != nil {
		return nil, err
	}
	payload, err := json.Marshal(statement{
		Type:          statementType,
		Subject:       []subject{{subjectName, map[string]string{"sha256": digest}}},
		PredicateType: PredicateType,
		Predicate:     set,
	})
	if err != nil {
		return nil, err
	}
	hash, message := signedBytes(key.Public(), payload)
	sig, err := key.Sign(rand.Reader, message, hash)
	if err != nil {
		return nil, fmt.Errorf("sign measurement set: %w", err)
	}
	return json.Marshal(envelope{
		Payload:     base64.StdEncoding.EncodeToString(payload),
		PayloadType: payloadType,
		Signatures:  []signature{{Sig: base64.StdEncoding.EncodeToString(sig)}},
	})
}

// Parse reads a measurement set. With a key the set must be signed by it: the envelope, and then the
// statement, must be as the package describes them, and the set as workload.ParseMeasurements demands.
// Without a key, nil, the set must be unsigned. A set of the other kind is ErrUnsigned or ErrSigned.
func Parse(data []byte, key crypto.PublicKey) (workload.MeasurementSet, error) {
	enveloped := isEnvelope(data)
	if key == nil {
		if enveloped {
			return nil, ErrSigned
		}
		return workload.ParseMeasurements(data)
	}
	if err := checkKind(key); err != nil {
		return nil, err
	}
	if !enveloped {
		if _, err := workload.ParseMeasurements(data); err != nil {
			return nil, err
		}
		return nil, ErrUnsigned
	}
	e, err := parseEnvelope(data)
	if err != nil {
		return nil, fmt.Errorf("read signed measurement set: %w", err)
	}
	payload, err := e.verify(key)
	if err != nil {
		return nil, fmt.Errorf("verify measurement set: %w", err)
	}
	set, err := parseStatement(payload)
	if err != nil {
		return nil, fmt.Errorf("read signed measurement set: %w", err)
	}
	return set, nil
}

// isEnvelope tells a signed set from one that is not by the first field. Both readers refuse the fields of
// the other.
func isEnvelope(data []byte) bool {
	dec := json.NewDecoder(bytes.NewReader(data))
	if tok, err := dec.Token(); err != nil || tok != json.Delim('{') {
		return false
	}
	switch tok, _ := dec.Token(); tok {
	case "payload", "payloadType", "signatures":
		return true
	}
	return false
}

func parseEnvelope(data []byte) (*envelope, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	var e envelope
	err := strictjson.Object(dec, "the envelope", func(key string) (err error) {
		switch key {
		case "payload":
			e.Payload, err = strictjson.String(dec, key)
		case "payloadType":
			e.PayloadType, err = strictjson.String(dec, key)
		case "signatures":
			err = strictjson.Array(dec, key, func() error {
				s, err := parseSignature(dec)
				e.Signatures = append(e.Signatures, s)
				return err
			})
		default:
			err = fmt.Errorf("an envelope has no field %q, only payload, payloadType and signatures", key)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := strictjson.End(dec); err != nil {
		return nil, err
	}
	if e.PayloadType != payloadType {
		return nil, fmt.Errorf("the payloadType is %q, not %q: it is no in-toto statement", e.PayloadType, payloadType)
	}
	if len(e.Signatures) != 1 {
		return nil, fmt.Errorf("it has %d signatures, and one is taken: sign the set anew with `cloister sign`", len(e.Signatures))
	}
	return &e, nil
}

func parseSignature(dec *json.Decoder) (signature, error) {
	var s signature
	err := strictjson.Object(dec, "a signature", func(key string) error {
		switch key {
		case "sig":
			var err error
			s.Sig, err = strictjson.String(dec, key)
			return err
		case "keyid": // may be empty: envelope.md
			tok, err := dec.Token()
			if _, ok := tok.(string); err == nil && !ok {
				err = errors.New("keyid must be a string")
			}
			return err
		}
		return fmt.Errorf("a signature has no field %q, only keyid and sig", key)
	})
	return s, err
}

// verify returns the payload if the key has signed it.
func (e *envelope) verify(key crypto.PublicKey) ([]byte, error) {
	payload, err := decodeBase64(e.Payload)
	if err != nil {
		return nil, fmt.Errorf("the payload is not in base64: %w", err)
	}
	sig, err := decodeBase64(e.Signatures[0].Sig)
	if err != nil {
		return nil, fmt.Errorf("the signature is not in base64: %w", err)
	}
	_, message := signedBytes(key, payload)
	var ok bool
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(key, message, sig)
	case ed25519.PublicKey:
		ok = ed25519.Verify(key, message, sig)
	}
	if !ok {
		return nil, errors.New("the signature is not that of the given key over this set: it was changed, or signed with another key")
	}
	return payload, nil
}

// decodeBase64 takes both alphabets, as envelope.md demands.
func decodeBase64(s string) ([]byte, error) {
	b, err := base64.StdEncoding.Strict().DecodeString(s)
	if err == nil {
		return b, nil
	}
	if b, err := base64.URLEncoding.Strict().DecodeString(s); err == nil {
		return b, nil
	}
	return nil, err
}

func parseStatement(payload []byte) (workload.MeasurementSet, error) {
	dec := json.NewDecoder(bytes.NewReader(payload))
	var s statement
	err := strictjson.Object(dec, "the statement", func(key string) (err error) {
		switch key {
		case "_type":
			s.Type, err = strictjson.String(dec, key)
		case "predicateType":
			s.PredicateType, err = strictjson.String(dec, key)
		case "subject":
			err = strictjson.Array(dec, key, func() error {
				sub, err := parseSubject(dec)
				s.Subject = append(s.Subject, sub)
				return err
			})
		case "predicate":
			err = dec.Decode(&s.Predicate)
		default:
			err = fmt.Errorf("a statement has no field %q, only _type, subject, predicateType and predicate", key)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := strictjson.End(dec); err != nil {
		return nil, err
	}
	if s.Type != statementType {
		return nil, fmt.Errorf("the statement's _type is %q, not %q", s.Type, statementType)
	}
	if s.PredicateType != PredicateType {
		return nil, fmt.Errorf("the statement's predicateType is %q, not %q: it says something else than which measurements are good", s.PredicateType, PredicateType)
	}
	digest, err := subjectDigest(s.Predicate)
	if err != nil {
		return nil, err
	}
	if len(s.Subject) != 1 || s.Subject[0].Name != subjectName || len(s.Subject[0].Digest) != 1 || s.Subject[0].Digest["sha256"] != digest {
		return nil, fmt.Errorf("the statement's subject is not its own measurement set, %s with sha256 %s alone", subjectName, digest)
	}
	return s.Predicate, nil
}

func parseSubject(dec *json.Decoder) (subject, error) {
	s := subject{Digest: map[string]string{}}
	err := strictjson.Object(dec, "a subject", func(key string) (err error) {
		switch key {
		case "name":
			s.Name, err = strictjson.String(dec, key)
		case "digest":
			err = strictjson.Object(dec, "a digest set", func(algorithm string) (err error) {
				s.Digest[algorithm], err = strictjson.String(dec, algorithm)
				return err
			})
		default:
			err = fmt.Errorf("a subject has no field %q, only name and digest", key)
		}
		return err
	})
	return s, err
}

// subjectDigest returns the SHA-256 of the set's file, in hexadecimal.
func subjectDigest(set workload.MeasurementSet) (string, error) {
	file, err := json.Marshal(set)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append(file, '\n'))
	return hex.EncodeToString(sum[:]), nil
}

// signedBytes returns what a key signs of a payload, and how it was hashed: the
// pre-authentication encoding (DSSE protocol.md), for ECDSA its digest.
func signedBytes(key crypto.PublicKey, payload []byte) (crypto.Hash, []byte) {
	pae := fmt.Appendf(nil, "DSSEv1 %d %s %d %s", len(payloadType), payloadType, len(payload), payload)
	k, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return 0, pae
	}
	hash := crypto.SHA256
	if k.Curve == elliptic.P384() {
		hash = crypto.SHA384
	}
	h := hash.New()
	h.Write(pae)
	return hash, h.Sum(nil)
}

// checkKind refuses every key but ECDSA on P-256 and P-384 and Ed25519.
func checkKind(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k != nil && (k.Curve == elliptic.P256() || k.Curve == elliptic.P384()) {
			return nil
		}
	case ed25519.PublicKey:
		if len(k) == ed25519.PublicKeySize {
			return nil
		}
	}
	return errKind
}
