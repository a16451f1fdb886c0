package supervise

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/e2e/kmsemu"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

const (
	egressPort      = 70003
	credentialsPort = 70004
)

// keys is a KMS that knows the enclave's module, and a sidecar that reaches it.
type keys struct {
	enclave *enclave
	admin   *kms.Client
	config  workload.KMS
	key     *string
}

const role = "arn:aws:iam::111122223333:role/pod"

func newKeys(t *testing.T, e *enclave) *keys {
	t.Helper()
	service := httptest.NewTLSServer(kmsemu.New(kmsemu.Config{
		Region: "eu-central-1", Root: e.module.Root(), Identities: []kmsemu.Identity{{AccessKeyID: "AKID", SecretAccessKey: "key", ARN: role}},
	}))
	t.Cleanup(service.Close)
	k := &keys{enclave: e, admin: kms.New(kms.Options{
		Region: "eu-central-1", BaseEndpoint: aws.String(service.URL), HTTPClient: service.Client(),
		Credentials: credentials.NewStaticCredentialsProvider("AKID", "key", ""),
	})}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: service.Certificate().Raw})
	k.config = workload.KMS{Region: "eu-central-1", Endpoint: "https://example.com", CA: string(ca)}

	serve := func(port uint32, h http.Handler) {
		l, err := net.Listen("unix", e.host(port))
		if err != nil {
			t.Fatal(err)
		}
		protocols := new(http.Protocols)
		protocols.SetHTTP1(true)
		protocols.SetUnencryptedHTTP2(true)
		server := &http.Server{Protocols: protocols, Handler: h}
		go server.Serve(e.secret.Listen(l, port))
		t.Cleanup(func() { server.Close() })
	}
	serve(egressPort, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := net.Dial("tcp", service.Listener.Addr().String())
		if err != nil || r.Method != http.MethodConnect || r.Host != "example.com:443" {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		defer c.Close()
		flush := http.NewResponseController(w)
		flush.Flush()
		go func() {
			io.Copy(c, r.Body)
			c.(*net.TCPConn).CloseWrite()
		}()
		b := make([]byte, 32<<10)
		for {
			n, err := c.Read(b)
			w.Write(b[:n])
			flush.Flush()
			if err != nil {
				return
			}
		}
	}))
	serve(credentialsPort, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(map[string]string{"AccessKeyId": "AKID", "SecretAccessKey": "key"})
	}))

	out, err := k.admin.CreateKey(t.Context(), &kms.CreateKeyInput{Policy: aws.String(policy(""))})
	if err != nil {
		t.Fatal(err)
	}
	k.key = out.KeyMetadata.KeyId
	return k
}

// policy lets the role do everything but decrypt, which only the enclave of this PCR16 may.
func policy(pcr16 string) string {
	return fmt.Sprintf(`{"Statement":[
		{"Effect":"Allow","Principal":{"AWS":%q},"Action":["kms:Encrypt","kms:PutKeyPolicy"]},
		{"Effect":"Allow","Principal":{"AWS":%q},"Action":"kms:Decrypt","Condition":{"StringEqualsIgnoreCase":{"kms:RecipientAttestation:PCR16":%q}}}]}`, role, role, pcr16)
}

func (k *keys) allow(t *testing.T, m *workload.Manifest) {
	t.Helper()
	c, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	text := policy(k.enclave.module.Measurements(c)[0].PCR16)
	if _, err := k.admin.PutKeyPolicy(t.Context(), &kms.PutKeyPolicyInput{KeyId: k.key, Policy: &text}); err != nil {
		t.Fatal(err)
	}
}

func (k *keys) seal(t *testing.T, plaintext []byte) string {
	t.Helper()
	out, err := k.admin.Encrypt(t.Context(), &kms.EncryptInput{KeyId: k.key, Plaintext: plaintext})
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(out.CiphertextBlob)
}

// pair is a certificate for web.example with its key, both PEM.
func pair(t *testing.T) (chain string, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web.example"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

var runWithKMS = &channel.RunRequest{EgressPort: egressPort, CredentialsPort: credentialsPort}

// The workload does not start before KMS allows it, and then finds its secrets.
func TestSecrets(t *testing.T) {
	e := newEnclave(t)
	k := newKeys(t, e)
	uid := int64(1234)
	m := &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, map[string]any{
			"Entrypoint": []string{"/app", "show", "PASSWORD", "/run/secrets/token"}, "Env": []string{"PASSWORD=the image's"},
		})},
		User: &workload.User{UID: &uid, GID: &uid},
		KMS:  &k.config,
		Secrets: []workload.Secret{
			{Name: "password", Ciphertext: k.seal(t, []byte("correct horse")), Env: "PASSWORD"},
			{Name: "token", Ciphertext: k.seal(t, []byte("battery\x00staple")), File: "/run/secrets/token"},
		},
	}
	e.configure(t, m)
	r := e.followRun(t, runWithKMS, func(r *result, _ *channel.RunEvent) {
		if len(r.failures) == 1 && !r.started {
			k.allow(t, m)
		}
	})
	r.check(t, 0, "")
	if len(r.failures) == 0 || !strings.Contains(r.failures[0], "by KMS: AccessDeniedException: User: "+role+" is not authorized to perform: kms:Decrypt") {
		t.Errorf("failures %q", r.failures)
	}
	if want := "correct horse\nbattery\x00staple -r-------- <nil>\n"; r.stdout != want {
		t.Errorf("the workload printed %q, want %q", r.stdout, want)
	}
}

// What KMS decrypts must be what the manifest needs; else nothing starts.
func TestSecretsThatDoNotFit(t *testing.T) {
	chain, _ := pair(t)
	_, other := pair(t)
	for name, tt := range map[string]struct {
		change func(*keys, *workload.Manifest)
		want   string
	}{
		"binary in a variable": {func(k *keys, m *workload.Manifest) {
			m.Secrets = []workload.Secret{{Name: "blob", Ciphertext: k.seal(t, []byte{'a', 0}), Env: "BLOB"}}
		}, "secret blob is no text"},
		"another certificate's key": {func(k *keys, m *workload.Manifest) {
			m.TLS, m.KMS.Certificate = workload.TLSKMS, &workload.Certificate{Chain: chain, Key: k.seal(t, other)}
		}, "private key does not match public key"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnclave(t)
			k := newKeys(t, e)
			m := &workload.Manifest{APIVersion: workload.APIVersion, Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))}, KMS: &k.config}
			tt.change(k, m)
			k.allow(t, m)
			e.configure(t, m)
			r := e.followRun(t, runWithKMS, func(r *result, _ *channel.RunEvent) {
				if len(r.failures) == 1 {
					e.stopLater(t, 0, 0)
				}
			})
			r.check(t, 143, "stopped before")
			if len(r.failures) == 0 || !strings.Contains(r.failures[0], tt.want) {
				t.Errorf("failures %q, want %q", r.failures, tt.want)
			}
		})
	}
}

func TestKMSCertificate(t *testing.T) {
	e := newEnclave(t)
	k := newKeys(t, e)
	chain, key := pair(t)
	port := freePort(t)
	k.config.Certificate = &workload.Certificate{Chain: chain, Key: k.seal(t, key)}
	m := &workload.Manifest{
		APIVersion: workload.APIVersion,
		Image:      workload.Image{Digest: e.addImage(t, cmdConfig("serve", strconv.Itoa(int(port)), "204 No Content"))},
		Ports:      []workload.Port{{Port: port}},
		KMS:        &k.config, TLS: workload.TLSKMS,
	}
	k.allow(t, m)
	e.configure(t, m)
	subject := func(protocols ...string) string {
		c, err := e.secret.Dial(t.Context(), port, func(ctx context.Context, port uint32) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", e.guest(port))
		})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		client := tls.Client(c, &tls.Config{InsecureSkipVerify: true, NextProtos: protocols})
		if err := client.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		return client.ConnectionState().PeerCertificates[0].Subject.CommonName
	}
	done := false
	e.followRun(t, runWithKMS, func(r *result, _ *channel.RunEvent) {
		if done || !r.started {
			return
		}
		done = true
		if got := subject("http/1.1"); got != "web.example" {
			t.Errorf("an ordinary client gets a certificate for %q", got)
		}
		if got := subject("http/1.1", attestation.ALPN); got == "web.example" {
			t.Error("a client that asks for the attested certificate gets the other")
		}
		e.stopLater(t, 0, 0)
	}).check(t, 137, "killed")
}

func TestKMSWithoutSidecar(t *testing.T) {
	e := newEnclave(t)
	secret := workload.Secret{Name: "a", Ciphertext: "YQ==", Env: "A"}
	e.configure(t, &workload.Manifest{
		Image:   workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))},
		Secrets: []workload.Secret{secret}, KMS: &workload.KMS{Region: "eu-central-1"},
	})
	s, err := e.Run(t.Context(), &channel.RunRequest{EgressPort: egressPort})
	if err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "credentials") {
		t.Errorf("got %v", err)
	}
}

// What cannot be used does not stay in memory.
func TestRefusedSecretsAreErased(t *testing.T) {
	e := &Enclave{manifest: &workload.Manifest{
		Secrets: []workload.Secret{{Name: "file", File: "/a"}, {Name: "env", Env: "A"}}, KMS: &workload.KMS{},
	}}
	values := [][]byte{[]byte("secret"), []byte("se\x00cret")}
	if accepted, err := e.accept(values); err == nil || accepted != nil {
		t.Errorf("accepted %q, %v", accepted, err)
	}
	for i, v := range values {
		if !bytes.Equal(v, make([]byte, len(v))) {
			t.Errorf("value %d is still there: %q", i, v)
		}
	}
	values = [][]byte{[]byte("secret"), []byte("text")}
	if accepted, err := e.accept(values); err != nil || len(accepted) != 2 || string(accepted[1]) != "text" {
		t.Errorf("accepted %q, %v", accepted, err)
	}
}
