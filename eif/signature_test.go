package eif

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/internal/cbor"
)

// scheme is a signature algorithm by its COSE number, curve and hash.
type scheme struct {
	alg   int64
	curve elliptic.Curve
	hash  crypto.Hash
}

var (
	p256 = scheme{-7, elliptic.P256(), crypto.SHA256}
	p384 = scheme{-35, elliptic.P384(), crypto.SHA384}
	p521 = scheme{-36, elliptic.P521(), crypto.SHA512}
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

// testSigner returns a signer with a new key and a certificate of itself, valid in the year 2001.
func testSigner(t testing.TB, s scheme) *Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(s.curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := NewSigner(testCertificate(t, key, key.Public()), testKey(t, key))
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

var valid2001 = time.Date(2001, 6, 1, 0, 0, 0, 0, time.UTC)

// testCertificate returns a certificate of a public key in PEM form.
func testCertificate(t testing.TB, key crypto.Signer, public crypto.PublicKey) []byte {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(0x5eed), Subject: pkix.Name{CommonName: "signer"},
		NotBefore: time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2001, 12, 31, 0, 0, 0, 0, time.UTC)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// testKey returns a private key in PEM form, as PKCS #8.
func testKey(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// fields are those of a signature section.
type fields struct {
	Certificate, Protected, Payload, Signature []byte
}

// signatureFields takes a signature section apart.
func signatureFields(t *testing.T, r *Reader) fields {
	t.Helper()
	var f fields
	var sign1 []byte
	dec := cbor.NewDecoder([]byte(contents(t, *r.find(SectionSignature))))
	err := dec.Array(func(int) error {
		return readFields(dec, map[string]func() error{
			"signing_certificate": func() (err error) { f.Certificate, err = readByteArray(dec); return err },
			"signature":           func() (err error) { sign1, err = readByteArray(dec); return err },
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	dec = cbor.NewDecoder(sign1)
	err = dec.Array(func(i int) (err error) {
		switch i {
		case 0:
			f.Protected, err = dec.Bytes()
		case 1:
			err = dec.Map(func() error { return errors.New("the unprotected header is not empty") })
		case 2:
			f.Payload, err = dec.Bytes()
		case 3:
			f.Signature, err = dec.Bytes()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// signedEIF returns an EIF that is signed as AWS's builder does it, after change.
func signedEIF(t testing.TB, s scheme, change func(*signedParts)) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(s.curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p := signedParts{value: pcr("k", "c", "r"), alg: s.alg,
		certPEM:   testCertificate(t, key, key.Public()),
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
	h := s.hash.New()
	h.Write(tbs)
	r, sv, err := ecdsa.Sign(rand.Reader, key, h.Sum(nil))
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
		"no PEM":           {func(p *signedParts) { p.certPEM = []byte("x") }, "must be a certificate in PEM form"},
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

// TestSign signs an EIF while it is built, and one that is there, with each curve and form of the key.
func TestSign(t *testing.T) {
	for name, s := range map[string]scheme{"P-256": p256, "P-384": p384, "P-521": p521} {
		t.Run(name, func(t *testing.T) {
			signer := testSigner(t, s)
			img := Image{Arch: AArch64, Kernel: strings.NewReader("k"), Cmdline: "c", Metadata: &Metadata{ImageName: "n"},
				Ramdisks: []Data{strings.NewReader("one"), strings.NewReader("two")}}
			var unsigned, signed memFile
			if _, err := Write(&unsigned, img); err != nil {
				t.Fatal(err)
			}
			img.Signer = signer
			written, err := Write(&signed, img)
			if err != nil {
				t.Fatal(err)
			}
			want := &Measurements{PCR0: pcr("k", "c", "one", "two"), PCR1: pcr("k", "c", "one"), PCR2: pcr("two"), PCR8: pcr(string(signer.cert.Raw))}
			if diff := cmp.Diff(want, written); diff != "" {
				t.Errorf("Write (-want +got):\n%s", diff)
			}
			measured, cert, err := read(t, signed.data).Verify(signer.Certificate(), valid2001)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, measured); diff != "" {
				t.Errorf("Verify (-want +got):\n%s", diff)
			}
			if !cert.Equal(signer.Certificate()) {
				t.Error("Verify returns another certificate")
			}

			// The same key signs the same, and takes the place of another.
			var later, other memFile
			if _, err := Sign(&other, read(t, unsigned.data), testSigner(t, p384)); err != nil {
				t.Fatal(err)
			}
			resigned, err := Sign(&later, read(t, other.data), signer)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, resigned); diff != "" {
				t.Errorf("Sign (-want +got):\n%s", diff)
			}
			if !bytes.Equal(later.data, signed.data) {
				t.Error("an EIF that is signed later is not that which is signed at once")
			}
		})
	}
}

// TestSignKeeps checks that a signature changes nothing that Write would not write.
func TestSignKeeps(t *testing.T) {
	before := valid()
	binary.BigEndian.PutUint64(before[8:], 3<<30)
	binary.BigEndian.PutUint64(before[16:], 7)
	before[len(before)-1]++
	fixCRC(before)
	prefix := []byte("what stands before")
	f := memFile{data: bytes.Clone(prefix), pos: int64(len(prefix))}
	if _, err := Sign(&f, read(t, before), testSigner(t, p256)); err != nil {
		t.Fatal(err)
	}
	after, found := bytes.CutPrefix(f.data, prefix)
	if !found || f.pos != int64(len(f.data)) {
		t.Errorf("it is not written where the writer stood, which now is at %d of %d", f.pos, len(f.data))
	}
	r := read(t, after)
	if r.Memory != 3<<30 || r.CPUs != 7 {
		t.Errorf("memory %d, CPUs %d", r.Memory, r.CPUs)
	}
	var bare memFile
	if _, err := r.layout().write(&bare, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bare.data, before) {
		t.Error("without its signature it is another file")
	}
}

func TestVerifyRefuses(t *testing.T) {
	file := signedEIF(t, p384, func(*signedParts) {})
	tests := map[string]struct {
		file   []byte
		signer *x509.Certificate
		at     time.Time
		want   string
	}{
		"not signed":    {valid(), nil, valid2001, "it is not signed"},
		"another":       {file, testSigner(t, p384).Certificate(), valid2001, `another certificate, that of "CN=signer" with serial number 5eed`},
		"expired":       {file, nil, time.Date(2002, 1, 1, 0, 0, 0, 0, time.UTC), "valid from 2001-01-01T00:00:00Z to 2001-12-31T00:00:00Z, not at 2002-01-01T00:00:00Z"},
		"not yet valid": {file, nil, time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), "not at 2000-01-01T00:00:00Z"},
		"signature":     {signedEIF(t, p384, func(p *signedParts) { p.value = pcr("evil") }), nil, valid2001, "but the EIF has"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			m, cert, err := read(t, tc.file).Verify(tc.signer, tc.at)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
			if m != nil || cert != nil {
				t.Error("what is refused is returned all the same")
			}
		})
	}
}

func TestNewSigner(t *testing.T) {
	key := func(c elliptic.Curve) *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	k384, k224 := key(elliptic.P384()), key(elliptic.P224())
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sec1, err := x509.MarshalECPrivateKey(k384)
	if err != nil {
		t.Fatal(err)
	}
	block := func(typ string, headers map[string]string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: typ, Headers: headers, Bytes: der})
	}
	cert := testCertificate(t, k384, k384.Public())
	tests := map[string]struct {
		cert, key []byte
		want      string // empty: accepted
	}{
		"PKCS #8":          {cert, testKey(t, k384), ""},
		"EC PRIVATE KEY":   {cert, block("EC PRIVATE KEY", nil, sec1), ""},
		"EC PARAMETERS":    {cert, append(block("EC PARAMETERS", nil, []byte{6, 0}), block("EC PRIVATE KEY", nil, sec1)...), ""},
		"chain":            {append(bytes.Clone(cert), cert...), testKey(t, k384), ""},
		"no certificate":   {nil, testKey(t, k384), "must be a certificate in PEM form"},
		"key for both":     {testKey(t, k384), testKey(t, k384), "must be a certificate in PEM form"},
		"bad certificate":  {block("CERTIFICATE", nil, []byte{1}), testKey(t, k384), "read signing certificate"},
		"no key":           {cert, cert, "no unencrypted private key"},
		"encrypted":        {cert, block("ENCRYPTED PRIVATE KEY", nil, []byte{1}), "no unencrypted private key"},
		"encrypted as PEM": {cert, block("EC PRIVATE KEY", map[string]string{"DEK-Info": "AES"}, sec1), "encrypted"},
		"bad key":          {cert, block("PRIVATE KEY", nil, []byte{1}), "read signing key"},
		"another key":      {cert, testKey(t, key(elliptic.P384())), "not that of the signing certificate"},
		"other curve":      {testCertificate(t, k224, k224.Public()), testKey(t, k224), "P-224"},
		"Ed25519":          {cert, testKey(t, ed), "not an elliptic curve key"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := NewSigner(tc.cert, tc.key)
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func FuzzSignature(f *testing.F) {
	var pcr0 []byte // of the last seed
	for _, curve := range []string{"p521", "p384", "p256"} {
		b, err := os.ReadFile("testdata/aws/signed_" + curve + ".eif")
		if err != nil {
			f.Fatal(err)
		}
		r := read(f, b)
		m, err := r.Measure()
		if err != nil {
			f.Fatal(err)
		}
		pcr0 = m.PCR0
		f.Add([]byte(contents(f, *r.find(SectionSignature))))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		cert, err := verifySignature(b, pcr0)
		if (err == nil) != (cert != nil) {
			t.Errorf("certificate %v, error %v", cert != nil, err)
		}
		// Who holds no key cannot make a signature over another register.
		if _, err := verifySignature(b, make([]byte, 48)); err == nil {
			t.Error("accepted for PCR0 of zeros")
		}
	})
}
