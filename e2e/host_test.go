package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsmdev"
)

// A recorder between the sidecar and the enclave reads a request to a port that the author declared
// plaintext, and not a word of one to any other port.
func TestHostSeesNoPlaintext(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app", "serve", "-listen", ":8080,:8081")
	pod.Spec.Containers[0].Ports = append(pod.Spec.Containers[0].Ports, corev1.ContainerPort{ContainerPort: 8081})
	pod.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\nports: [{port: 8081, plaintext: true}]\n"
	set, _ := c.measure(t, pod)
	ns.create(t, pod)
	running := ns.ready(t, "app", 1)[0]
	private := ns.forward(t, "pod/app", 8080)
	open := ns.forward(t, "pod/app", 8081)

	dir := "/var/lib/kubelet/pods/" + string(running.UID) + "/volumes/kubernetes.io~empty-dir/cloister-run/vsock/1"
	recorder, _ := c.start(t, "record", dir)
	const declared, secret = "everybody-may-read-this", "only-the-enclave-may-read-this"
	if got := plainGet(t, open, "/echo?"+declared); got != declared {
		t.Errorf("plaintext port: got %q", got)
	}
	if got := c.answer(t, private, set, "/echo?"+secret); got != secret {
		t.Errorf("TLS port: got %q", got)
	}
	seen := recorder.stop(t)

	if n := bytes.Count(seen, []byte(declared)); n < 2 {
		t.Errorf("the recorder saw the plaintext %d times, not in request and answer: it does not stand where the data pass", n)
	}
	if bytes.Contains(seen, []byte(secret)) || bytes.Contains(seen, []byte("/echo?only")) {
		t.Error("the recorder saw the request to the TLS port in the clear")
	}
	if !bytes.Contains(seen, []byte("app.example")) {
		t.Error("the recorder did not see the client's greeting (server name) to the TLS port: the request did not pass it")
	}
}

// A relay that ends TLS itself is refused, whatever document it shows, unless the development root
// itself vouches for the relay's own key. The request never reaches it.
func TestRelayIsRefused(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	set, _ := c.measure(t, pod)
	ns.create(t, pod)
	ns.ready(t, "app", 1)
	enclave := ns.forward(t, "pod/app", 8080)

	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	shown := enclaveDocument(t, enclave)
	parsed, err := attestation.ParseUnverified(bytes.Clone(shown))
	if err != nil {
		t.Fatal(err)
	}
	signer := developmentSigner(t, c)
	// forge signs what a relay that owns the development key could show.
	forge := func(s *nsmdev.Signer, age time.Duration, userData string) []byte {
		doc, err := s.Sign(nsmdev.Document{
			ModuleID: parsed.ModuleID, PCRs: parsed.PCRs, Timestamp: time.Now().Add(-age), PublicKey: public, UserData: []byte(userData),
		})
		if err != nil {
			t.Fatal(err)
		}
		return doc
	}
	certPEM, keyPEM, err := nsmdev.NewRoot(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := nsmdev.New(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	const nonce = "00112233445566778899aabbccddeeff"
	wellKnown := []byte(c.answer(t, enclave, set, "/.well-known/cloister/attestation?nonce="+nonce))

	for name, tt := range map[string]struct {
		document []byte
		flags    []string
		refused  string // by which rule; empty if the relay is believed
	}{
		"forged with the development key": {forge(signer, 0, attestation.UserDataServer), nil, ""},
		"the enclave's own document":      {shown, nil, "public_key"},
		"a document for audits":           {wellKnown, nil, "user_data"},
		"a client's document":             {forge(signer, 0, attestation.UserDataClient), nil, "user_data"},
		"user data with a tail":           {forge(signer, 0, attestation.UserDataServer+"\n"), nil, "user_data"},
		"too old":                         {forge(signer, 16*time.Minute, attestation.UserDataServer), nil, "age"},
		"too old by choice":               {forge(signer, 2*time.Minute, attestation.UserDataServer), []string{"--max-age", "1m"}, "age"},
		"old, accepted by choice":         {forge(signer, 16*time.Minute, attestation.UserDataServer), []string{"--max-age", "20m"}, ""},
		"signed by another root":          {forge(stranger, 0, attestation.UserDataServer), nil, "chain"},
	} {
		t.Run(name, func(t *testing.T) {
			der, err := attestation.NewCertificate(key, tt.document, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
			if err != nil {
				t.Fatal(err)
			}
			var requests atomic.Int64
			relay := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				io.WriteString(w, "from the relay")
			}))
			relay.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
			relay.Config.ErrorLog = log.New(io.Discard, "", 0)
			relay.StartTLS()
			defer relay.Close()

			r := c.curl(t, relay.Listener.Addr().String(), set, "/", tt.flags...)
			if tt.refused == "" {
				if r.code != 0 || r.stdout != "from the relay" {
					t.Errorf("exit code %d, stdout %q, stderr %s: the relay of this test does not work", r.code, r.stdout, r.stderr)
				}
				return
			}
			if r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, tt.refused) {
				t.Errorf("exit code %d, stdout %q, stderr %s; want 1, nothing, and %q named", r.code, r.stdout, r.stderr, tt.refused)
			}
			if n := requests.Load(); n != 0 {
				t.Errorf("%d requests reached the relay", n)
			}
		})
	}

	t.Run("audit", func(t *testing.T) {
		want, err := hex.DecodeString(nonce)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := attestation.Verify(bytes.Clone(wellKnown), attestation.Options{Root: signer.Root(), Nonce: want}); err != nil {
			t.Errorf("the document for audits: %v", err)
		}
	})
}

// enclaveDocument is the document in the certificate that the enclave at addr shows.
func enclaveDocument(t *testing.T, addr string) []byte {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1", attestation.ALPN}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	doc, err := attestation.DocumentFromCertificate(conn.ConnectionState().PeerCertificates[0])
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// developmentSigner signs with the development key.
func developmentSigner(t *testing.T, c *cluster) *nsmdev.Signer {
	t.Helper()
	cert, err := os.ReadFile(c.root)
	if err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(c.key)
	if err != nil {
		t.Fatal(err)
	}
	s, err := nsmdev.New(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
