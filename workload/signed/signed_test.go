package signed

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"
	"github.com/secure-systems-lab/go-securesystemslib/signerverifier"

	"cloister.dev/cloister/workload"
)

var set = workload.MeasurementSet{
	{Label: "1.4.0 & <newer>", PCR0: strings.Repeat("0a", workload.PCRSize), PCR16: strings.Repeat("16", workload.PCRSize)},
	{PCR8: strings.Repeat("08", workload.PCRSize), PCR16: strings.Repeat("17", workload.PCRSize)},
}

func ecdsaKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func ed25519Key(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func privatePEM(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: privateBlock, Bytes: der})
}

func publicPEM(t testing.TB, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: publicBlock, Bytes: der})
}

// seal is an envelope around any payload, signed by an Ed25519 key as DSSE says.
func seal(key ed25519.PrivateKey, payload string) envelope {
	pae := fmt.Sprintf("DSSEv1 28 application/vnd.in-toto+json %d %s", len(payload), payload)
	return envelope{
		Payload:     base64.StdEncoding.EncodeToString([]byte(payload)),
		PayloadType: payloadType,
		Signatures:  []signature{{Sig: base64.StdEncoding.EncodeToString(ed25519.Sign(key, []byte(pae)))}},
	}
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// statementOf is the payload of a signed set.
func statementOf(t testing.TB, set workload.MeasurementSet) string {
	t.Helper()
	b, err := Sign(set, ed25519Key(t))
	if err != nil {
		t.Fatal(err)
	}
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		t.Fatal(err)
	}
	payload, err := base64.StdEncoding.DecodeString(e.Payload)
	if err != nil {
		t.Fatal(err)
	}
	return string(payload)
}

// TestInterchange: an implementation of DSSE by others verifies what Sign signs, and Parse what it signs.
func TestInterchange(t *testing.T) {
	type signerVerifier interface {
		dsse.Signer
		dsse.Verifier
	}
	ec := func(key *signerverifier.SSLibKey) (signerVerifier, error) {
		return signerverifier.NewECDSASignerVerifierFromSSLibKey(key)
	}
	for name, tt := range map[string]struct {
		key  crypto.Signer
		peer func(*signerverifier.SSLibKey) (signerVerifier, error)
	}{
		"P-256": {ecdsaKey(t, elliptic.P256()), ec},
		"P-384": {ecdsaKey(t, elliptic.P384()), ec},
		"Ed25519": {ed25519Key(t), func(key *signerverifier.SSLibKey) (signerVerifier, error) {
			return signerverifier.NewED25519SignerVerifierFromSSLibKey(key)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			private := privatePEM(t, tt.key)
			loaded, err := signerverifier.LoadKey(private)
			if err != nil {
				t.Fatal(err)
			}
			peer, err := tt.peer(loaded)
			if err != nil {
				t.Fatal(err)
			}
			verifier, err := dsse.NewEnvelopeVerifier(peer)
			if err != nil {
				t.Fatal(err)
			}
			signer, err := dsse.NewEnvelopeSigner(peer)
			if err != nil {
				t.Fatal(err)
			}

			own, err := ParsePrivateKey(private)
			if err != nil {
				t.Fatal(err)
			}
			public, err := ParsePublicKey(publicPEM(t, tt.key.Public()))
			if err != nil {
				t.Fatal(err)
			}
			ours, err := Sign(set, own)
			if err != nil {
				t.Fatal(err)
			}
			got, err := Parse(ours, public)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(set, got); diff != "" {
				t.Errorf("(-signed +parsed):\n%s", diff)
			}

			var e dsse.Envelope
			if err := json.Unmarshal(ours, &e); err != nil {
				t.Fatal(err)
			}
			if _, err := verifier.Verify(t.Context(), &e); err != nil {
				t.Errorf("the peer on ours: %v", err)
			}
			payload, err := e.DecodeB64Payload()
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := signer.SignPayload(t.Context(), e.PayloadType, payload)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := Parse(marshal(t, theirs), public); err != nil || !cmp.Equal(set, got) {
				t.Errorf("ours on the peer's: %v, %v", got, err)
			}
		})
	}
}

// TestFormat holds the bytes that others rely on.
func TestFormat(t *testing.T) {
	one := workload.MeasurementSet{{Label: "a", PCR0: strings.Repeat("AB", workload.PCRSize), PCR16: strings.Repeat("16", workload.PCRSize)}}
	predicate := `{"measurements":[{"label":"a","PCR0":"` + strings.Repeat("ab", workload.PCRSize) + `","PCR16":"` + strings.Repeat("16", workload.PCRSize) + `"}]}`
	// From `sha256sum` of a file with the predicate and a newline.
	const digest = "2275c2d551ebe0379e99a2f45a2bf20ab080d7255e877e8884a5ae28365650c8"
	want := `{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"measurements.json","digest":{"sha256":"` + digest +
		`"}}],"predicateType":"https://cloister.dev/measurements/v1","predicate":` + predicate + `}`
	if diff := cmp.Diff(want, statementOf(t, one)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseRefuses(t *testing.T) {
	key := ed25519Key(t)
	good := statementOf(t, set)
	unsigned := string(marshal(t, set))
	// payload signs another statement, envelope changes the whole.
	payload := func(old, new string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("no %s in %s", old, good)
		}
		return string(marshal(t, seal(key, strings.Replace(good, old, new, 1))))
	}
	whole := func(change func(*envelope)) string {
		e := seal(key, good)
		change(&e)
		return string(marshal(t, e))
	}
	text := func(old, new string) string {
		b := string(marshal(t, seal(key, good)))
		if !strings.Contains(b, old) {
			t.Fatalf("no %s in %s", old, b)
		}
		return strings.Replace(b, old, new, 1)
	}
	foreign := seal(ed25519Key(t), good).Signatures[0]
	other := marshal(t, workload.MeasurementSet{set[1]})
	if _, err := Parse([]byte(whole(func(*envelope) {})), key.Public()); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ in, want string }{
		"nothing":                   {"", "unexpected EOF"},
		"not signed":                {unsigned, ErrUnsigned.Error()},
		"neither":                   {`{"x":1}`, `no field "x"`},
		"cut":                       {whole(func(*envelope) {})[:100], "EOF"},
		"trailing data":             {whole(func(*envelope) {}) + "{}", "data follows"},
		"other payloadType":         {whole(func(e *envelope) { e.PayloadType = "text/plain" }), `payloadType is "text/plain"`},
		"no payloadType":            {text(`"payloadType":"application/vnd.in-toto+json",`, ""), `payloadType is ""`},
		"no payload":                {whole(func(e *envelope) { e.Payload = "" }), "payload must be a string that is not empty"},
		"payload twice":             {text(`"payload":`, `"payload":"eA==","payload":`), `"payload" twice`},
		"payload in another case":   {text(`"payload":`, `"payload":"eA==","Payload":`), `no field "Payload"`},
		"unknown field":             {text(`"payload":`, `"payload":"eA==","x":`), `no field "x"`},
		"payload without base64":    {whole(func(e *envelope) { e.Payload = "ä" + e.Payload }), "payload is not in base64"},
		"no signatures":             {text(`"signatures":`, `"signatures":[],"x":`), `no field "x"`},
		"empty signatures":          {whole(func(e *envelope) { e.Signatures = nil; e.Signatures = []signature{} }), "it has 0 signatures"},
		"signatures are null":       {whole(func(e *envelope) { e.Signatures = nil }), "signatures must be a JSON array"},
		"a second signature":        {whole(func(e *envelope) { e.Signatures = append(e.Signatures, foreign) }), "it has 2 signatures"},
		"the same signature twice":  {whole(func(e *envelope) { e.Signatures = append(e.Signatures, e.Signatures[0]) }), "it has 2 signatures"},
		"empty signature":           {whole(func(e *envelope) { e.Signatures[0].Sig = "" }), "sig must be a string that is not empty"},
		"signature without base64":  {whole(func(e *envelope) { e.Signatures[0].Sig = "!" }), "signature is not in base64"},
		"signature with a field":    {text(`"keyid":`, `"cert":"x","keyid":`), `no field "cert"`},
		"keyid is a number":         {text(`"keyid":""`, `"keyid":1`), "keyid must be a string"},
		"signature of a stranger":   {whole(func(e *envelope) { e.Signatures[0] = foreign }), "not that of the given key"},
		"signature of another set":  {whole(func(e *envelope) { e.Payload = base64.StdEncoding.EncodeToString([]byte(good + " ")) }), "not that of the given key"},
		"short signature":           {whole(func(e *envelope) { e.Signatures[0].Sig = "eA==" }), "not that of the given key"},
		"the set itself":            {string(marshal(t, seal(key, unsigned))), `a statement has no field "measurements"`},
		"older statement":           {payload("Statement/v1", "Statement/v0.1"), `_type is "https://in-toto.io/Statement/v0.1"`},
		"other predicate":           {payload("cloister.dev/measurements/v1", "slsa.dev/provenance/v1"), `predicateType is "https://slsa.dev/provenance/v1"`},
		"no predicateType":          {payload(`"predicateType":"`+PredicateType+`",`, ""), `predicateType is ""`},
		"no predicate":              {payload(`,"predicate":`+unsigned, ""), "is empty"},
		"null for a predicate":      {payload(unsigned, "null"), "must be a JSON object"},
		"predicate twice":           {payload(`"predicate":`, `"predicate":`+string(other)+`,"predicate":`), `"predicate" twice`},
		"entry that pins no code":   {payload(`"PCR8"`, `"PCR3"`), "pins no code"},
		"duplicate in an entry":     {payload(`"PCR8"`, `"PCR8":"`+set[1].PCR8+`","PCR8"`), `"PCR8" twice`},
		"unknown in the statement":  {payload(`"_type"`, `"x":1,"_type"`), `no field "x"`},
		"data after the statement":  {string(marshal(t, seal(key, good+"{}"))), "data follows"},
		"another set":               {payload(unsigned, string(other)), "subject is not its own measurement set"},
		"no subject":                {payload(`"subject":[`, `"subject":[],"x":[`), `no field "x"`},
		"empty subject":             {payload(good[strings.Index(good, `[{"name"`):strings.Index(good, `,"predicateType"`)], "[]"), "subject is not its own"},
		"two subjects":              {payload(`"subject":[`, `"subject":[{"name":"b","digest":{"sha256":"00"}},`), "subject is not its own"},
		"subject of another name":   {payload("measurements.json", "app.eif"), "subject is not its own"},
		"subject without digest":    {payload(`"digest":{"sha256":`, `"digest":{},"x":{"sha256":`), `no field "x"`},
		"subject with more":         {payload(`"name":`, `"uri":"x","name":`), `no field "uri"`},
		"subject with other digest": {payload(`{"sha256":`, `{"sha512":"00","sha256":`), "subject is not its own"},
		"subject with other hash":   {payload(`{"sha256":`, `{"sha1":`), "subject is not its own"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(tt.in), key.Public())
			if err == nil || !strings.Contains(err.Error(), tt.want) || got != nil {
				t.Errorf("got %v, %v, want an error with %q", got, err, tt.want)
			}
		})
	}
}

// TestParseWithoutKey: what is signed does not pass for a set that nobody has to check.
func TestParseWithoutKey(t *testing.T) {
	b, err := Sign(set, ed25519Key(t))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Parse(b, nil); !errors.Is(err, ErrSigned) || got != nil {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err := Parse(marshal(t, set), nil); err != nil || !cmp.Equal(set, got) {
		t.Errorf("got %v, %v", got, err)
	}
	var none *ecdsa.PublicKey
	if got, err := Parse(marshal(t, set), none); err == nil {
		t.Errorf("a nil pointer to a key counts as no key: %v", got)
	}
}

// TestAlphabets: both of RFC 4648 are taken, whatever an envelope's keyid says.
func TestAlphabets(t *testing.T) {
	key := ed25519Key(t)
	e := seal(key, statementOf(t, set)+strings.Repeat(" ", 2)+"\t")
	for _, field := range []*string{&e.Payload, &e.Signatures[0].Sig} {
		b, err := base64.StdEncoding.DecodeString(*field)
		if err != nil {
			t.Fatal(err)
		}
		*field = base64.URLEncoding.EncodeToString(b)
	}
	e.Signatures[0].KeyID = "SHA256:somebody"
	if _, err := Parse(marshal(t, e), key.Public()); err != nil {
		t.Error(err)
	}
}

func TestKeysRefused(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p256 := ecdsaKey(t, elliptic.P256())
	p521 := ecdsaKey(t, elliptic.P521())
	sec1, err := x509.MarshalECPrivateKey(p256)
	if err != nil {
		t.Fatal(err)
	}
	private, public := privatePEM(t, p256), publicPEM(t, p256.Public())
	for name, tt := range map[string]struct {
		file    []byte
		private string // in the error of ParsePrivateKey; empty: none
		public  string
	}{
		"private":       {private, "", "not \"PUBLIC KEY\": it must be a public key; `openssl pkey -pubout"},
		"public":        {public, "not \"PRIVATE KEY\"", ""},
		"empty":         {nil, "no PEM block", "no PEM block"},
		"SEC 1":         {pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}), "openssl pkcs8 -topk8 -nocrypt", "not \"PUBLIC KEY\""},
		"encrypted":     {pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: sec1}), "without a password", "not \"PUBLIC KEY\""},
		"two private":   {bytes.Repeat(private, 2), "more than one key", "not \"PUBLIC KEY\""},
		"two public":    {bytes.Repeat(public, 2), "not \"PRIVATE KEY\"", "more than one key"},
		"no private":    {pem.EncodeToMemory(&pem.Block{Type: privateBlock, Bytes: []byte{1}}), "read private key", "not \"PUBLIC KEY\""},
		"no public":     {pem.EncodeToMemory(&pem.Block{Type: publicBlock, Bytes: []byte{1}}), "not \"PRIVATE KEY\"", "read public key"},
		"private RSA":   {privatePEM(t, rsaKey), "must be ECDSA on P-256", "not \"PUBLIC KEY\""},
		"public RSA":    {publicPEM(t, rsaKey.Public()), "not \"PRIVATE KEY\"", "must be ECDSA on P-256"},
		"private P-521": {privatePEM(t, p521), "must be ECDSA on P-256", "not \"PUBLIC KEY\""},
		"public P-521":  {publicPEM(t, p521.Public()), "not \"PRIVATE KEY\"", "must be ECDSA on P-256"},
	} {
		t.Run(name, func(t *testing.T) {
			check := func(what string, key any, err error, want string) {
				if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
					t.Errorf("%s: got %v, want %q", what, err, want)
				}
				if err != nil && key != nil {
					t.Errorf("%s: a key comes with the error %v", what, err)
				}
			}
			signer, err := ParsePrivateKey(tt.file)
			check("private", signer, err, tt.private)
			public, err := ParsePublicKey(tt.file)
			check("public", public, err, tt.public)
		})
	}
	if _, err := Sign(set, rsaKey); err == nil {
		t.Error("RSA signs")
	}
	if _, err := Sign(nil, p256); err == nil {
		t.Error("an empty set is signed")
	}
}

// FuzzParse: an envelope that a key has not signed gives no set, whatever it is.
func FuzzParse(f *testing.F) {
	b, err := Sign(set, ecdsaKey(f, elliptic.P256()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(marshal(f, seal(ed25519Key(f), "{}")))
	f.Add(marshal(f, set))
	key := ecdsaKey(f, elliptic.P256()).Public()
	f.Fuzz(func(t *testing.T, data []byte) {
		if got, err := Parse(data, key); err == nil {
			t.Errorf("got %v from\n%s", got, data)
		}
	})
}

// FuzzStatement: what a signer may have put into an envelope is a set that can be signed again to the same,
// or refused.
func FuzzStatement(f *testing.F) {
	good := statementOf(f, set)
	f.Add(good)
	f.Add(strings.Replace(good, `"sha256"`, `"sha256":"00","sha512"`, 1))
	f.Add("{}")
	key := ed25519Key(f)
	f.Fuzz(func(t *testing.T, payload string) {
		got, err := Parse(marshal(t, seal(key, payload)), key.Public())
		if err != nil {
			if got != nil {
				t.Errorf("%v comes with the error %v", got, err)
			}
			return
		}
		b, err := Sign(got, key)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(b, key.Public())
		if err != nil || !cmp.Equal(got, again) {
			t.Errorf("signed again: %v, %v, want %v", again, err, got)
		}
	})
}
