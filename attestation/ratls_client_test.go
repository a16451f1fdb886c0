package attestation

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"cloister.dev/cloister/workload"
)

// serverCertificate is an ordinary server's.
func serverCertificate(t testing.TB) tls.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"collector"}, NotBefore: testTime, NotAfter: testTime.Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func (e *enclave) clientVerifier(t testing.TB) *ClientVerifier {
	t.Helper()
	v, err := NewClientVerifier(Options{
		Root:         e.signer.Root(),
		Measurements: workload.MeasurementSet{{PCR0: hexReg(0xa0), PCR16: hexReg(0xb0)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// accept connects client and server in memory and returns what the server's handshake said, and its
// state. The client sends one byte, which the server reads when the handshake has succeeded.
func accept(t *testing.T, client, server *tls.Config) (state tls.ConnectionState, got int, err error) {
	t.Helper()
	a, b := net.Pipe()
	go func() {
		defer a.Close()
		conn := tls.Client(a, client)
		if conn.HandshakeContext(t.Context()) == nil {
			go conn.Write([]byte("x"))
			conn.Read(make([]byte, 1)) // an alert, if the server refuses
		}
	}()
	conn := tls.Server(b, server)
	defer b.Close()
	if err := conn.HandshakeContext(t.Context()); err != nil {
		return tls.ConnectionState{}, 0, err
	}
	got, err = conn.Read(make([]byte, 1))
	return conn.ConnectionState(), got, err
}

func TestServerConfig(t *testing.T) {
	e := newEnclave(t)
	v := e.clientVerifier(t)
	base := &tls.Config{
		Certificates: []tls.Certificate{serverCertificate(t)}, Time: at(testTime), ClientAuth: tls.NoClientCert,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return &tls.Config{}, nil },
	}
	mine := certificate(t, e.key, e.document(t, UserDataClient))
	client := &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{mine}}
	state, got, err := accept(t, client, v.ServerConfig(base))
	if err != nil || got != 1 {
		t.Fatalf("handshake: %v, %d bytes read", err, got)
	}
	d, err := v.v.verifyConnection(state, testTime)
	if err != nil {
		t.Fatal(err)
	}
	if !d.Development || string(d.UserData) != UserDataClient {
		t.Errorf("Development %v, user data %q", d.Development, d.UserData)
	}
	// The connection lives on, its document does not.
	_, err = v.v.verifyConnection(state, testTime.Add(DefaultMaxAge+time.Second))
	wantRule(t, err, RuleAge, "15m1s old")

	called := errors.New("base was asked")
	base.VerifyConnection = func(tls.ConnectionState) error { return called }
	if _, _, err := accept(t, client, v.ServerConfig(base)); !errors.Is(err, called) {
		t.Errorf("got error %v, want base's", err)
	}
}

func TestServerConfigRefuses(t *testing.T) {
	e := newEnclave(t)
	good := certificate(t, e.key, e.document(t, UserDataClient))
	relay := newKey(t)
	old := *e
	old.now = testTime.Add(-DefaultMaxAge - time.Second)
	stranger := newEnclave(t)
	tests := map[string]struct {
		client *tls.Config
		rule   Rule
		want   string
	}{
		"no certificate":                            {&tls.Config{}, "", "client didn't provide a certificate"},
		"an ordinary certificate":                   {&tls.Config{Certificates: []tls.Certificate{serverCertificate(t)}}, RuleCertificate, "without an attestation document"},
		"the certificate with which it serves":      {&tls.Config{Certificates: []tls.Certificate{e.certificate(t)}}, RuleUserData, "user_data"},
		"a relay's key with the enclave's document": {&tls.Config{Certificates: []tls.Certificate{certificate(t, relay, e.document(t, UserDataClient))}}, RulePublicKey, "public_key is not the expected one"},
		"the enclave's certificate without its key": {&tls.Config{Certificates: []tls.Certificate{{Certificate: good.Certificate, PrivateKey: relay}}}, "", "invalid signature"},
		"too old":      {&tls.Config{Certificates: []tls.Certificate{certificate(t, e.key, old.document(t, UserDataClient))}}, RuleAge, "15m1s old"},
		"another root": {&tls.Config{Certificates: []tls.Certificate{certificate(t, stranger.key, stranger.document(t, UserDataClient))}}, RuleChain, "not signed by"},
		"a chain":      {&tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{good.Certificate[0], good.Certificate[0]}, PrivateKey: e.key}}}, RuleCertificate, "2 certificates"},
		"TLS 1.2":      {&tls.Config{Certificates: []tls.Certificate{good}, MaxVersion: tls.VersionTLS12}, "", "unsupported versions"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			server := e.clientVerifier(t).ServerConfig(&tls.Config{Certificates: []tls.Certificate{serverCertificate(t)}, Time: at(testTime)})
			tc.client.InsecureSkipVerify = true
			_, got, err := accept(t, tc.client, server)
			if tc.rule != "" {
				wantRule(t, err, tc.rule, tc.want)
			} else if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
			if got != 0 {
				t.Error("the server read from a client that it refused")
			}
		})
	}
	if _, err := NewClientVerifier(Options{UserData: []byte(UserDataServer), Measurements: e.verifier(t).opts.Measurements}); err == nil {
		t.Error("a client verifier for the documents of servers was made")
	}
}
