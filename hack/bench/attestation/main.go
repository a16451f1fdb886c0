// Command attestation compares the cost of verifying attestation documents with that of the bare signature
// verifications in them, and with a verifier by others, in one process on the same document.
//
// Measured is the CPU time of the whole process (getrusage), garbage collection included, in rounds that take
// turns, so that whatever else the machine does hits all alike; printed are medians, those of the ratios round
// by round.
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"log"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/hf/nitrite"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/hack/bench/cpu"
	"cloister.dev/cloister/internal/cbor"
	"cloister.dev/cloister/internal/nsmdev"
)

const (
	rounds = 25
	calls  = 20 // in a round
)

// contender is what is measured.
type contender struct {
	name   string
	call   func() error
	limit  float64 // of the ratio; 0: none
	times  []time.Duration
	allocs []uint64
}

func main() {
	log.SetFlags(0)
	var doc []byte
	var name string
	opts := attestation.Options{}
	switch len(os.Args) {
	case 1:
		name = "a generated document"
		doc, opts.Root = generate()
	case 2:
		var err error
		if doc, err = os.ReadFile(os.Args[1]); err != nil {
			log.Fatal(err)
		}
		name = filepath.Base(os.Args[1])
	default:
		log.Fatal("usage: attestation [FILE], a document below AWS's root; without FILE one is generated")
	}
	claimed, err := attestation.ParseUnverified(doc)
	if err != nil {
		log.Fatal(err)
	}
	// What each check at the document's own time takes.
	opts.Now, opts.AllowDebug = claimed.Timestamp, claimed.Debug()
	bare, err := signatures(doc, claimed, opts.Root)
	if err != nil {
		log.Fatal(err)
	}
	again := opts
	again.Chains = new(attestation.Chains)
	theirs := nitrite.VerifyOptions{CurrentTime: opts.Now}
	if opts.Root != nil {
		theirs.Roots = x509.NewCertPool()
		theirs.Roots.AddCert(opts.Root)
	}
	verify := func(n int) func() error {
		return func() error {
			for _, s := range bare[len(bare)-n:] {
				if !ecdsa.VerifyASN1(s.key, s.digest, s.signature) {
					return errors.New("a bare signature is wrong")
				}
			}
			return nil
		}
	}
	all := &contender{name: fmt.Sprintf("%d bare P-384 verifications", len(bare)), call: verify(len(bare))}
	one := &contender{name: "1 bare P-384 verification", call: verify(1)}
	cold := &contender{name: "Cloister", limit: 1.15, call: func() error { _, err := attestation.Verify(doc, opts); return err }}
	warm := &contender{name: "Cloister, the same enclave again", limit: 1.15, call: func() error { _, err := attestation.Verify(doc, again); return err }}
	peer := &contender{name: "hf/nitrite", call: func() error { _, err := nitrite.Verify(doc, theirs); return err }}
	contenders := []*contender{all, cold, peer, one, warm}
	for _, c := range contenders {
		if err := c.call(); err != nil {
			log.Fatalf("%s: %v", c.name, err)
		}
	}
	for range rounds {
		for _, c := range contenders {
			c.round()
		}
	}
	fmt.Printf("%s: %d bytes, %d certificates with the root's\n\n", name, len(doc), len(claimed.CABundle)+1)
	fmt.Println("| one verification | CPU, µs | allocations | CPU, of that of the bare ones |")
	fmt.Println("|---|---|---|---|")
	missed := false
	for _, c := range contenders {
		reference := all
		if c == one || c == warm {
			reference = one
		}
		ratios := make([]float64, rounds)
		for i := range ratios {
			ratios[i] = float64(c.times[i]) / float64(reference.times[i])
		}
		ratio := cpu.Median(ratios)
		fmt.Printf("| %s | %.0f | %d | %.2f |\n", c.name, float64(cpu.Median(c.times))/float64(time.Microsecond), cpu.Median(c.allocs), ratio)
		missed = missed || c.limit > 0 && ratio > c.limit
	}
	if missed {
		fmt.Println("\nA ratio is above the aim, 1.15: run it again on a machine that does nothing else.")
	}
}

func (c *contender) round() {
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := cpu.Time()
	for range calls {
		if err := c.call(); err != nil {
			log.Fatalf("%s: %v", c.name, err)
		}
	}
	spent := cpu.Time() - start
	runtime.ReadMemStats(&after)
	c.times = append(c.times, spent/calls)
	c.allocs = append(c.allocs, (after.Mallocs-before.Mallocs)/calls)
}

// signature is one of a document, ready to be verified.
type signature struct {
	key       *ecdsa.PublicKey
	digest    []byte
	signature []byte // ASN.1
}

// signatures are those of the certificates below root, and the document's own.
func signatures(doc []byte, d *attestation.Document, root *x509.Certificate) ([]signature, error) {
	if root == nil {
		root = attestation.AWSRoot()
	}
	var out []signature
	issuer := root
	for _, der := range append(d.CABundle[1:len(d.CABundle):len(d.CABundle)], d.Certificate) {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		digest := sha512.Sum384(cert.RawTBSCertificate)
		out = append(out, signature{issuer.PublicKey.(*ecdsa.PublicKey), digest[:], cert.Signature})
		issuer = cert
	}
	var parts [4][]byte
	dec := cbor.NewDecoder(doc)
	err := dec.Array(func(i int) (err error) {
		if i == 1 {
			return dec.Skip() // the unprotected header
		}
		parts[i], err = dec.Bytes()
		return err
	})
	if err != nil {
		return nil, err
	}
	b := cbor.AppendText(cbor.AppendArray(nil, 4), "Signature1")
	for _, part := range [][]byte{parts[0], nil, parts[2]} {
		b = cbor.AppendBytes(b, part)
	}
	digest := sha512.Sum384(b)
	half := len(parts[3]) / 2
	sig, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(parts[3][:half]), new(big.Int).SetBytes(parts[3][half:])})
	return append(out, signature{issuer.PublicKey.(*ecdsa.PublicKey), digest[:], sig}), err
}

// generate makes a document in AWS's shape: root, three intermediate certificates and a leaf.
func generate() (doc []byte, root *x509.Certificate) {
	now := time.Now()
	var ders [][]byte
	var issuer *x509.Certificate
	var issuerKey *ecdsa.PrivateKey
	for i := range 5 {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			log.Fatal(err)
		}
		template := &x509.Certificate{
			Subject:   pkix.Name{CommonName: strings.Repeat("x", 60) + fmt.Sprint(i)},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), SignatureAlgorithm: x509.ECDSAWithSHA384,
			BasicConstraintsValid: true, IsCA: i < 4, KeyUsage: x509.KeyUsageCertSign,
		}
		if i == 4 {
			template.KeyUsage = x509.KeyUsageDigitalSignature
		}
		if i == 0 {
			issuer, issuerKey = template, key
		}
		der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), issuerKey)
		if err != nil {
			log.Fatal(err)
		}
		if issuer, err = x509.ParseCertificate(der); err != nil {
			log.Fatal(err)
		}
		if issuerKey = key; i == 0 {
			root = issuer
		}
		ders = append(ders, der)
	}
	text := func(b []byte, s string) []byte { return cbor.AppendText(b, s) }
	b := text(text(cbor.AppendMap(nil, 9), "module_id"), "i-0123456789abcdef0-enc0123456789abcdef")
	b = text(text(b, "digest"), "SHA384")
	b = cbor.AppendUint(text(b, "timestamp"), uint64(now.UnixMilli()))
	b = cbor.AppendMap(text(b, "pcrs"), 16)
	for i := range 16 {
		b = cbor.AppendBytes(cbor.AppendUint(b, uint64(i)), append(make([]byte, 47), byte(i+1)))
	}
	b = cbor.AppendBytes(text(b, "certificate"), ders[4])
	b = cbor.AppendArray(text(b, "cabundle"), 4)
	for _, der := range ders[:4] {
		b = cbor.AppendBytes(b, der)
	}
	for _, field := range []string{"public_key", "user_data", "nonce"} {
		b = cbor.AppendOptionalBytes(text(b, field), nil)
	}
	doc, err := nsmdev.SignPayload(issuerKey, b)
	if err != nil {
		log.Fatal(err)
	}
	return doc, root
}
