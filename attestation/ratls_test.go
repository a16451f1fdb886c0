package attestation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"cloister.dev/cloister/internal/cbor"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

// enclave makes attested certificates as the gateway of an enclave does.
type enclave struct {
	signer *nsmdev.Signer
	key    *ecdsa.PrivateKey
	now    time.Time
}

func newEnclave(t testing.TB) *enclave {
	t.Helper()
	return &enclave{newSigner(t), newKey(t), testTime}
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// document returns a document for the key, with the given user data.
func (e *enclave) document(t testing.TB, userData string) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(e.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	doc, err := e.signer.Sign(nsmdev.Document{
		ModuleID:  "i-0123456789abcdef0-enc0123456789abcdef",
		Timestamp: e.now,
		PCRs:      map[uint][]byte{0: bytes.Repeat([]byte{0xa0}, 48), 16: bytes.Repeat([]byte{0xb0}, 48)},
		PublicKey: spki,
		UserData:  []byte(userData),
	})
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// certificate returns a certificate for key that carries doc.
func certificate(t testing.TB, key *ecdsa.PrivateKey, doc []byte) tls.Certificate {
	t.Helper()
	der, err := NewCertificate(key, doc, testTime.Add(-time.Minute), testTime.Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (e *enclave) certificate(t testing.TB) tls.Certificate {
	return certificate(t, e.key, e.document(t, UserDataServer))
}

func (e *enclave) verifier(t testing.TB) *Verifier {
	t.Helper()
	v, err := NewVerifier(Options{
		Root:         e.signer.Root(),
		Measurements: workload.MeasurementSet{{PCR0: hexReg(0xa0), PCR16: hexReg(0xb0)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// at is a clock that stands still.
func at(now time.Time) func() time.Time { return func() time.Time { return now } }

// handshake connects client and server in memory. The server tries to read one byte; got is what it
// read, and clientErr what the client's handshake said.
func handshake(t *testing.T, client, server *tls.Config) (state tls.ConnectionState, got []byte, clientErr error) {
	t.Helper()
	a, b := net.Pipe()
	defer a.Close()
	read := make(chan []byte)
	go func() {
		defer b.Close()
		conn := tls.Server(b, server)
		buf := make([]byte, 1)
		n, _ := conn.Read(buf)
		read <- buf[:n]
	}()
	conn := tls.Client(a, client)
	clientErr = conn.HandshakeContext(t.Context())
	if clientErr == nil {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		state = conn.ConnectionState()
	}
	a.Close()
	return state, <-read, clientErr
}

func TestClientConfig(t *testing.T) {
	e := newEnclave(t)
	v := e.verifier(t)
	client := v.ClientConfig(&tls.Config{Time: at(testTime), ServerName: "any.example"})
	server := &tls.Config{Certificates: []tls.Certificate{e.certificate(t)}}
	state, got, err := handshake(t, client, server)
	if err != nil || string(got) != "x" {
		t.Fatalf("handshake: %v, server read %q", err, got)
	}
	d, err := v.verifyConnection(state, testTime)
	if err != nil {
		t.Fatal(err)
	}
	if !d.Development || string(d.UserData) != UserDataServer {
		t.Errorf("Development %v, user data %q", d.Development, d.UserData)
	}
}

func TestClientConfigRefuses(t *testing.T) {
	e := newEnclave(t)
	good := e.certificate(t)
	relay := newKey(t)
	plain := func(extensions ...pkix.Extension) tls.Certificate {
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: testTime, NotAfter: testTime.Add(time.Hour), ExtraExtensions: extensions}
		der, err := x509.CreateCertificate(rand.Reader, template, template, e.key.Public(), e.key)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: e.key}
	}
	old := *e
	old.now = testTime.Add(-DefaultMaxAge - time.Second)
	stranger := newEnclave(t)
	expired, err := NewCertificate(e.key, e.document(t, UserDataServer), testTime.Add(-time.Hour), testTime.Add(-6*time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		server *tls.Config
		rule   Rule
		want   string // text of an *Error of the rule, or of another error if rule is empty
	}{
		"a relay's key with the enclave's document": {&tls.Config{Certificates: []tls.Certificate{certificate(t, relay, e.document(t, UserDataServer))}}, RulePublicKey, "public_key is not the expected one"},
		"the enclave's certificate without its key": {&tls.Config{Certificates: []tls.Certificate{{Certificate: good.Certificate, PrivateKey: relay}}}, "", ""},
		"a document of a client":                    {&tls.Config{Certificates: []tls.Certificate{certificate(t, e.key, e.document(t, UserDataClient))}}, RuleUserData, "user_data"},
		"user data with more at its end":            {&tls.Config{Certificates: []tls.Certificate{certificate(t, e.key, e.document(t, UserDataServer+"\n"))}}, RuleUserData, "user_data"},
		"no user data":                              {&tls.Config{Certificates: []tls.Certificate{certificate(t, e.key, e.document(t, ""))}}, RuleUserData, "user_data"},
		"too old":                                   {&tls.Config{Certificates: []tls.Certificate{old.certificate(t)}}, RuleAge, "15m1s old"},
		"another root":                              {&tls.Config{Certificates: []tls.Certificate{stranger.certificate(t)}}, RuleChain, "not signed by"},
		"an expired certificate":                    {&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{expired}, PrivateKey: e.key}}}, RuleCertificate, "the certificate is valid from"},
		"an ordinary certificate":                   {&tls.Config{Certificates: []tls.Certificate{plain()}}, RuleCertificate, "without an attestation document"},
		"an empty extension":                        {&tls.Config{Certificates: []tls.Certificate{plain(pkix.Extension{Id: oidCMW})}}, RuleCertificate, "not a wrapped Nitro document"},
		"a chain":                                   {&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{good.Certificate[0], good.Certificate[0]}, PrivateKey: e.key}}}, RuleCertificate, "2 certificates"},
		"TLS 1.2":                                   {&tls.Config{Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS12}, "", "protocol version"},
		"the request selected as protocol":          {&tls.Config{Certificates: []tls.Certificate{good}, NextProtos: []string{ALPN}}, RuleCertificate, `selected "cloister/1"`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			client := e.verifier(t).ClientConfig(&tls.Config{Time: at(testTime)})
			_, got, err := handshake(t, client, tc.server)
			if tc.rule != "" {
				wantRule(t, err, tc.rule, tc.want)
			} else if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
			if len(got) != 0 {
				t.Error("the client sent data to a server that it refused")
			}
		})
	}
}

func TestClientConfigKeepsBase(t *testing.T) {
	e := newEnclave(t)
	called := errors.New("base was asked")
	base := &tls.Config{
		Time:               at(testTime),
		NextProtos:         []string{"h2", "http/1.1"},
		ClientSessionCache: tls.NewLRUClientSessionCache(1),
		VerifyConnection:   func(tls.ConnectionState) error { return called },
	}
	client := e.verifier(t).ClientConfig(base)
	if !slices.Equal(client.NextProtos, []string{"h2", "http/1.1", ALPN}) || len(base.NextProtos) != 2 {
		t.Errorf("NextProtos = %q, base %q", client.NextProtos, base.NextProtos)
	}
	if client.ClientSessionCache != nil || !client.SessionTicketsDisabled {
		t.Error("sessions may be resumed")
	}
	if _, _, err := handshake(t, client, &tls.Config{Certificates: []tls.Certificate{e.certificate(t)}}); !errors.Is(err, called) {
		t.Errorf("got error %v, want base's", err)
	}
}

// TestHTTP uses net/http as clients do: the request's protocol is negotiated as ever, the attested
// certificate is shown only to those who ask for it.
func TestHTTP(t *testing.T) {
	e := newEnclave(t)
	e.now = time.Now()
	der, err := NewCertificate(e.key, e.document(t, UserDataServer), e.now.Add(-time.Minute), e.now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	attested := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: e.key}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) }))
	server.EnableHTTP2 = true
	server.TLS = &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		if !slices.Contains(hello.SupportedProtos, ALPN) {
			return nil, nil // httptest's own
		}
		config := &tls.Config{Certificates: []tls.Certificate{attested}}
		if len(hello.SupportedProtos) > 1 {
			config.NextProtos = []string{"h2", "http/1.1"}
		}
		return config, nil
	}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	defer server.Close()

	for name, http2 := range map[string]bool{"HTTP/2.0": true, "HTTP/1.1": false} {
		t.Run(name, func(t *testing.T) {
			v := e.verifier(t)
			transport := &http.Transport{TLSClientConfig: v.ClientConfig(nil), ForceAttemptHTTP2: http2}
			defer transport.CloseIdleConnections()
			resp, err := (&http.Client{Transport: transport}).Get(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil || string(body) != name {
				t.Errorf("got %q, %v", body, err)
			}
			d, err := v.Document(*resp.TLS)
			if err != nil || d.ModuleID == "" {
				t.Errorf("Document() = %+v, %v", d, err)
			}
		})
	}

	resp, err := server.Client().Get(server.URL)
	if err != nil {
		t.Fatalf("an ordinary client: %v", err)
	}
	resp.Body.Close()

	v, err := NewVerifier(Options{Root: e.signer.Root(), Measurements: workload.MeasurementSet{{PCR0: hexReg(0xa0), PCR16: hexReg(0xb1)}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = (&http.Client{Transport: &http.Transport{TLSClientConfig: v.ClientConfig(nil)}}).Get(server.URL)
	wantRule(t, err, RuleMeasurement, "PCR16 expected "+hexReg(0xb1)+", seen "+hexReg(0xb0))
}

func TestCache(t *testing.T) {
	e := newEnclave(t)
	v := e.verifier(t)
	now := testTime
	client := v.ClientConfig(&tls.Config{Time: func() time.Time { return now }})
	server := &tls.Config{Certificates: []tls.Certificate{e.certificate(t)}}
	var first *Document
	for _, age := range []time.Duration{0, DefaultMaxAge} {
		now = testTime.Add(age)
		state, _, err := handshake(t, client, server)
		if err != nil {
			t.Fatalf("at the age of %s: %v", age, err)
		}
		d, err := v.verifyConnection(state, now)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = d
		}
		if n := len(v.certificates.entries); d != first || n != 1 {
			t.Errorf("at the age of %s: verified anew, %d entries", age, n)
		}
	}
	now = testTime.Add(DefaultMaxAge + time.Second)
	_, _, err := handshake(t, client, server)
	wantRule(t, err, RuleAge, "old at")
	now = testTime.Add(-Skew - time.Second)
	_, _, err = handshake(t, client, server)
	wantRule(t, err, RuleAge, "future")

	// A cached certificate proves nothing about a connection that another key made.
	now = testTime
	server.Certificates[0].PrivateKey = newKey(t)
	if _, _, err := handshake(t, client, server); err == nil {
		t.Error("accepted the cached certificate without its key")
	}
}

func TestNewVerifierRefuses(t *testing.T) {
	set := workload.MeasurementSet{{PCR0: hexReg(0xa0), PCR16: hexReg(0xb0)}}
	for name, opts := range map[string]Options{
		"no measurements": {},
		"half an entry":   {Measurements: workload.MeasurementSet{{PCR16: hexReg(0xb0)}}},
		"a public key":    {Measurements: set, PublicKey: []byte{1}},
		"a time":          {Measurements: set, Now: testTime},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := NewVerifier(opts); err == nil {
				t.Error("accepted")
			}
		})
	}
}

func TestNewCertificate(t *testing.T) {
	e := newEnclave(t)
	doc := e.document(t, UserDataServer)
	der, err := NewCertificate(e.key, doc, testTime, testTime.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := cert.CheckSignature(cert.SignatureAlgorithm, cert.RawTBSCertificate, cert.Signature); err != nil {
		t.Errorf("it is not self-signed: %v", err)
	}
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(oidCMW) && ext.Critical {
			t.Error("the extension is critical, so ordinary clients fail")
		}
	}
	got, err := DocumentFromCertificate(cert)
	if err != nil || !bytes.Equal(got, doc) {
		t.Errorf("DocumentFromCertificate() = %d bytes, %v; want the %d bytes that went in", len(got), err, len(doc))
	}
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewCertificate(other, doc, testTime, testTime.Add(time.Hour)); err == nil {
		t.Error("accepted a key on P-384")
	}
}

func TestUnwrapRefuses(t *testing.T) {
	octets := func(b []byte) []byte {
		out, err := asn1.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	text := func(b []byte, s string) []byte { return cbor.AppendText(b, s) }
	array := func(n int) []byte { return cbor.AppendArray(nil, n) }
	doc := func(b []byte) []byte { return cbor.AppendBytes(b, []byte("doc")) }
	tests := map[string]struct {
		value []byte
		want  string
	}{
		"nothing":          {nil, "asn1"},
		"JSON choice":      {[]byte{0x0c, 2, '[', ']'}, "asn1"},
		"after the string": {append(octets(cbor.AppendUint(doc(text(array(3), MediaType)), 4)), 0), "1 bytes follow the OCTET STRING"},
		"after the record": {octets(append(cbor.AppendUint(doc(text(array(3), MediaType)), 4), 0)), "1 bytes follow"},
		"other media type": {octets(cbor.AppendUint(doc(text(array(3), "application/eat+cwt")), 4)), `media type is "application/eat+cwt"`},
		"content format":   {octets(cbor.AppendUint(doc(cbor.AppendUint(array(3), 30001)), 4)), "an unsigned integer where a text string"},
		"an endorsement":   {octets(cbor.AppendUint(doc(text(array(3), MediaType)), 2)), "indicator is 2, not 4"},
		"no indicator":     {octets(doc(text(array(2), MediaType))), "2 elements"},
		"four elements":    {octets(cbor.AppendUint(cbor.AppendUint(doc(text(array(4), MediaType)), 4), 4)), "more than 3"},
		"empty record":     {octets(array(0)), "0 elements"},
		"a tag":            {octets(cbor.AppendUint(doc(text(append(cbor.AppendTag(nil, 1), array(3)...), MediaType)), 4)), "a tag where an array"},
		"text as value":    {octets(cbor.AppendUint(text(text(array(3), MediaType), "doc"), 4)), "a text string where a byte string"},
		"claims 2^64":      {octets(append(text(array(3), MediaType), 0x5b, 255, 255, 255, 255, 255, 255, 255, 255)), "data ends"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := unwrap(tc.value); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// FuzzUnwrap reads extensions of strangers' certificates.
func FuzzUnwrap(f *testing.F) {
	record := cbor.AppendUint(cbor.AppendBytes(cbor.AppendText(cbor.AppendArray(nil, 3), MediaType), []byte("doc")), cmwEvidence)
	value, err := asn1.Marshal(record)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(value)
	f.Fuzz(func(t *testing.T, value []byte) {
		if doc, err := unwrap(value); err == nil && !bytes.Contains(value, doc) {
			t.Errorf("the document %x is not in the extension", doc)
		}
	})
}

// BenchmarkConnection measures what the verification adds to a handshake: cold, with the whole
// chain, and cached.
func BenchmarkConnection(b *testing.B) {
	e := newEnclave(b)
	cert, err := x509.ParseCertificate(e.certificate(b).Certificate[0])
	if err != nil {
		b.Fatal(err)
	}
	state := tls.ConnectionState{Version: tls.VersionTLS13, PeerCertificates: []*x509.Certificate{cert}}
	v := e.verifier(b)
	b.Run("cold", func(b *testing.B) {
		for b.Loop() {
			clear(v.certificates.entries)
			clear(v.opts.Chains.entries)
			if _, err := v.verifyConnection(state, testTime); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("cached", func(b *testing.B) {
		for b.Loop() {
			if _, err := v.verifyConnection(state, testTime); err != nil {
				b.Fatal(err)
			}
		}
	})
}
