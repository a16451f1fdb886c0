package attestation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"testing"
	"time"

	"cloister.dev/cloister/internal/cbor"
)

// TestChains verifies documents of one enclave with the chain of the first.
func TestChains(t *testing.T) {
	m := newMaker()
	first := m.make(t)
	const age = 100 * time.Hour
	verify := func(t *testing.T, doc []byte, o Options) error {
		t.Helper()
		_, err := Verify(doc, o)
		return err
	}
	fresh := func(t *testing.T) Options {
		t.Helper()
		o := good(m.root)
		o.Chains, o.MaxAge = new(Chains), age
		if err := verify(t, first, o); err != nil {
			t.Fatal(err)
		}
		return o
	}
	later := func(d time.Duration) *maker { // the same enclave's document, made that much later
		n := *m
		n.fields = append([]field(nil), m.fields...)
		n.set("timestamp", cbor.AppendUint(nil, uint64(testTime.Add(d).UnixMilli())))
		return &n
	}

	t.Run("is used", func(t *testing.T) {
		o := fresh(t)
		if err := verify(t, later(time.Second).sign(t), o); err != nil {
			t.Error(err)
		}
		if n := len(o.Chains.entries); n != 1 {
			t.Errorf("%d entries, want 1", n)
		}
		// With another key in its place the signature is wrong: so the key was not worked out anew.
		other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		for digest, entry := range o.Chains.entries {
			entry.value.key = &other.PublicKey
			o.Chains.entries[digest] = entry
		}
		wantRule(t, verify(t, first, o), RuleSignature, "")
	})
	t.Run("whatever stands for the root", func(t *testing.T) {
		o, other := fresh(t), later(0)
		other.ders = append([][]byte{nil}, m.ders[1:]...)
		if err := verify(t, other.sign(t), o); err != nil || len(o.Chains.entries) != 1 {
			t.Errorf("got error %v and %d entries", err, len(o.Chains.entries))
		}
	})
	t.Run("the signature is verified", func(t *testing.T) {
		bad := bytes.Clone(first)
		bad[len(bad)-1] ^= 1
		wantRule(t, verify(t, bad, fresh(t)), RuleSignature, "")
	})
	t.Run("so is the age", func(t *testing.T) {
		o := fresh(t)
		o.MaxAge = time.Second
		wantRule(t, verify(t, first, o), RuleAge, "1m0s old")
	})
	t.Run("the leaf has expired", func(t *testing.T) {
		o := fresh(t)
		o.Now = m.templates[4].NotAfter.Add(Skew)
		if err := verify(t, first, o); err != nil {
			t.Errorf("at its last moment: %v", err)
		}
		o.Now = o.Now.Add(time.Second)
		wantRule(t, verify(t, first, o), RuleChain, "leaf certificate: it expired")
	})
	t.Run("an intermediate is not valid yet", func(t *testing.T) {
		o := fresh(t)
		doc := later(-2 * time.Hour).sign(t)
		o.Now = testTime.Add(-time.Hour - Skew)
		if err := verify(t, doc, o); err != nil {
			t.Errorf("at its first moment: %v", err)
		}
		o.Now = o.Now.Add(-time.Second)
		wantRule(t, verify(t, doc, o), RuleChain, "intermediate certificate 1: it is valid from")
	})
	t.Run("another root", func(t *testing.T) {
		o := fresh(t)
		o.Root = strangerRoot(t)
		wantRule(t, verify(t, first, o), RuleChain, "intermediate certificate 1: it is not signed by")
		o.Root = nil
		wantRule(t, verify(t, first, o), RuleChain, "intermediate certificate 1: its issuer")
	})
	t.Run("another chain of the same leaf", func(t *testing.T) {
		other := later(0)
		other.ders = append([][]byte{m.ders[0]}, m.ders[2:]...)
		wantRule(t, verify(t, other.sign(t), fresh(t)), RuleChain, "intermediate certificate 1: its issuer")
		// The same bytes, cut elsewhere.
		glued := append(bytes.Clone(m.ders[1]), m.ders[2]...)
		other.ders = [][]byte{m.ders[0], glued, nil, m.ders[3], m.ders[4]}
		wantRule(t, verify(t, other.sign(t), fresh(t)), RuleChain, "intermediate certificate 1")
	})
	t.Run("of a refused document is not remembered", func(t *testing.T) {
		o := good(m.root)
		o.Chains, o.Nonce = new(Chains), []byte("n")
		wantRule(t, verify(t, first, o), RuleNonce, "")
		if n := len(o.Chains.entries); n != 0 {
			t.Errorf("%d entries, want none", n)
		}
	})
}

// TestVerifierRemembersChains verifies the renewed certificate of an enclave.
func TestVerifierRemembersChains(t *testing.T) {
	e := newEnclave(t)
	v := e.verifier(t)
	for range 2 {
		if _, _, err := handshake(t, v.ClientConfig(&tls.Config{Time: at(testTime)}), &tls.Config{Certificates: []tls.Certificate{e.certificate(t)}}); err != nil {
			t.Fatal(err)
		}
	}
	if c, d := len(v.opts.Chains.entries), len(v.certificates.entries); c != 1 || d != 2 {
		t.Errorf("%d chains and %d certificates are remembered, want 1 and 2", c, d)
	}
}

// A verified certificate is used only while each certificate above it is valid, however old a document may
// be.
func TestCacheEndsWithTheChain(t *testing.T) {
	e := newEnclave(t)
	v := e.verifier(t)
	v.opts.MaxAge = 100 * time.Hour
	server := &tls.Config{Certificates: []tls.Certificate{e.certificate(t)}} // for 24 hours, below a leaf of 3 hours
	for _, tc := range []struct {
		at   time.Duration
		rule Rule
	}{{at: 0}, {at: 3*time.Hour + Skew}, {at: 3*time.Hour + Skew + time.Second, rule: RuleChain}, {at: -Skew}, {at: -Skew - time.Second, rule: RuleAge}} {
		_, _, err := handshake(t, v.ClientConfig(&tls.Config{Time: at(testTime.Add(tc.at))}), server)
		if tc.rule != "" {
			wantRule(t, err, tc.rule, "")
		} else if err != nil {
			t.Errorf("%s later: %v", tc.at, err)
		}
	}
}

// Nor longer than the certificate itself is valid.
func TestCacheEndsWithTheCertificate(t *testing.T) {
	e := newEnclave(t)
	v := e.verifier(t)
	der, err := NewCertificate(e.key, e.document(t, UserDataServer), testTime.Add(2*Skew), testTime.Add(3*Skew))
	if err != nil {
		t.Fatal(err)
	}
	v.opts.MaxAge = time.Hour
	server := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: e.key}}}
	for _, tc := range []struct {
		at   time.Duration
		rule Rule
	}{{at: 3 * Skew}, {at: 4 * Skew}, {at: 4*Skew + time.Second, rule: RuleCertificate}, {at: Skew}, {at: Skew - time.Second, rule: RuleCertificate}} {
		_, _, err := handshake(t, v.ClientConfig(&tls.Config{Time: at(testTime.Add(tc.at))}), server)
		if tc.rule != "" {
			wantRule(t, err, tc.rule, "the certificate is valid from")
		} else if err != nil {
			t.Errorf("%s later: %v", tc.at, err)
		}
	}
}

func TestCacheBound(t *testing.T) {
	digest := func(i int) [sha256.Size]byte { return sha256.Sum256([]byte{byte(i), byte(i >> 8)}) }
	var c cache[int]
	for i := range maxCached {
		c.put(digest(i), i, period{until: testTime.Add(time.Duration(i) * time.Second)}, testTime)
	}
	if n := len(c.entries); n != maxCached {
		t.Fatalf("%d entries, want %d", n, maxCached)
	}
	if got, ok := c.get(digest(7), testTime); !ok || got != 7 {
		t.Errorf("get = %d, %v; want 7", got, ok)
	}
	if _, ok := c.get(digest(7), testTime.Add(7*time.Second+1)); ok {
		t.Error("an expired entry is used")
	}
	c.put(digest(0), 0, period{until: testTime}, testTime.Add(10*time.Second+1)) // is there: needs no room
	if n := len(c.entries); n != maxCached {
		t.Errorf("%d entries, want %d", n, maxCached)
	}
	c.put(digest(maxCached), 0, period{}, testTime.Add(10*time.Second+1)) // 11 have expired
	if n := len(c.entries); n != maxCached-11+1 {
		t.Errorf("%d entries, want %d", n, maxCached-11+1)
	}
	for i := range 2 * maxCached {
		c.put(digest(i), 0, period{until: testTime.Add(time.Hour)}, testTime)
		if n := len(c.entries); n > maxCached {
			t.Fatalf("%d entries, more than %d", n, maxCached)
		}
	}
}
