package attestation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"reflect"
	"sync"
	"testing"
	"time"

	"cloister.dev/cloister/internal/cbor"
	"cloister.dev/cloister/internal/nsmdev"
)

// testTime is when the documents of these tests are made.
var testTime = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// maker makes documents in AWS's shape (root, three intermediates, leaf), of which a test changes
// one thing. internal/nsmdev makes only right ones.
type maker struct {
	curve     elliptic.Curve
	templates []*x509.Certificate // root first, leaf last
	unrelated int                 // place of a certificate that another key than its predecessor's signs

	fields     []field // of the payload
	indefinite bool
	payload    func([]byte) []byte // changes the encoded payload before it is signed
	cose       func([]byte) []byte // changes the signed document

	root *x509.Certificate // set by make, as what follows
	ders [][]byte          // root first, leaf last
	key  *ecdsa.PrivateKey // the leaf's
}

// field is a field of the payload: its name and encoded value.
type field struct {
	key   string
	value []byte
}

func newMaker() *maker {
	m := &maker{
		curve:     elliptic.P384(),
		templates: templates(),
		unrelated: -1,
		payload:   func(b []byte) []byte { return b },
		cose:      func(b []byte) []byte { return b },
	}
	m.fields = []field{
		{"module_id", cbor.AppendText(nil, "i-0123456789abcdef0-enc0123456789abcdef")},
		{"digest", cbor.AppendText(nil, "SHA384")},
		{"timestamp", cbor.AppendUint(nil, uint64(testTime.UnixMilli()))},
		{"pcrs", pcrs(map[uint]byte{0: 0xa0, 1: 0xa1, 2: 0xa2, 3: 0xa3, 4: 0xa4, 16: 0xb0})},
		{"certificate", nil},
		{"cabundle", nil},
		{"public_key", cbor.AppendBytes(nil, []byte("key"))},
		{"user_data", cbor.AppendBytes(nil, []byte{})},
		{"nonce", cbor.AppendOptionalBytes(nil, nil)},
	}
	return m
}

// templates are those of AWS's chain.
func templates() []*x509.Certificate {
	var all []*x509.Certificate
	for i, life := range []time.Duration{30 * 365 * 24 * time.Hour, 20 * 24 * time.Hour, 6 * 24 * time.Hour, 24 * time.Hour, 3 * time.Hour} {
		template := &x509.Certificate{
			SerialNumber:          big.NewInt(int64(i + 1)),
			Subject:               pkix.Name{CommonName: []string{"root", "region", "zone", "host", "enclave"}[i]},
			NotBefore:             testTime.Add(-time.Hour),
			NotAfter:              testTime.Add(life - time.Hour),
			KeyUsage:              x509.KeyUsageCertSign,
			BasicConstraintsValid: true,
			IsCA:                  true,
			SignatureAlgorithm:    x509.ECDSAWithSHA384,
		}
		switch i {
		case 0:
			template.NotBefore = time.Date(2019, 10, 28, 13, 28, 5, 0, time.UTC) // as AWS's
		case 1, 2, 3:
			template.MaxPathLen, template.MaxPathLenZero = 3-i, i == 3
		case 4:
			template.IsCA, template.KeyUsage = false, x509.KeyUsageDigitalSignature
		}
		all = append(all, template)
	}
	return all
}

// pcrs encodes registers of 48 equal bytes.
func pcrs(values map[uint]byte) []byte {
	b := cbor.AppendMap(nil, len(values))
	for index, value := range values {
		b = cbor.AppendBytes(cbor.AppendUint(b, uint64(index)), bytes.Repeat([]byte{value}, 48))
	}
	return b
}

// set replaces or adds a field of the payload.
func (m *maker) set(key string, value []byte) {
	for i := range m.fields {
		if m.fields[i].key == key {
			m.fields[i].value = value
			return
		}
	}
	m.fields = append(m.fields, field{key, value})
}

// remove removes a field of the payload.
func (m *maker) remove(key string) {
	for i := range m.fields {
		if m.fields[i].key == key {
			m.fields = append(m.fields[:i:i], m.fields[i+1:]...)
			return
		}
	}
}

// make makes the chain and a document.
func (m *maker) make(t testing.TB) []byte {
	t.Helper()
	m.issue(t)
	return m.sign(t)
}

// usual is a chain of unchanged templates, which all tests share: P-384 takes time.
var usual = sync.OnceValue(func() *maker {
	m := &maker{curve: elliptic.P384(), templates: templates(), unrelated: -1}
	if err := m.issueAnew(); err != nil {
		panic(err)
	}
	return m
})

// issue makes the chain.
func (m *maker) issue(t testing.TB) {
	t.Helper()
	if m.curve == elliptic.P384() && m.unrelated == -1 && reflect.DeepEqual(m.templates, templates()) {
		m.root, m.ders, m.key = usual().root, usual().ders, usual().key
		return
	}
	if err := m.issueAnew(); err != nil {
		t.Fatal(err)
	}
}

func (m *maker) issueAnew() error {
	var issuerKey, key *ecdsa.PrivateKey
	var issuer *x509.Certificate
	m.ders = nil
	for i, template := range m.templates {
		var err error
		if key, err = ecdsa.GenerateKey(m.curve, rand.Reader); err != nil {
			return err
		}
		if i == 0 {
			issuer, issuerKey = template, key
		}
		if i == m.unrelated {
			if issuerKey, err = ecdsa.GenerateKey(m.curve, rand.Reader); err != nil {
				return err
			}
			unrelated := *issuer // CreateCertificate compares its key with the issuer's
			unrelated.PublicKey = issuerKey.Public()
			issuer = &unrelated
		}
		der, err := x509.CreateCertificate(rand.Reader, template, issuer, key.Public(), issuerKey)
		if err != nil {
			return err
		}
		if issuer, err = x509.ParseCertificate(der); err != nil {
			return err
		}
		issuerKey = key
		m.ders = append(m.ders, der)
		if i == 0 {
			m.root = issuer
		}
	}
	m.key = key
	return nil
}

// sign makes a document of the chain.
func (m *maker) sign(t testing.TB) []byte {
	t.Helper()
	leaf := len(m.ders) - 1
	bundle := cbor.AppendArray(nil, leaf)
	for _, der := range m.ders[:leaf] {
		bundle = cbor.AppendBytes(bundle, der)
	}
	payload := cbor.AppendMap(nil, len(m.fields))
	if m.indefinite {
		payload = []byte{0xbf}
	}
	for _, f := range m.fields {
		value := f.value
		switch {
		case f.key == "certificate" && value == nil:
			value = cbor.AppendBytes(nil, m.ders[leaf])
		case f.key == "cabundle" && value == nil:
			value = bundle
		}
		payload = append(cbor.AppendText(payload, f.key), value...)
	}
	if m.indefinite {
		payload = append(payload, 0xff)
	}
	doc, err := nsmdev.SignPayload(m.key, m.payload(payload))
	if err != nil {
		t.Fatal(err)
	}
	return m.cose(doc)
}
