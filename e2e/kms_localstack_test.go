package e2e

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/fxamacker/cbor/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"cloister.dev/cloister/internal/cms"
)

// LocalStack is a KMS that others wrote. It encrypts for the key of any document, without a look at its
// signature or at policies, and names the recipient by issuer and serial number, where AWS has a
// subjectKeyIdentifier. The enclave opens that too.
func TestKMSLocalStack(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	s := startLocalStack(t, ns)
	created, err := s.admin.CreateKey(t.Context(), &kms.CreateKeyInput{})
	if err != nil {
		t.Fatal(err)
	}
	s.key = created.KeyMetadata.KeyId
	ciphertext := s.encrypt(t, []byte(kmsPassword))

	kmsIdentity(t, ns)
	app := c.kmsPod(t, "app", map[string]any{
		"kms":     map[string]any{"region": kmsRegion, "endpoint": s.endpoint, "ca": s.ca},
		"secrets": []any{map[string]any{"name": "password", "ciphertext": ciphertext, "env": "DB_PASSWORD", "encryptionContext": kmsContext}},
	})
	set, _ := c.measure(t, app)
	ns.create(t, app)

	t.Run("envelope", func(t *testing.T) {
		key, envelope := s.decryptForRecipient(t, ciphertext)
		name, serial := recipient(t, envelope)
		if name != "CN=recipient" || serial.Cmp(big.NewInt(1)) != 0 {
			t.Errorf("the recipient is %s, number %d", name, serial)
		}
		if plaintext, err := cms.Open(key, envelope); err != nil || string(plaintext) != kmsPassword {
			t.Errorf("it opens to %q, %v", plaintext, err)
		}
	})
	ns.ready(t, "app", 1)
	// An answer in plaintext would be refused, so it came in such an envelope.
	if got := c.answer(t, ns.forward(t, "pod/app", 8080), set, "/env?name=DB_PASSWORD"); got != kmsPassword {
		t.Errorf("the workload has DB_PASSWORD=%q", got)
	}
}

// startLocalStack starts LocalStack in the namespace and waits until its KMS answers. It has no key.
func startLocalStack(t *testing.T, ns *namespace) *keyService {
	t.Helper()
	const port = 4566
	host := "localstack." + ns.name + ".svc.cluster.local"
	cert, key := certificate(t, host)
	if _, err := ns.kube.CoreV1().Secrets(ns.name).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "localstack"}, Data: map[string][]byte{"server.pem": slices.Concat(key, cert)},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	no := false
	ns.create(t, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "localstack", Labels: map[string]string{"app": "localstack"}},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: new(int64(0)), AutomountServiceAccountToken: &no, EnableServiceLinks: &no,
			Containers: []corev1.Container{{
				Name: "localstack", Image: setting(t, "CLOISTER_LOCALSTACK_IMAGE"), ImagePullPolicy: corev1.PullNever,
				Env:   []corev1.EnvVar{{Name: "CUSTOM_SSL_CERT_PATH", Value: "/tls/server.pem"}},
				Ports: []corev1.ContainerPort{{ContainerPort: port}},
				ReadinessProbe: &corev1.Probe{
					ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/_localstack/health", Port: intstr.FromInt(port), Scheme: corev1.URISchemeHTTPS}},
					PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 1,
				},
				Resources: corev1.ResourceRequirements{
					Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("50m"), corev1.ResourceMemory: resource.MustParse("256Mi")},
					Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")},
				},
				VolumeMounts: []corev1.VolumeMount{{Name: "tls", MountPath: "/tls"}},
			}},
			Volumes: []corev1.Volume{{Name: "tls", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "localstack"}}}},
		},
	})
	service := service("localstack", port)
	service.Spec.Ports[0].Port = port
	ns.create(t, service)
	eventually(t, 2*time.Minute, "LocalStack is ready", func() (bool, string) {
		p := ns.pod(t, "localstack")
		return isReady(p), state(p)
	})
	s := &keyService{endpoint: "https://" + host + ":4566", ca: string(cert), addr: ns.forward(t, "pod/localstack", port)}
	s.admin = s.client(t, "AKIDADMIN", "admin")
	return s
}

// decryptForRecipient decrypts with a document that nobody signed, and returns the answer with the key that
// it is for.
func (s *keyService) decryptForRecipient(t *testing.T, ciphertext string) (*rsa.PrivateKey, []byte) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	encode := func(v any) []byte {
		b, err := cbor.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	document := encode([]any{[]byte{}, map[string]any{}, encode(map[string]any{"public_key": public}), []byte{}})
	blob, err := base64.StdEncoding.DecodeString(ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.admin.Decrypt(t.Context(), &kms.DecryptInput{
		CiphertextBlob: blob, EncryptionContext: kmsContext,
		Recipient: &types.RecipientInfo{AttestationDocument: document, KeyEncryptionAlgorithm: types.KeyEncryptionMechanismRsaesOaepSha256},
	})
	if err != nil {
		t.Fatal(err)
	}
	return key, out.CiphertextForRecipient
}

// recipient returns the issuer and the serial number that an EnvelopedData in DER names its only recipient
// by (RFC 5652, section 6.2.1).
func recipient(t *testing.T, envelope []byte) (issuer string, serial *big.Int) {
	t.Helper()
	type keyTransRecipientInfo struct {
		Version int
		ID      struct {
			Issuer pkix.RDNSequence
			Serial *big.Int
		}
		Algorithm asn1.RawValue
		Key       []byte
	}
	var info struct {
		Type    asn1.ObjectIdentifier
		Content struct {
			Version    int
			Recipients []keyTransRecipientInfo `asn1:"set"`
			Content    asn1.RawValue
		} `asn1:"explicit,tag:0"`
	}
	if rest, err := asn1.Unmarshal(envelope, &info); err != nil || len(rest) > 0 || len(info.Content.Recipients) != 1 {
		t.Fatalf("%x names no recipient by issuer and serial number: %v", envelope, err)
	}
	id := info.Content.Recipients[0].ID
	return id.Issuer.String(), id.Serial
}
