package e2e

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
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"cloister.dev/cloister/e2e/kmsemu"
	"cloister.dev/cloister/workload"
)

// Who the KMS of the tests knows: a person, and the role of the pods.
const (
	kmsRegion   = "eu-central-1"
	kmsAdmin    = "arn:aws:iam::111122223333:user/admin"
	kmsRole     = "arn:aws:iam::111122223333:role/web"
	kmsRoleKey  = "the-role-has-this-secret-access-key"
	kmsPassword = "correct-horse-battery-staple"
)

// keyService is a KMS of the tests.
type keyService struct {
	*running     // nil for LocalStack, a pod
	endpoint, ca string
	addr         string      // where the tests reach it
	admin        *kms.Client // of the person
	key          *string
}

// keyService starts a KMS on the cluster's node that believes the development root, with one key that nobody may decrypt with.
func (c *cluster) keyService(t *testing.T) *keyService {
	t.Helper()
	ip := c.nodeAddr(t)
	certificate, key := tlsServer(t, net.ParseIP(ip))
	root, err := os.ReadFile(c.root)
	if err != nil {
		t.Fatal(err)
	}
	const dir = "/tmp/cloister-e2e-kms."
	for name, content := range map[string][]byte{"root": root, "certificate": []byte(certificate), "key": []byte(key)} {
		if err := c.writeOnNode(t.Context(), dir+name, content); err != nil {
			t.Fatal(err)
		}
	}
	s := &keyService{ca: certificate}
	var ready string
	s.running, ready = c.start(t, "kms", "-region", kmsRegion, "-root", dir+"root", "-certificate", dir+"certificate", "-key", dir+"key",
		"-identity", "AKIDADMIN:admin:"+kmsAdmin, "-identity", "AKIDROLE:"+kmsRoleKey+":"+kmsRole)
	s.addr = net.JoinHostPort(ip, strings.TrimPrefix(ready, "ready "))
	s.endpoint = "https://" + s.addr
	s.admin = s.client(t, "AKIDADMIN", "admin")
	out, err := s.admin.CreateKey(t.Context(), &kms.CreateKeyInput{Policy: aws.String(keyPolicy(t))})
	if err != nil {
		t.Fatal(err)
	}
	s.key = out.KeyMetadata.KeyId
	return s
}

// client is an ordinary client of AWS, outside of every enclave.
func (s *keyService) client(t *testing.T, id, key string) *kms.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(s.ca))
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", s.addr)
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	return kms.New(kms.Options{
		Region: kmsRegion, BaseEndpoint: &s.endpoint, HTTPClient: &http.Client{Transport: transport},
		Credentials: credentials.NewStaticCredentialsProvider(id, key, ""),
	})
}

// keyPolicy is docs/kms.md's: the person administers and encrypts, the role decrypts in these enclaves.
func keyPolicy(t *testing.T, enclaves ...workload.Measurement) string {
	t.Helper()
	statements := []any{map[string]any{
		"Effect": "Allow", "Principal": map[string]any{"AWS": kmsAdmin}, "Action": []string{"kms:Encrypt", "kms:PutKeyPolicy"},
	}}
	for _, m := range enclaves {
		statements = append(statements, map[string]any{
			"Effect": "Allow", "Principal": map[string]any{"AWS": kmsRole}, "Action": "kms:Decrypt",
			"Condition": map[string]any{"StringEqualsIgnoreCase": map[string]any{
				"kms:RecipientAttestation:ImageSha384": m.PCR0, "kms:RecipientAttestation:PCR16": m.PCR16,
			}},
		})
	}
	b, err := json.Marshal(map[string]any{"Version": "2012-10-17", "Statement": statements})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var kmsContext = map[string]string{"workload": "web"}

func (s *keyService) encrypt(t *testing.T, plaintext []byte) string {
	t.Helper()
	out, err := s.admin.Encrypt(t.Context(), &kms.EncryptInput{KeyId: s.key, Plaintext: plaintext, EncryptionContext: kmsContext})
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(out.CiphertextBlob)
}

// kmsIdentity makes the Secret with the credentials of the pods' role.
func kmsIdentity(t *testing.T, ns *namespace) {
	t.Helper()
	if _, err := ns.kube.CoreV1().Secrets(ns.name).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "aws"},
		StringData: map[string]string{"AWS_ACCESS_KEY_ID": "AKIDROLE", "AWS_SECRET_ACCESS_KEY": kmsRoleKey},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// kmsPod is a pod of testapp with these settings that has the role's credentials.
func (c *cluster) kmsPod(t *testing.T, name string, settings map[string]any, args ...string) *corev1.Pod {
	t.Helper()
	pod := c.appPod(t, name, args...)
	enclaveConfig(pod, settings)
	app := &pod.Spec.Containers[0]
	for _, variable := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} {
		app.Env = append(app.Env, corev1.EnvVar{Name: variable, ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
			LocalObjectReference: corev1.LocalObjectReference{Name: "aws"}, Key: variable,
		}}})
	}
	return pod
}

// A secret reaches the environment of the workload, and a certificate of an ordinary CA serves, in the
// enclave that the key's policy names. Another measurement gets neither, and its pod says why.
func TestKMS(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	s := c.keyService(t)
	authority, chain, key := issue(t, "web.example")
	kmsIdentity(t, ns)
	ciphertext := s.encrypt(t, []byte(kmsPassword))
	config := map[string]any{
		"kms": map[string]any{"region": kmsRegion, "endpoint": s.endpoint, "ca": s.ca,
			"certificate": map[string]any{"chain": chain, "key": s.encrypt(t, key), "encryptionContext": kmsContext}},
		"tls": "kms",
		"secrets": []any{
			map[string]any{"name": "password", "ciphertext": ciphertext, "env": "DB_PASSWORD", "encryptionContext": kmsContext},
			map[string]any{"name": "token", "ciphertext": s.encrypt(t, []byte("a token")), "file": "/run/secrets/token", "encryptionContext": kmsContext},
		},
	}
	right, wrong := c.kmsPod(t, "app", config), c.kmsPod(t, "other", config, "serve", "-after", "1ms")
	for _, pod := range []*corev1.Pod{right, wrong} {
		pod.Spec.Containers[0].ReadinessProbe = &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/testapp", "exists", "/run/secrets/token"}}},
			PeriodSeconds: 1, FailureThreshold: 1,
		}
	}
	set, measured := c.measure(t, right)
	policy := keyPolicy(t, measured)
	if _, err := s.admin.PutKeyPolicy(t.Context(), &kms.PutKeyPolicyInput{KeyId: s.key, Policy: &policy}); err != nil {
		t.Fatal(err)
	}
	ns.create(t, right)
	ns.create(t, wrong)
	ns.ready(t, "app", 1)
	addr := ns.forward(t, "pod/app", 8080)

	if got := c.answer(t, addr, set, "/env?name=DB_PASSWORD"); got != kmsPassword {
		t.Errorf("the workload has DB_PASSWORD=%q", got)
	}
	// The pod's identity is the sidecar's alone.
	if got := c.answer(t, addr, set, "/env?name=AWS_SECRET_ACCESS_KEY"); got != "" {
		t.Errorf("the workload has AWS_SECRET_ACCESS_KEY=%q", got)
	}
	// Any client that trusts the CA.
	if got := ordinaryGet(t, authority, addr, "https://web.example/echo?hello"); got != "hello" {
		t.Errorf("an ordinary client got %q", got)
	}

	eventually(t, bootTime, "an Event of the other pod with AccessDenied", func() (bool, string) {
		events, err := c.kube.CoreV1().Events(ns.name).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=other"})
		if err != nil {
			t.Fatal(err)
		}
		var seen []string
		for _, e := range events.Items {
			if e.Type == corev1.EventTypeWarning && strings.Contains(e.Message, "AccessDenied") && strings.Contains(e.Message, kmsRole) {
				return true, ""
			}
			seen = append(seen, e.Message)
		}
		return false, strings.Join(seen, "; ")
	})
	other := ns.pod(t, "other")
	if app := container(other, "app"); app.State.Running == nil || app.Started != nil && *app.Started || isReady(other) {
		t.Errorf("the other pod does not wait: %s", state(other))
	}
	if logs := ns.logs(t, "other", "app"); strings.Contains(logs, "testapp") {
		t.Errorf("the other workload ran: %s", logs)
	}

	// The host has the ciphertext and the pod's credentials, and no enclave.
	blob, err := base64.StdEncoding.DecodeString(ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	host := s.client(t, "AKIDROLE", kmsRoleKey)
	if out, err := host.Decrypt(t.Context(), &kms.DecryptInput{CiphertextBlob: blob, EncryptionContext: kmsContext}); err == nil || !strings.Contains(err.Error(), "AccessDenied") {
		t.Errorf("without an enclave KMS decrypts to %q, %v", out.Plaintext, err)
	}
	for _, pod := range []string{"app", "other"} {
		for _, name := range []string{initbootContainer, sidecarContainer, "app"} {
			for _, secret := range []string{kmsPassword, kmsRoleKey} {
				if strings.Contains(ns.logs(t, pod, name), secret) {
					t.Errorf("the log of %s in %s has %q", name, pod, secret)
				}
			}
		}
	}

	// What the KMS saw.
	decrypted, denied := map[string]int{}, map[string]int{}
	for line := range bytes.Lines(s.stop(t)) {
		var e kmsemu.Event
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		switch {
		case e.Action != "Decrypt":
		case e.Error == "":
			decrypted[e.Attestation["PCR16"]]++
		default:
			denied[e.Attestation["PCR16"]]++
		}
	}
	if len(decrypted) != 1 || decrypted[measured.PCR16] != 3 {
		t.Errorf("decrypted by PCR16: %v, want 3 for %s alone", decrypted, measured.PCR16)
	}
	if len(denied) != 2 || denied[""] == 0 || denied[measured.PCR16] != 0 {
		t.Errorf("denied by PCR16: %v, want the other enclave and the host", denied)
	}
}

// issue makes a CA, a certificate of it and the certificate's key, all PEM.
func issue(t *testing.T, name string) (authority, chain string, key []byte) {
	t.Helper()
	encode := func(kind string, der []byte, err error) string {
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	newKey := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	root, leaf := newKey(), newKey()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "e2e CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, root.Public(), root)
	authority = encode("CERTIFICATE", der, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err = x509.CreateCertificate(rand.Reader, template, ca, leaf.Public(), root)
	chain = encode("CERTIFICATE", der, err)
	der, err = x509.MarshalPKCS8PrivateKey(leaf)
	return authority, chain, []byte(encode("PRIVATE KEY", der, err))
}

// ordinaryGet asks for a page over TLS as clients do that know nothing of enclaves.
func ordinaryGet(t *testing.T, authority, addr, url string) string {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(authority))
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots},
		ForceAttemptHTTP2: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
	}
	defer transport.CloseIdleConnections()
	r, err := (&http.Client{Transport: transport}).Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}
