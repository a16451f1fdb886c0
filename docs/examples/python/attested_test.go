// Package python tests the example client: it accepts what the Go client accepts and refuses the rest.
package python

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

func TestClient(t *testing.T) {
	var failure bytes.Buffer
	venv := exec.CommandContext(t.Context(), "../../../hack/python.sh", "requirements.txt")
	venv.Stderr = &failure
	out, err := venv.Output()
	if err != nil {
		t.Fatalf("make the virtual environment: %v: %s", err, &failure)
	}
	interpreter := strings.TrimSpace(string(out))

	now := time.Now()
	rootPEM, rootKey, err := nsmdev.NewRoot(now.Add(-24 * time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := nsmdev.New(rootPEM, rootKey)
	if err != nil {
		t.Fatal(err)
	}
	strangerPEM, _, err := nsmdev.NewRoot(now.Add(-24 * time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	key, spki := newKey(t)
	_, otherSPKI := newKey(t)
	pcrs := map[uint][]byte{}
	for i := range uint(17) {
		pcrs[i] = bytes.Repeat([]byte{byte(0xa0 + i)}, workload.PCRSize)
	}
	right := map[string]string{"label": "1.4.0", "PCR0": hex.EncodeToString(pcrs[0]), "PCR16": strings.ToUpper(hex.EncodeToString(pcrs[16]))}

	tests := map[string]struct {
		document func(*nsmdev.Document)
		signed   func([]byte) []byte     // changes the document after it was signed
		entry    func(map[string]string) // changes the client's entry
		plain    bool                    // no document at all
		root     []byte                  // that the client trusts
		want     string                  // in the refusal; empty if the enclave is accepted
	}{
		"accepted":             {},
		"PCR0":                 {entry: func(e map[string]string) { e["PCR0"] = "b" + e["PCR0"][1:] }, want: "no measurement matches"},
		"PCR16":                {entry: func(e map[string]string) { e["PCR16"] = "c" + e["PCR16"][1:] }, want: "no measurement matches"},
		"register not shown":   {document: func(d *nsmdev.Document) { delete(d.PCRs, 8) }, entry: func(e map[string]string) { e["PCR8"] = strings.Repeat("a8", 48) }, want: "no measurement matches"},
		"register empty":       {document: func(d *nsmdev.Document) { delete(d.PCRs, 8) }, entry: func(e map[string]string) { e["PCR8"] = "" }, want: "not one SHA-384 digest"},
		"pins no workload":     {entry: func(e map[string]string) { delete(e, "PCR16") }, want: "pins too little"},
		"pins no code":         {entry: func(e map[string]string) { delete(e, "PCR0") }, want: "pins too little"},
		"unknown member":       {entry: func(e map[string]string) { e["PCRX"] = e["PCR0"] }, want: "invalid literal"},
		"another root":         {root: strangerPEM, want: "InvalidSignature"},
		"old":                  {document: func(d *nsmdev.Document) { d.Timestamp = now.Add(-16 * time.Minute) }, want: "old"},
		"of the future":        {document: func(d *nsmdev.Document) { d.Timestamp = now.Add(6 * time.Minute) }, want: "old"},
		"of a client":          {document: func(d *nsmdev.Document) { d.UserData = []byte(attestation.UserDataClient) }, want: "not for a TLS server"},
		"of an audit":          {document: func(d *nsmdev.Document) { d.UserData = nil }, want: "not for a TLS server"},
		"another key":          {document: func(d *nsmdev.Document) { d.PublicKey = otherSPKI }, want: "another key"},
		"debug mode":           {document: func(d *nsmdev.Document) { d.PCRs[0] = make([]byte, workload.PCRSize) }, want: "debug mode"},
		"signature":            {signed: func(b []byte) []byte { b[len(b)-1] ^= 1; return b }, want: "InvalidSignature"},
		"changed after":        {signed: func(b []byte) []byte { return bytes.Replace(b, pcrs[3], pcrs[4], 1) }, want: "InvalidSignature"},
		"ordinary certificate": {plain: true, want: "ExtensionNotFound"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			document := nsmdev.Document{ModuleID: "i-0-enc0", Timestamp: now, PCRs: map[uint][]byte{}, PublicKey: spki, UserData: []byte(attestation.UserDataServer)}
			for i, v := range pcrs {
				document.PCRs[i] = v
			}
			if tt.document != nil {
				tt.document(&document)
			}
			signed, err := signer.Sign(document)
			if err != nil {
				t.Fatal(err)
			}
			if tt.signed != nil {
				signed = tt.signed(signed)
			}
			der, err := attestation.NewCertificate(key, signed, now.Add(-time.Hour), now.Add(time.Hour))
			if tt.plain {
				template := &x509.Certificate{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour)}
				der, err = x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
			}
			if err != nil {
				t.Fatal(err)
			}
			var requests atomic.Int64
			server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				io.WriteString(w, "from the enclave: "+r.URL.Path)
			}))
			server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
			server.Config.ErrorLog = log.New(io.Discard, "", 0)
			server.StartTLS()
			defer server.Close()

			entry := map[string]string{}
			for k, v := range right {
				entry[k] = v
			}
			if tt.entry != nil {
				tt.entry(entry)
			}
			set, err := json.Marshal(map[string]any{"measurements": []any{entry}})
			if err != nil {
				t.Fatal(err)
			}
			root := tt.root
			if root == nil {
				root = rootPEM
			}
			var stdout, stderr bytes.Buffer
			client := exec.CommandContext(t.Context(), interpreter, "attested.py", write(t, set), write(t, root), server.Listener.Addr().String(), "/page")
			client.Stdout, client.Stderr = &stdout, &stderr
			err = client.Run()
			if tt.want == "" {
				if err != nil || stdout.String() != "from the enclave: /page" || stderr.String() != "DEVELOPMENT, not a real enclave\n" {
					t.Errorf("%v, stdout %q, stderr %s", err, &stdout, &stderr)
				}
				return
			}
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || stdout.Len() > 0 ||
				!strings.HasPrefix(stderr.String(), "attested.py: refused, nothing was sent: ") || !strings.Contains(stderr.String(), tt.want) {
				t.Errorf("%v, stdout %q, stderr %s; want a refusal with %q", err, &stdout, &stderr, tt.want)
			}
			if n := requests.Load(); n != 0 {
				t.Errorf("%d requests were sent", n)
			}
		})
	}
}

func newKey(t *testing.T) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return key, spki
}

func write(t *testing.T, content []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
