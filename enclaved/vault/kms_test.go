package vault_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/e2e/kmsemu"
	"cloister.dev/cloister/enclaved/vault"
	"cloister.dev/cloister/internal/cms"
	"cloister.dev/cloister/internal/cms/cmstest"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/workload"
)

const region = "eu-central-1"

var pod = kmsemu.Identity{AccessKeyID: "AKIDPOD", SecretAccessKey: "pod's secret", SessionToken: "pod's token", ARN: "arn:aws:iam::111122223333:role/pod"}

// service is a KMS, and the sidecar that the vault gets credentials from.
type service struct {
	*httptest.Server
	config  *workload.KMS
	sidecar *httptest.Server
	who     kmsemu.Identity // whose credentials the sidecar has

	mu      sync.Mutex // for what follows: connections are dialled in the background too
	events  []kmsemu.Event
	dialled []string
}

// seen returns what reached s until now, and the addresses that were dialled for it.
func (s *service) seen() ([]kmsemu.Event, []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events), slices.Clone(s.dialled)
}

// newService returns a KMS that trusts the module's documents, or answers with handler.
func newService(t *testing.T, module *nsmtest.Module, handler http.Handler) *service {
	t.Helper()
	s := &service{who: pod}
	if handler == nil {
		handler = kmsemu.New(kmsemu.Config{
			Region: region, Root: module.Root(), Identities: []kmsemu.Identity{pod},
			Trail: func(e kmsemu.Event) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.events = append(s.events, e)
			},
		})
	}
	s.Server = httptest.NewUnstartedServer(handler)
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that must fail
	s.StartTLS()
	t.Cleanup(s.Server.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	// The certificate of httptest is for this name.
	s.config = &workload.KMS{Region: region, Endpoint: "https://example.com:8443", CA: string(ca)}
	s.sidecar = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if s.who.AccessKeyID == "" {
			w.WriteHeader(http.StatusBadGateway)
			json.NewEncoder(w).Encode(map[string]string{"code": "NoCredentials", "message": "the pod has no identity"})
			return
		}
		json.NewEncoder(w).Encode(map[string]any{
			"AccessKeyId": s.who.AccessKeyID, "SecretAccessKey": s.who.SecretAccessKey, "Token": s.who.SessionToken,
			"Expiration": time.Now().Add(time.Hour),
		})
	}))
	t.Cleanup(s.sidecar.Close)
	return s
}

// open returns a client of s for a vault that has measured the test's manifest.
func (s *service) open(t *testing.T, v *vault.Vault) *vault.KMS {
	t.Helper()
	if _, err := v.Measure(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
	k, err := v.NewKMS(s.config,
		func(ctx context.Context, address string) (net.Conn, error) {
			s.mu.Lock()
			s.dialled = append(s.dialled, address)
			s.mu.Unlock()
			return new(net.Dialer).DialContext(ctx, "tcp", s.Listener.Addr().String())
		},
		func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", s.sidecar.Listener.Addr().String())
		})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

// admin is a client as a person has it, outside of every enclave.
func (s *service) admin(t *testing.T) *kms.Client {
	t.Helper()
	transport := s.Client().Transport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	return kms.New(kms.Options{
		Region: region, BaseEndpoint: aws.String(s.URL), HTTPClient: &http.Client{Transport: transport},
		Credentials: credentials.NewStaticCredentialsProvider(pod.AccessKeyID, pod.SecretAccessKey, pod.SessionToken),
	})
}

// seal encrypts a text with a new key that the enclave of these registers may use, and nobody else.
func (s *service) seal(t *testing.T, admin *kms.Client, m workload.Measurement, text string, bound map[string]string) []byte {
	t.Helper()
	policy := fmt.Sprintf(`{"Statement":[
		{"Effect":"Allow","Principal":{"AWS":%q},"Action":["kms:Encrypt","kms:PutKeyPolicy"]},
		{"Effect":"Allow","Principal":"*","Action":"kms:Decrypt","Condition":{"StringEqualsIgnoreCase":{
			"kms:RecipientAttestation:ImageSha384":%q,"kms:RecipientAttestation:PCR16":%q}}}]}`, pod.ARN, m.PCR0, strings.ToUpper(m.PCR16))
	k, err := admin.CreateKey(t.Context(), &kms.CreateKeyInput{Policy: &policy})
	if err != nil {
		t.Fatal(err)
	}
	out, err := admin.Encrypt(t.Context(), &kms.EncryptInput{KeyId: k.KeyMetadata.KeyId, Plaintext: []byte(text), EncryptionContext: bound})
	if err != nil {
		t.Fatal(err)
	}
	return out.CiphertextBlob
}

func TestDecrypt(t *testing.T) {
	module := nsmtest.New(t)
	s := newService(t, module, nil)
	v, _ := newVault(t, module)
	k := s.open(t, v)
	admin := s.admin(t)
	measured := module.Measurements(manifest)[0]
	bound := map[string]string{"workload": "web"}
	var batch []vault.Ciphertext
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprint("secret ", i))
		batch = append(batch, vault.Ciphertext{Name: fmt.Sprint("secret ", i), Blob: s.seal(t, admin, measured, want[i], bound), Context: bound})
	}
	before := v.Calls()
	got, err := k.Decrypt(t.Context(), batch)
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, b := range got {
		texts = append(texts, string(b))
	}
	if d := cmp.Diff(want, texts); d != "" {
		t.Errorf("plaintexts (-want +got):\n%s", d)
	}
	if n := v.Calls() - before; n != 1 {
		t.Errorf("%d requests to the security module for one batch", n)
	}
	events, dialled := s.seen()
	for _, address := range dialled {
		if address != "example.com:8443" {
			t.Errorf("dialled %s", address)
		}
	}
	last := events[len(events)-1]
	if last.Action != "Decrypt" || last.Principal != pod.ARN || last.Attestation["PCR16"] != measured.PCR16 || last.Error != "" {
		t.Errorf("the trail ends with %+v", last)
	}

	// Who has the pod's credentials, but is no enclave, gets nothing.
	if _, err := admin.Decrypt(t.Context(), &kms.DecryptInput{CiphertextBlob: batch[0].Blob, EncryptionContext: bound}); err == nil || !strings.Contains(err.Error(), "AccessDenied") {
		t.Errorf("decrypt without attestation: %v", err)
	}

	other := measured
	other.PCR16 = strings.Repeat("0", 96)
	for name, tt := range map[string]struct {
		change func(*vault.Ciphertext)
		want   string
	}{
		"for another measurement": {func(c *vault.Ciphertext) { c.Blob = s.seal(t, admin, other, "x", bound) }, "decrypt secret 1 by KMS: AccessDeniedException: User: arn:aws:iam::111122223333:role/pod is not authorized"},
		"another context":         {func(c *vault.Ciphertext) { c.Context = map[string]string{"workload": "other"} }, "InvalidCiphertextException"},
		"no context":              {func(c *vault.Ciphertext) { c.Context = nil }, "InvalidCiphertextException"},
		"changed":                 {func(c *vault.Ciphertext) { c.Blob = append([]byte{}, c.Blob...); c.Blob[40] ^= 1 }, "InvalidCiphertextException"},
		"unknown key":             {func(c *vault.Ciphertext) { c.Blob = make([]byte, 100) }, "NotFoundException"},
	} {
		t.Run(name, func(t *testing.T) {
			two := []vault.Ciphertext{batch[0], batch[1]}
			tt.change(&two[1])
			got, err := k.Decrypt(t.Context(), two)
			if err == nil || !strings.Contains(err.Error(), tt.want) || got != nil {
				t.Errorf("got %q, %v; want an error with %q", got, err, tt.want)
			}
			if err != nil && (strings.Contains(err.Error(), "\n") || len(err.Error()) > 400) {
				t.Errorf("this is no short sentence: %s", err)
			}
		})
	}
}

// Other services than AWS's encode the answer in other ways.
func TestShapes(t *testing.T) {
	for name, shape := range map[string]cmstest.Shape{
		"pieces":     {Pieces: []int{16}},
		"DER":        {Definite: true},
		"LocalStack": {Definite: true, IssuerAndSerial: true},
	} {
		t.Run(name, func(t *testing.T) {
			module := nsmtest.New(t)
			s := newService(t, module, kmsemu.New(kmsemu.Config{Region: region, Root: module.Root(), Identities: []kmsemu.Identity{pod}, Shape: shape}))
			v, _ := newVault(t, module)
			k := s.open(t, v)
			blob := s.seal(t, s.admin(t), module.Measurements(manifest)[0], "secret", nil)
			got, err := k.Decrypt(t.Context(), []vault.Ciphertext{{Name: "it", Blob: blob}})
			if err != nil || string(got[0]) != "secret" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestCredentials(t *testing.T) {
	module := nsmtest.New(t)
	for name, tt := range map[string]struct {
		who  kmsemu.Identity
		want string
	}{
		"none":        {kmsemu.Identity{}, "get the pod's AWS credentials from the sidecar: NoCredentials: the pod has no identity"},
		"stranger":    {kmsemu.Identity{AccessKeyID: "AKIDOTHER", SecretAccessKey: "x"}, "UnrecognizedClientException"},
		"wrong key":   {kmsemu.Identity{AccessKeyID: pod.AccessKeyID, SecretAccessKey: "x", SessionToken: pod.SessionToken}, "InvalidSignatureException"},
		"other token": {kmsemu.Identity{AccessKeyID: pod.AccessKeyID, SecretAccessKey: pod.SecretAccessKey, SessionToken: "x"}, "InvalidSignatureException"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, module, nil)
			s.who = tt.who
			v, _ := newVault(t, nsmtest.New(t))
			_, err := s.open(t, v).Decrypt(t.Context(), []vault.Ciphertext{{Name: "it", Blob: make([]byte, 100)}})
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), pod.SecretAccessKey) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// What a host or a false service can do is refused.
func TestFalseService(t *testing.T) {
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	swapped, err := cmstest.Seal(&other.PublicKey, []byte("the host's own"), cmstest.Shape{})
	if err != nil {
		t.Fatal(err)
	}
	answer := func(v map[string]any) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			json.NewEncoder(w).Encode(v)
		})
	}
	for name, tt := range map[string]struct {
		handler http.Handler
		change  func(*workload.KMS)
		want    string
	}{
		"plaintext":           {answer(map[string]any{"Plaintext": []byte("in the open")}), nil, "ignores attestation"},
		"both":                {answer(map[string]any{"Plaintext": []byte("x"), "CiphertextForRecipient": swapped}), nil, "ignores attestation"},
		"nothing":             {answer(map[string]any{}), nil, "ignores attestation"},
		"envelope swapped":    {answer(map[string]any{"CiphertextForRecipient": swapped}), nil, cms.ErrOpen.Error()},
		"no envelope":         {answer(map[string]any{"CiphertextForRecipient": []byte("x")}), nil, "read CMS message"},
		"foreign certificate": {answer(nil), func(c *workload.KMS) { c.CA = "" }, "signed by unknown authority"},
		"another name":        {answer(nil), func(c *workload.KMS) { c.Endpoint = "https://kms.example" }, "not kms.example"},
	} {
		t.Run(name, func(t *testing.T) {
			module := nsmtest.New(t)
			s := newService(t, module, tt.handler)
			if tt.change != nil {
				tt.change(s.config)
			}
			v, _ := newVault(t, module)
			got, err := s.open(t, v).Decrypt(t.Context(), []vault.Ciphertext{{Name: "it", Blob: make([]byte, 100)}})
			if err == nil || !strings.Contains(err.Error(), tt.want) || got != nil {
				t.Errorf("got %q, %v; want an error with %q", got, err, tt.want)
			}
		})
	}
}

func certificate(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web.example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// A client that asks for the attested certificate gets it whatever else is served.
func TestUseCertificate(t *testing.T) {
	v, _ := newVault(t, nsmtest.New(t))
	if _, err := v.Measure(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(key *ecdsa.PrivateKey) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	}
	chain := certificate(t, key)
	plain, attested := &tls.ClientHelloInfo{SupportedProtos: []string{"h2"}}, &tls.ClientHelloInfo{SupportedProtos: []string{"h2", attestation.ALPN}}
	subject := func(hello *tls.ClientHelloInfo) string {
		c, err := v.Certificate(hello)
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := x509.ParseCertificate(c.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		return parsed.Subject.CommonName
	}
	for name, pem := range map[string][]byte{"another key": encode(other), "no key": []byte("x"), "the certificate": []byte(chain)} {
		if err := v.UseCertificate(chain, pem); err == nil {
			t.Errorf("%s was taken", name)
		}
		if subject(plain) == "web.example" {
			t.Errorf("%s is served", name)
		}
	}
	if err := v.UseCertificate(chain, encode(key)); err != nil {
		t.Fatal(err)
	}
	if subject(plain) != "web.example" || subject(attested) == "web.example" {
		t.Errorf("a plain client gets %q, one that asks for the attested certificate %q", subject(plain), subject(attested))
	}
}
