package gateway_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hf/nsm/response"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/workload"
)

func TestAttested(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") }))
	e := newEnclave(t, workload.Port{Port: port})
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2.0": true} {
		t.Run(name, func(t *testing.T) {
			res, body := get(t, e.client(t, port, http2), url(port, "/"))
			if res.Proto != name || body != "hello" {
				t.Errorf("got %s %q", res.Proto, body)
			}
			if res.TLS.Version != tls.VersionTLS13 || res.TLS.DidResume {
				t.Errorf("TLS version %x, resumed %t", res.TLS.Version, res.TLS.DidResume)
			}
		})
	}
}

// What only carries the enclave's document is not the enclave.
func TestImpostorsAreRefused(t *testing.T) {
	module := nsmtest.New(t)
	port := serveWorkload(t, http.NotFoundHandler())
	e := newEnclaveOf(t, module, workload.Port{Port: port})
	client := module.Open(t)

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	attest := func(userData string, publicKey []byte) []byte {
		t.Helper()
		document, err := client.Attest(t.Context(), []byte(userData), nil, publicKey)
		if err != nil {
			t.Fatal(err)
		}
		return document
	}
	enclaves, err := attestation.DocumentFromCertificate(e.dial(t, port).ConnectionState().PeerCertificates[0])
	if err != nil {
		t.Fatal(err)
	}
	good := attest(attestation.UserDataServer, spki)
	module.Age = 16 * time.Minute
	old := attest(attestation.UserDataServer, spki)
	module.Age = 0

	for name, c := range map[string]struct {
		document []byte
		want     attestation.Rule
	}{
		"an honest server":                         {document: good},
		"a relay with the enclave's document":      {document: enclaves, want: attestation.RulePublicKey},
		"a document for TLS clients":               {document: attest(attestation.UserDataClient, spki), want: attestation.RuleUserData},
		"a document of no purpose":                 {document: attest("", spki), want: attestation.RuleUserData},
		"a document without a key":                 {document: attest(attestation.UserDataServer, nil), want: attestation.RulePublicKey},
		"a document that is too old":               {document: old, want: attestation.RuleAge},
		"no document, as a server without enclave": {want: attestation.RuleFormat},
	} {
		t.Run(name, func(t *testing.T) {
			now := time.Now()
			der, err := attestation.NewCertificate(key, c.document, now.Add(-time.Minute), now.Add(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			l := listenWorkload(t)
			received := make(chan []byte, 1)
			go func() {
				raw, err := l.Accept()
				if err != nil {
					received <- nil
					return
				}
				s := tls.Server(raw, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}})
				defer s.Close()
				data, _ := io.ReadAll(s)
				received <- data
			}()
			s, err := tls.Dial("tcp", l.Addr().String(), e.config(t))
			if err == nil {
				io.WriteString(s, "secret")
				s.Close()
			}
			if got := rule(err); got != c.want || (err == nil) != (c.want == "") {
				t.Errorf("refused by %q (%v), want %q", got, err, c.want)
			}
			data := <-received
			if c.want != "" && len(data) > 0 {
				t.Errorf("the client sent %q", data)
			}
			if c.want == "" && string(data) != "secret" {
				t.Errorf("the server received %q", data)
			}
		})
	}

	t.Run("another workload", func(t *testing.T) {
		e := &enclave{module: module, canonical: []byte("other"), listeners: e.listeners}
		_, err := tls.Dial("tcp", e.addr(port), e.config(t))
		if got := rule(err); got != attestation.RuleMeasurement {
			t.Errorf("refused by %q (%v)", got, err)
		}
	})
}

func TestProtocols(t *testing.T) {
	web := serveWorkload(t, http.NotFoundHandler())
	stream := serveStreams(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	e := newEnclave(t, workload.Port{Port: web}, workload.Port{Port: stream, Protocol: workload.ProtocolTCP})
	for name, c := range map[string]struct {
		port     uint32
		offered  []string
		max      uint16
		selected string
		fails    bool
	}{
		"http, no ALPN":                {port: web},
		"http, only cloister/1":        {port: web, offered: []string{"cloister/1"}},
		"http, attested browser":       {port: web, offered: []string{"h2", "http/1.1", "cloister/1"}, selected: "h2"},
		"http, cloister/1 first":       {port: web, offered: []string{"cloister/1", "http/1.1"}, selected: "http/1.1"},
		"http, not attested":           {port: web, offered: []string{"http/1.1", "h2"}, selected: "h2"},
		"http, unknown":                {port: web, offered: []string{"foo"}, fails: true},
		"http, unknown and cloister/1": {port: web, offered: []string{"foo", "cloister/1"}, fails: true},
		"http, TLS 1.2":                {port: web, max: tls.VersionTLS12, fails: true},
		"tcp, no ALPN":                 {port: stream},
		"tcp, anything":                {port: stream, offered: []string{"h2", "foo", "cloister/1"}},
		"tcp, TLS 1.2":                 {port: stream, max: tls.VersionTLS12, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			cache := tls.NewLRUClientSessionCache(1)
			config := &tls.Config{InsecureSkipVerify: true, NextProtos: c.offered, MaxVersion: c.max, ClientSessionCache: cache, ServerName: "app"}
			for range 2 {
				s, err := tls.Dial("tcp", e.addr(c.port), config)
				if (err != nil) != c.fails {
					t.Fatalf("got error %v", err)
				}
				if err != nil {
					return
				}
				state := s.ConnectionState()
				if state.NegotiatedProtocol != c.selected || state.DidResume || state.Version != tls.VersionTLS13 {
					t.Errorf("selected %q, resumed %t, version %x", state.NegotiatedProtocol, state.DidResume, state.Version)
				}
				if _, err := attestation.DocumentFromCertificate(state.PeerCertificates[0]); err != nil {
					t.Error(err)
				}
				// A session ticket would arrive with the first bytes of data.
				s.SetDeadline(time.Now().Add(100 * time.Millisecond))
				s.Read(make([]byte, 1))
				s.Close()
			}
		})
	}
}

func TestFreshDocument(t *testing.T) {
	paths := make(chan string, 100)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { paths <- r.URL.Path })
	port, plain := serveWorkload(t, handler), serveWorkload(t, handler)
	e := newEnclave(t, workload.Port{Port: port}, workload.Port{Port: plain, Plaintext: true})
	nonce := bytes.Repeat([]byte{0xab}, 64)
	verify := func(t *testing.T, res *http.Response, body string) {
		t.Helper()
		if res.StatusCode != 200 || res.Header.Get("Content-Type") != "application/cbor" || res.Header.Get("Cache-Control") != "no-store" {
			t.Fatalf("got %d %v %q", res.StatusCode, res.Header, body)
		}
		d, err := attestation.Verify([]byte(body), attestation.Options{Root: e.module.Root(), Nonce: nonce, Measurements: e.module.Measurements(e.canonical)})
		if err != nil {
			t.Fatal(err)
		}
		if d.UserData != nil || d.PublicKey != nil {
			t.Errorf("user data %x, public key %x: it could be taken for a certificate's", d.UserData, d.PublicKey)
		}
	}
	const path = "/.well-known/cloister/attestation"
	for _, http2 := range []bool{false, true} {
		res, body := get(t, e.client(t, port, http2), url(port, path+"?nonce="+hex.EncodeToString(nonce)))
		verify(t, res, body)
	}
	res, body := get(t, http.DefaultClient, "http://"+e.addr(plain)+path+"?nonce="+strings.ToUpper(hex.EncodeToString(nonce)))
	verify(t, res, body)
	http.DefaultClient.CloseIdleConnections()

	for name, c := range map[string]struct {
		method, query string
		status        int
	}{
		"no nonce":        {method: "GET", status: 400},
		"empty nonce":     {method: "GET", query: "?nonce=", status: 400},
		"odd nonce":       {method: "GET", query: "?nonce=abc", status: 400},
		"no hexadecimal":  {method: "GET", query: "?nonce=zz", status: 400},
		"65 bytes":        {method: "GET", query: "?nonce=" + strings.Repeat("00", 65), status: 400},
		"two nonces":      {method: "GET", query: "?nonce=00&nonce=01", status: 400},
		"semicolon":       {method: "GET", query: "?nonce=00;a=b", status: 400},
		"POST":            {method: "POST", query: "?nonce=00", status: 405},
		"one byte":        {method: "GET", query: "?nonce=00", status: 200},
		"other parameter": {method: "GET", query: "?a=b&nonce=00", status: 200},
	} {
		t.Run(name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), c.method, url(port, path+c.query), nil)
			if err != nil {
				t.Fatal(err)
			}
			if res, body := do(t, e.client(t, port, true), req); res.StatusCode != c.status {
				t.Errorf("got %d %q, want %d", res.StatusCode, body, c.status)
			}
		})
	}
	if len(paths) > 0 {
		t.Errorf("the workload was asked for %s", <-paths)
	}
}

// When too many wait the next caller is told to come back; a module that fails is an error.
func TestFreshDocumentFailures(t *testing.T) {
	module := nsmtest.New(t)
	var blocked atomic.Bool
	asked, gate := make(chan struct{}), make(chan struct{})
	module.Before = func(string) response.ErrorCode {
		if !blocked.Load() {
			return ""
		}
		asked <- struct{}{}
		<-gate
		return response.ECInternalError
	}
	port := serveWorkload(t, http.NotFoundHandler())
	e := newEnclaveOf(t, module, workload.Port{Port: port})
	client := e.client(t, port, true)
	ask := func() (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), "GET", url(port, "/.well-known/cloister/attestation?nonce=00"), nil)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		res, err := client.Do(req)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		res.Body.Close()
		return res.StatusCode, res.Header.Get("Retry-After")
	}
	blocked.Store(true)
	var waiting sync.WaitGroup
	turned := make(chan string, 20)
	for range 17 { // the module holds one of the 16 that may wait
		waiting.Go(func() {
			switch status, retry := ask(); status {
			case 500:
			case 503:
				turned <- retry
			default:
				t.Errorf("got %d", status)
			}
		})
	}
	<-asked
	if retry := <-turned; retry != "1" {
		t.Errorf("Retry-After is %q", retry)
	}
	close(gate)
	for range 15 {
		<-asked
	}
	waiting.Wait()
	if len(turned) > 0 {
		t.Errorf("%d more were turned away", len(turned))
	}
	blocked.Store(false)
	if status, _ := ask(); status != 200 {
		t.Errorf("got %d from the module that works again", status)
	}
}

// A burst of requests for documents is answered or turned away, and delays no handshake.
func TestFreshDocumentBurst(t *testing.T) {
	port := serveWorkload(t, http.NotFoundHandler())
	e := newEnclave(t, workload.Port{Port: port})
	client := e.client(t, port, true)
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			req, err := http.NewRequestWithContext(t.Context(), "GET", url(port, "/.well-known/cloister/attestation?nonce=00"), nil)
			if err != nil {
				t.Error(err)
				return
			}
			res, err := client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			res.Body.Close()
			if res.StatusCode != 200 && (res.StatusCode != 503 || res.Header.Get("Retry-After") == "") {
				t.Errorf("got %d", res.StatusCode)
			}
		})
	}
	all.Wait()
}
