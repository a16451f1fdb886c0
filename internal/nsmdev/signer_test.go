package nsmdev_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsmdev"
)

var start = time.Date(2026, 3, 1, 12, 0, 0, 123e6, time.UTC)

func newSigner(t *testing.T) *nsmdev.Signer {
	t.Helper()
	cert, key, err := nsmdev.NewRoot(start.Add(-time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	s, err := nsmdev.New(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func document(at time.Time) nsmdev.Document {
	return nsmdev.Document{
		ModuleID:  "i-0123456789abcdef0-enc0123456789abcdef",
		Timestamp: at,
		PCRs:      map[uint][]byte{0: bytes.Repeat([]byte{1}, 48), 16: bytes.Repeat([]byte{2}, 48)},
	}
}

func TestSign(t *testing.T) {
	s := newSigner(t)
	tests := map[string]struct{ publicKey, userData, nonce []byte }{
		"nothing asked for": {},
		"all":               {[]byte("key"), []byte("data"), []byte("nonce")},
		"0 bytes":           {[]byte{}, []byte{}, []byte{}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			in := document(start)
			in.PublicKey, in.UserData, in.Nonce = tc.publicKey, tc.userData, tc.nonce
			doc, err := s.Sign(in)
			if err != nil {
				t.Fatal(err)
			}
			d, err := attestation.Verify(doc, attestation.Options{Root: s.Root(), Now: start})
			if err != nil {
				t.Fatal(err)
			}
			got := nsmdev.Document{ModuleID: d.ModuleID, Timestamp: d.Timestamp, PCRs: d.PCRs, PublicKey: d.PublicKey, UserData: d.UserData, Nonce: d.Nonce}
			if diff := cmp.Diff(in, got); diff != "" {
				t.Errorf("(-signed +verified):\n%s", diff)
			}
			if !d.Development || len(d.CABundle) != 2 || !bytes.Equal(d.CABundle[0], s.Root().Raw) {
				t.Errorf("Development %v, %d certificates in the bundle", d.Development, len(d.CABundle))
			}
			if _, err := attestation.Verify(doc, attestation.Options{Now: start}); err == nil {
				t.Error("verifies below the AWS root")
			}
		})
	}
}

// TestRenewal signs over days, forwards and back, and expects as few certificates as their lifetimes allow.
func TestRenewal(t *testing.T) {
	s := newSigner(t)
	leaves := map[string]bool{}
	for hour := range 48 {
		at := start.Add(time.Duration(hour) * time.Hour)
		doc, err := s.Sign(document(at))
		if err != nil {
			t.Fatal(err)
		}
		d, err := attestation.Verify(doc, attestation.Options{Root: s.Root(), Now: at.Add(15 * time.Minute)})
		if err != nil {
			t.Fatalf("after %d hours: %v", hour, err)
		}
		leaves[string(d.Certificate)] = true
	}
	if got := len(leaves); got < 16 || got > 18 {
		t.Errorf("%d leaves in 48 hours, want about 16", got)
	}
	doc, err := s.Sign(document(start)) // a clock that was set back
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attestation.Verify(doc, attestation.Options{Root: s.Root(), Now: start}); err != nil {
		t.Errorf("after the clock was set back: %v", err)
	}
}

func TestConcurrent(t *testing.T) {
	s := newSigner(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			at := start.Add(time.Duration(i) * time.Hour)
			doc, err := s.Sign(document(at))
			if err == nil {
				_, err = attestation.Verify(doc, attestation.Options{Root: s.Root(), Now: at})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

func TestNewRefuses(t *testing.T) {
	cert, key, err := nsmdev.NewRoot(start)
	if err != nil {
		t.Fatal(err)
	}
	_, otherKey, err := nsmdev.NewRoot(start)
	if err != nil {
		t.Fatal(err)
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p256DER, err := x509.MarshalPKCS8PrivateKey(p256)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		cert, key []byte
		want      string
	}{
		"nothing":     {nil, nil, "PEM"},
		"no key":      {cert, nil, "PEM"},
		"swapped":     {key, cert, "read development root"},
		"another key": {cert, otherKey, "not that of the certificate"},
		"P-256":       {cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: p256DER}), "not on P-384"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := nsmdev.New(tc.cert, tc.key); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}
