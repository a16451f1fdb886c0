package eif

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/internal/cbor"
)

// scheme is a signature algorithm by its COSE number and curve.
type scheme struct {
	alg   int64
	curve elliptic.Curve
}

var (
	p256 = scheme{-7, elliptic.P256()}
	p384 = scheme{-35, elliptic.P384()}
	p521 = scheme{-36, elliptic.P521()}
)

// signedParts are the parts of a signature section before they are encoded.
type signedParts struct {
	index     uint64
	value     []byte
	alg       int64
	certPEM   []byte
	signature func([]byte) []byte // changes the raw signature
	section   func([]byte) []byte // changes the whole section
}

func appendByteArray(b, v []byte) []byte {
	b = cbor.AppendArray(b, len(v))
	for _, x := range v {
		b = cbor.AppendUint(b, uint64(x))
	}
	return b
}

// signedEIF returns an EIF that is signed as AWS's builder does it, after change.
func signedEIF(t testing.TB, s scheme, change func(*signedParts)) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(s.curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "signer"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)} // dates are not checked
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	p := signedParts{value: pcr("k", "c", "r"), alg: s.alg,
		certPEM:   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		signature: func(b []byte) []byte { return b },
		section:   func(b []byte) []byte { return b },
	}
	change(&p)

	payload := cbor.AppendMap(nil, 2)
	payload = cbor.AppendUint(cbor.AppendText(payload, "register_index"), p.index)
	payload = appendByteArray(cbor.AppendText(payload, "register_value"), p.value)
	protected := cbor.AppendInt(cbor.AppendUint(cbor.AppendMap(nil, 1), 1), p.alg)
	tbs := cbor.AppendText(cbor.AppendArray(nil, 4), "Signature1")
	tbs = cbor.AppendBytes(cbor.AppendBytes(cbor.AppendBytes(tbs, protected), nil), payload)
	r, sv, err := ecdsa.Sign(rand.Reader, key, algorithms[s.alg].sum(tbs))
	if err != nil {
		t.Fatal(err)
	}
	half := (s.curve.Params().BitSize + 7) / 8
	raw := append(r.FillBytes(make([]byte, half)), sv.FillBytes(make([]byte, half))...)

	sign1 := cbor.AppendBytes(cbor.AppendArray(nil, 4), protected)
	sign1 = cbor.AppendBytes(cbor.AppendMap(sign1, 0), payload)
	sign1 = cbor.AppendBytes(sign1, p.signature(raw))
	section := cbor.AppendMap(cbor.AppendArray(nil, 1), 2)
	section = appendByteArray(cbor.AppendText(section, "signing_certificate"), p.certPEM)
	section = appendByteArray(cbor.AppendText(section, "signature"), sign1)
	return assemble(
		rawSection{SectionKernel, []byte("k")},
		rawSection{SectionCmdline, []byte("c")},
		rawSection{SectionRamdisk, []byte("r")},
		rawSection{SectionSignature, p.section(section)},
	)
}

func TestMeasureSigned(t *testing.T) {
	for name, s := range map[string]scheme{"P-256": p256, "P-384": p384, "P-521": p521} {
		t.Run(name, func(t *testing.T) {
			var cert *x509.Certificate
			file := signedEIF(t, s, func(p *signedParts) {
				block, _ := pem.Decode(p.certPEM)
				var err error
				if cert, err = x509.ParseCertificate(block.Bytes); err != nil {
					t.Fatal(err)
				}
			})
			got, err := read(t, file).Measure()
			if err != nil {
				t.Fatal(err)
			}
			want := &Measurements{PCR0: pcr("k", "c", "r"), PCR1: pcr("k", "c", "r"), PCR2: pcr(), PCR8: pcr(string(cert.Raw))}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestMeasureRefusesSignature(t *testing.T) {
	tests := map[string]struct {
		change func(*signedParts)
		want   string
	}{
		"empty section":    {func(p *signedParts) { p.section = func([]byte) []byte { return nil } }, "data ends"},
		"empty array":      {func(p *signedParts) { p.section = func([]byte) []byte { return []byte{0x80} } }, "no entry"},
		"trailing byte":    {func(p *signedParts) { p.section = func(b []byte) []byte { return append(b, 0) } }, "1 bytes follow"},
		"cut":              {func(p *signedParts) { p.section = func(b []byte) []byte { return b[:len(b)/2] } }, "data ends"},
		"claims 4 GiB":     {func(p *signedParts) { p.section = func([]byte) []byte { return []byte{0x9a, 0xff, 0xff, 0xff, 0xff} } }, "data ends"},
		"no PEM":           {func(p *signedParts) { p.certPEM = []byte("x") }, "not in PEM form"},
		"no certificate":   {func(p *signedParts) { p.certPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE"}) }, "read signing certificate"},
		"another PCR0":     {func(p *signedParts) { p.value = pcr("evil") }, "but the EIF has"},
		"another register": {func(p *signedParts) { p.index = 1 }, "PCR1, not PCR0"},
		"other algorithm":  {func(p *signedParts) { p.alg = -7 }, "does not fit"},
		"no algorithm":     {func(p *signedParts) { p.alg = -1 }, "none of ES256"},
		"flipped bit":      {func(p *signedParts) { p.signature = func(b []byte) []byte { b[5] ^= 1; return b } }, "is not that of"},
		"zero signature":   {func(p *signedParts) { p.signature = func(b []byte) []byte { return make([]byte, len(b)) } }, "is not that of"},
		"short signature":  {func(p *signedParts) { p.signature = func(b []byte) []byte { return b[:95] } }, "95 bytes, not 96"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := read(t, signedEIF(t, p384, tc.change)).Measure()
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}
