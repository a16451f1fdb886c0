// Package python tests the example client: it accepts what the Go client accepts and refuses the rest.
package python

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
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

	"github.com/fxamacker/cbor/v2"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

const moduleID = "i-0-enc0"

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
	// So that its certificates begin now, whichever test comes first.
	if _, err := signer.Sign(nsmdev.Document{ModuleID: moduleID, Timestamp: now}); err != nil {
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
		chain    func(*chain)            // changes a chain that the document is signed under instead
		end      time.Duration           // of the server's certificate, from now; an hour if it is 0
		plain    bool                    // no document at all
		root     []byte                  // that the client trusts
		want     string                  // in the refusal; empty if the enclave is accepted
	}{
		"accepted":           {},
		"PCR0":               {entry: func(e map[string]string) { e["PCR0"] = "b" + e["PCR0"][1:] }, want: "no measurement matches"},
		"PCR16":              {entry: func(e map[string]string) { e["PCR16"] = "c" + e["PCR16"][1:] }, want: "no measurement matches"},
		"register not shown": {document: func(d *nsmdev.Document) { delete(d.PCRs, 8) }, entry: func(e map[string]string) { e["PCR8"] = strings.Repeat("a8", 48) }, want: "no measurement matches"},
		"register empty":     {document: func(d *nsmdev.Document) { delete(d.PCRs, 8) }, entry: func(e map[string]string) { e["PCR8"] = "" }, want: "not one SHA-384 digest"},
		"pins no workload":   {entry: func(e map[string]string) { delete(e, "PCR16") }, want: "pins too little"},
		"pins no code":       {entry: func(e map[string]string) { delete(e, "PCR0") }, want: "pins too little"},
		"unknown member":     {entry: func(e map[string]string) { e["PCRX"] = e["PCR0"] }, want: "invalid literal"},
		"another root":       {root: strangerPEM, want: "InvalidSignature"},
		"old":                {document: func(d *nsmdev.Document) { d.Timestamp = now.Add(-16 * time.Minute) }, want: "old"},
		"of the future":      {document: func(d *nsmdev.Document) { d.Timestamp = now.Add(6 * time.Minute) }, want: "old"},
		"of a client":        {document: func(d *nsmdev.Document) { d.UserData = []byte(attestation.UserDataClient) }, want: "not for a TLS server"},
		"of an audit":        {document: func(d *nsmdev.Document) { d.UserData = nil }, want: "not for a TLS server"},
		"another key":        {document: func(d *nsmdev.Document) { d.PublicKey = otherSPKI }, want: "another key"},
		"debug mode":         {document: func(d *nsmdev.Document) { d.PCRs[0] = make([]byte, workload.PCRSize) }, want: "debug mode"},
		"signature":          {signed: func(b []byte) []byte { b[len(b)-1] ^= 1; return b }, want: "InvalidSignature"},
		"changed after":      {signed: func(b []byte) []byte { return bytes.Replace(b, pcrs[3], pcrs[4], 1) }, want: "InvalidSignature"},
		"another algorithm": {signed: func(b []byte) []byte {
			return bytes.Replace(b, []byte{0xa1, 0x01, 0x38, 0x22}, []byte{0xa1, 0x01, 0x38, 0x23}, 1) // {1: -36}, ES512
		}, want: "not signed with ES384"},
		"certificate expired":  {end: -6 * time.Minute, want: "not valid now"},
		"ordinary certificate": {plain: true, want: "ExtensionNotFound"},

		"another chain":              {chain: func(*chain) {}},
		"intermediate no authority":  {chain: func(c *chain) { c.intermediate.IsCA = false }, want: "used for what it is not for"},
		"intermediate may not issue": {chain: func(c *chain) { c.intermediate.KeyUsage = x509.KeyUsageDigitalSignature }, want: "used for what it is not for"},
		"leaf an authority":          {chain: func(c *chain) { c.leaf.IsCA, c.leaf.KeyUsage = true, x509.KeyUsageCertSign }, want: "used for what it is not for"},
		"path length":                {chain: func(c *chain) { c.root.MaxPathLenZero = true }, want: "too long"},
		"unknown critical extension": {chain: func(c *chain) {
			c.intermediate.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: asn1.NullBytes}}
		}, want: "unknown critical extension"},
		"leaf expired":         {chain: func(c *chain) { c.leaf.NotAfter = now.Add(-6 * time.Minute) }, want: "not valid now"},
		"intermediate expired": {chain: func(c *chain) { c.intermediate.NotAfter = now.Add(-6 * time.Minute) }, want: "not valid now"},
		"intermediate not yet": {chain: func(c *chain) { c.intermediate.NotBefore = now.Add(6 * time.Minute) }, want: "not valid now"},
		"SHA-256":              {chain: func(c *chain) { c.leaf.SignatureAlgorithm = x509.ECDSAWithSHA256 }, want: "not of P-384"},
		"P-256":                {chain: func(c *chain) { c.curve = elliptic.P256() }, want: "not of P-384"},
		"issued by another":    {chain: func(c *chain) { c.issuer = c.root }, want: "does not match"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			document := nsmdev.Document{ModuleID: moduleID, Timestamp: now, PCRs: map[uint][]byte{}, PublicKey: spki, UserData: []byte(attestation.UserDataServer)}
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
			root := tt.root
			if root == nil {
				root = rootPEM
			}
			if tt.chain != nil {
				root, signed = newChain(now).sign(t, signed, tt.chain)
			}
			end := now.Add(time.Hour)
			if tt.end != 0 {
				end = now.Add(tt.end)
			}
			der, err := attestation.NewCertificate(key, signed, now.Add(-time.Hour), end)
			if tt.plain {
				template := &x509.Certificate{NotBefore: now.Add(-time.Hour), NotAfter: end}
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

// chain are the templates of a document's certificates, which a test makes wrong.
type chain struct {
	root, intermediate, leaf *x509.Certificate
	curve                    elliptic.Curve    // of the intermediate's key
	issuer                   *x509.Certificate // whose name the leaf has as its issuer's
}

func newChain(now time.Time) *chain {
	template := func(name string, ca bool, usage x509.KeyUsage) *x509.Certificate {
		return &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			BasicConstraintsValid: true, IsCA: ca, KeyUsage: usage, SignatureAlgorithm: x509.ECDSAWithSHA384,
		}
	}
	c := &chain{
		root: template("root", true, x509.KeyUsageCertSign), intermediate: template("intermediate", true, x509.KeyUsageCertSign),
		leaf: template("leaf", false, x509.KeyUsageDigitalSignature), curve: elliptic.P384(),
	}
	c.issuer = c.intermediate
	return c
}

// sign makes the chain after change, puts it into a document and signs that anew. The root is in PEM.
func (c *chain) sign(t *testing.T, document []byte, change func(*chain)) (root, signed []byte) {
	t.Helper()
	change(c)
	key := func(curve elliptic.Curve) *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	issue := func(template, issuer *x509.Certificate, public any, private *ecdsa.PrivateKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, template, issuer, public, private)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	rootKey, intermediateKey, leafKey := key(elliptic.P384()), key(c.curve), key(elliptic.P384())
	rootDER := issue(c.root, c.root, rootKey.Public(), rootKey)

	var sign1 []any // COSE_Sign1, RFC 9052
	if err := cbor.Unmarshal(document, &sign1); err != nil {
		t.Fatal(err)
	}
	var payload map[string]any
	if err := cbor.Unmarshal(sign1[2].([]byte), &payload); err != nil {
		t.Fatal(err)
	}
	payload["cabundle"] = [][]byte{rootDER, issue(c.intermediate, c.root, intermediateKey.Public(), rootKey)}
	payload["certificate"] = issue(c.leaf, c.issuer, leafKey.Public(), intermediateKey)
	b, err := cbor.Marshal(payload)
	if err != nil {
		t.Fatal(err)
	}
	if signed, err = nsmdev.SignPayload(leafKey, b); err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rootDER}), signed
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
