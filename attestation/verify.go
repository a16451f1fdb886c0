package attestation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"math/big"
	"time"

	"cloister.dev/cloister/workload"
)

const (
	// DefaultMaxAge is the age at which a document is refused unless Options.MaxAge says otherwise.
	DefaultMaxAge = 15 * time.Minute

	// Skew is how far the clocks of enclave and verifier may differ. AWS defines no tolerance.
	Skew = 5 * time.Minute
)

// Options say what a document must show. The zero value demands a fresh, validly signed document
// of a real enclave that is not in debug mode.
type Options struct {
	// Root replaces the built-in AWS root; documents are then marked Development.
	Root *x509.Certificate

	// Now is the time at which certificates must be valid and from which the age is counted;
	// zero is the current time. An archived document is verified at its own Timestamp.
	Now time.Time

	// MaxAge is the oldest document that is accepted; 0 is DefaultMaxAge.
	MaxAge time.Duration

	// Nonce, UserData and PublicKey must be in the document, byte for byte; nil is not compared.
	Nonce, UserData, PublicKey []byte

	// Measurements must hold an entry that the registers match. Nil is not compared, and then the
	// document proves nothing about the code: look at Document.PCRs.
	Measurements workload.MeasurementSet

	// AllowDebug accepts enclaves in debug mode (all-zero PCR0), which keep no secret from their host.
	AllowDebug bool

	// Chains, if set, remembers certificate chains from one call to the next.
	Chains *Chains
}

// Verify reads an attestation document and checks it against opts. The error, if any, is an *Error.
// The document that is returned shares memory with doc.
func Verify(doc []byte, opts Options) (*Document, error) {
	d, _, err := verify(doc, opts)
	return d, err
}

// verify is Verify and also returns the period in which the same call would accept the document.
func verify(doc []byte, opts Options) (*Document, period, error) {
	env, d, err := parse(doc)
	if err != nil {
		return nil, period{}, err
	}
	root := opts.Root
	if root == nil {
		root = AWSRoot()
	}
	d.Development = !root.Equal(AWSRoot())

	now := opts.Now
	if now.IsZero() {
		now = time.Now()
	}
	maxAge := opts.MaxAge
	if maxAge == 0 {
		maxAge = DefaultMaxAge
	}
	age := now.Sub(d.Timestamp)
	if age < -Skew {
		return nil, period{}, refuse(RuleAge, "the document is from %s, %s in the future of %s: check the clock",
			stamp(d.Timestamp), -age.Round(time.Second), stamp(now))
	}
	if age > maxAge {
		return nil, period{}, refuse(RuleAge, "the document is from %s, %s old at %s; at most %s is accepted",
			stamp(d.Timestamp), age.Round(time.Second), stamp(now), maxAge)
	}

	ch, err := opts.Chains.verify(root, d, now)
	if err != nil {
		return nil, period{}, &Error{RuleChain, err}
	}
	r := new(big.Int).SetBytes(env.signature[:signatureBytes/2])
	s := new(big.Int).SetBytes(env.signature[signatureBytes/2:])
	if !ecdsa.Verify(ch.key, env.signed(), r, s) {
		return nil, period{}, refuse(RuleSignature, "the signature is not that of the document's certificate: the document was changed or is not signed")
	}
	if err := verifyContent(d, opts); err != nil {
		return nil, period{}, err
	}
	opts.Chains.remember(root, d, ch, now)
	return d, ch.valid.and(period{d.Timestamp.Add(-Skew), d.Timestamp.Add(maxAge)}), nil
}

// verifyContent compares what the document says with what the caller pins.
func verifyContent(d *Document, opts Options) error {
	for _, f := range []struct {
		rule           Rule
		expected, seen []byte
	}{
		{RuleNonce, opts.Nonce, d.Nonce},
		{RuleUserData, opts.UserData, d.UserData},
		{RulePublicKey, opts.PublicKey, d.PublicKey},
	} {
		switch {
		case f.expected == nil:
		case f.seen == nil:
			return refuse(f.rule, "the document has no %s", f.rule)
		case !bytes.Equal(f.expected, f.seen):
			return refuse(f.rule, "the document's %s is not the expected one: expected %s, seen %s", f.rule, excerpt(f.expected), excerpt(f.seen))
		}
	}
	if d.Debug() && !opts.AllowDebug {
		return refuse(RuleDebug, "the enclave runs in debug mode (PCR0 is all zero), so its host can read it: allow debug only in tests")
	}
	if opts.Measurements != nil {
		if _, err := opts.Measurements.Match(d.PCRs); err != nil {
			return &Error{RuleMeasurement, err}
		}
	}
	return nil
}

// excerpt is the hexadecimal form of the first bytes of b, for messages.
func excerpt(b []byte) string {
	const most = 32
	if len(b) > most {
		return fmt.Sprintf("%x… (%d bytes)", b[:most], len(b))
	}
	return fmt.Sprintf("%x (%d bytes)", b, len(b))
}
