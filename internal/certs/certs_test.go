package certs

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	admissionregv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"
)

const secretName = "cloister-webhook-ca"

// cluster is an API server, a clock, and replicas that share them.
type cluster struct {
	client client.WithWatch
	now    time.Time
}

func newCluster(t *testing.T, objects ...client.Object) *cluster {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), admissionregv1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	return &cluster{
		client: fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).Build(),
		now:    time.Date(2026, 11, 24, 9, 0, 0, 0, time.UTC),
	}
}

func configuration() *admissionregv1.MutatingWebhookConfiguration {
	return &admissionregv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "00-cloister"},
		Webhooks:   []admissionregv1.MutatingWebhook{{Name: "inject.cloister.dev"}},
	}
}

func (c *cluster) replica() *Source {
	return &Source{
		Client: c.client, Namespace: "cloister-system", Secret: secretName, Service: "cloister-webhook", Target: MutatingWebhook("00-cloister"),
		Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return c.now },
	}
}

func (c *cluster) sync(t *testing.T, sources ...*Source) {
	t.Helper()
	for _, s := range sources {
		if err := s.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func (c *cluster) bundle(t *testing.T) []byte {
	t.Helper()
	var config admissionregv1.MutatingWebhookConfiguration
	if err := c.client.Get(t.Context(), types.NamespacedName{Name: "00-cloister"}, &config); err != nil {
		t.Fatal(err)
	}
	return config.Webhooks[0].ClientConfig.CABundle
}

// admit makes a TLS connection as an API server that knows bundle.
func (c *cluster) admit(t *testing.T, s *Source, bundle []byte) error {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	server := tls.Server(theirs, &tls.Config{GetCertificate: s.GetCertificate, MinVersion: tls.VersionTLS13})
	go func() { _ = server.HandshakeContext(t.Context()) }()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return tls.Client(ours, &tls.Config{RootCAs: roots, ServerName: "cloister-webhook.cloister-system.svc", Time: func() time.Time { return c.now }}).HandshakeContext(ctx)
}

func TestFirstStart(t *testing.T) {
	c := newCluster(t, configuration())
	a, b := c.replica(), c.replica()
	if a.Ready() == nil {
		t.Error("ready before the first step")
	}
	c.sync(t, a, b)
	for _, s := range []*Source{a, b} {
		if err := s.Ready(); err != nil {
			t.Error(err)
		}
		if err := c.admit(t, s, c.bundle(t)); err != nil {
			t.Error(err)
		}
	}
	if bytes.Equal(a.serving.Leaf.Raw, b.serving.Leaf.Raw) || !a.issuer.Equal(b.issuer) {
		t.Error("each replica must have a key of its own, from one CA")
	}
	if err := c.admit(t, a, nil); err == nil {
		t.Error("a client without the caBundle connected")
	}
}

// TestCreateRace: another replica makes the Secret between our look and our Create.
func TestCreateRace(t *testing.T) {
	c := newCluster(t, configuration())
	first := c.replica()
	second := c.replica()
	second.Client = interceptor.NewClient(c.client, interceptor.Funcs{
		Create: func(ctx context.Context, w client.WithWatch, o client.Object, opts ...client.CreateOption) error {
			c.sync(t, first)
			return w.Create(ctx, o, opts...)
		},
	})
	c.sync(t, second)
	if !first.issuer.Equal(second.issuer) {
		t.Error("two replicas issue from two CAs")
	}
}

func TestNotReadyWithoutConfiguration(t *testing.T) {
	c := newCluster(t)
	s := c.replica()
	if err := s.Sync(t.Context()); err == nil || s.Ready() == nil {
		t.Errorf("sync %v, ready %v", err, s.Ready())
	}
	if err := c.client.Create(t.Context(), configuration()); err != nil {
		t.Fatal(err)
	}
	c.sync(t, s)
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
}

func TestCABundleIsRestored(t *testing.T) {
	c := newCluster(t, configuration())
	s := c.replica()
	c.sync(t, s)
	if err := c.client.Delete(t.Context(), configuration()); err != nil {
		t.Fatal(err)
	}
	if err := c.client.Create(t.Context(), configuration()); err != nil {
		t.Fatal(err)
	}
	c.sync(t, s)
	if err := c.admit(t, s, c.bundle(t)); err != nil {
		t.Error(err)
	}
}

func TestServingCertificateIsRenewed(t *testing.T) {
	c := newCluster(t, configuration())
	s := c.replica()
	c.sync(t, s)
	first := s.NotAfter()
	c.now = c.now.Add(10 * time.Hour)
	c.sync(t, s)
	if !s.NotAfter().Equal(first) {
		t.Error("renewed too early")
	}
	c.now = c.now.Add(8 * time.Hour)
	c.sync(t, s)
	if !s.NotAfter().After(first) {
		t.Error("not renewed")
	}
	c.now = c.now.Add(48 * time.Hour)
	if s.Ready() == nil {
		t.Error("ready with an expired certificate")
	}
}

// age moves the clock to where the CA is to be rotated, and returns the CA. The replicas run all the time.
func (c *cluster) age(t *testing.T, sources ...*Source) *x509.Certificate {
	t.Helper()
	old := sources[0].issuer
	for c.now = c.now.Add(12 * time.Hour); c.now.Before(renewAt(old)); c.now = c.now.Add(12 * time.Hour) {
		c.sync(t, sources...)
		if !sources[0].issuer.Equal(old) {
			t.Fatal("rotated too early")
		}
	}
	return old
}

// TestRotation follows a new CA: at no time does an API server, though it may know only the bundle of half
// a minute ago, meet a certificate that it cannot verify; neither at a replica that has just started.
func TestRotation(t *testing.T) {
	c := newCluster(t, configuration())
	a, b := c.replica(), c.replica()
	c.sync(t, a, b)
	old := c.age(t, a, b)

	const step = 10 * time.Second
	bundles := [][]byte{c.bundle(t)} // one a step, the newest last
	for range 20 {
		young := c.replica()
		replicas := []*Source{a, b, young}
		c.sync(t, replicas...)
		bundles = append(bundles, c.bundle(t))
		known := bundles[max(0, len(bundles)-1-int(settle/step)):]
		for i, s := range replicas {
			for _, bundle := range known {
				if err := c.admit(t, s, bundle); err != nil {
					t.Fatalf("replica %d, step %d: %v", i, len(bundles), err)
				}
			}
			if err := s.Ready(); err != nil {
				t.Fatalf("replica %d, step %d: %v", i, len(bundles), err)
			}
		}
		c.now = c.now.Add(step)
	}
	if a.issuer.Equal(old) || !a.issuer.Equal(b.issuer) {
		t.Error("the new CA does not serve after the time to settle")
	}
	if n := bytes.Count(c.bundle(t), []byte("BEGIN")); n != 2 {
		t.Errorf("the bundle has %d certificates, want the new and the old one", n)
	}
	// The old CA leaves the bundle when it has expired.
	for c.now.Before(old.NotAfter) {
		c.now = c.now.Add(12 * time.Hour)
		c.sync(t, a, b)
	}
	if n := bytes.Count(c.bundle(t), []byte("BEGIN")); n != 1 {
		t.Errorf("the bundle has %d certificates, want one", n)
	}
}

// TestRotationAfterALongTime: nothing ran while the CA expired.
func TestRotationAfterALongTime(t *testing.T) {
	c := newCluster(t, configuration())
	c.sync(t, c.replica())
	c.now = c.now.Add(2 * caLifetime)
	s := c.replica()
	c.sync(t, s)
	if err := c.admit(t, s, c.bundle(t)); err != nil {
		t.Error(err)
	}
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
}

// TestSecretDeleted: whoever deletes the Secret rotates the CA, as smoothly as it can be.
func TestSecretDeleted(t *testing.T) {
	c := newCluster(t, configuration())
	a, b := c.replica(), c.replica()
	c.sync(t, a, b)
	old, before := a.issuer, c.bundle(t)
	if err := c.client.Delete(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "cloister-system", Name: secretName}}); err != nil {
		t.Fatal(err)
	}
	c.sync(t, a)
	for _, s := range []*Source{a, b} { // b has not seen it yet
		for _, bundle := range [][]byte{before, c.bundle(t)} {
			if err := c.admit(t, s, bundle); err != nil {
				t.Error(err)
			}
		}
	}
	c.sync(t, b)
	c.now = c.now.Add(settle)
	c.sync(t, a, b)
	if a.issuer.Equal(old) || !a.issuer.Equal(b.issuer) {
		t.Error("the new CA does not serve after the time to settle")
	}
	if err := c.admit(t, b, c.bundle(t)); err != nil {
		t.Error(err)
	}
}

// TestCAReplaced: somebody puts another CA into the Secret, which is even due for rotation.
func TestCAReplaced(t *testing.T) {
	c := newCluster(t, configuration())
	a, b := c.replica(), c.replica()
	c.sync(t, a, b)
	first, before := a.issuer, c.bundle(t)
	old, err := newSigner("cloister-webhook", c.now.Add(-300*24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	data, err := (&authority{signer: *old, bundle: []*x509.Certificate{old.cert, first}}).data()
	if err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "cloister-system", Name: secretName}}
	if err := c.client.Get(t.Context(), client.ObjectKeyFromObject(secret), secret); err != nil {
		t.Fatal(err)
	}
	secret.Data = data
	if err := c.client.Update(t.Context(), secret); err != nil {
		t.Fatal(err)
	}
	c.sync(t, a, b)
	for _, s := range []*Source{a, b} {
		if err := c.admit(t, s, before); err != nil {
			t.Error(err)
		}
	}
	c.now = c.now.Add(settle)
	c.sync(t, a, b)
	if a.issuer.Equal(first) || a.issuer.Equal(old.cert) || !a.issuer.Equal(b.issuer) {
		t.Error("the rotated CA does not serve after the time to settle")
	}
	if n := bytes.Count(c.bundle(t), []byte("BEGIN")); n != 3 {
		t.Errorf("the bundle has %d certificates, want three", n)
	}
}

// TestRoots: what a replica checks itself with is what the API servers have.
func TestRoots(t *testing.T) {
	c := newCluster(t, configuration())
	s := c.replica()
	c.sync(t, s)
	leaf, err := s.GetCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: s.Roots(), DNSName: s.ServerName(), CurrentTime: c.now}); err != nil {
		t.Error(err)
	}
}

func TestBrokenSecret(t *testing.T) {
	c := newCluster(t, configuration(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "cloister-system", Name: secretName},
		Data:       map[string][]byte{keyCert: []byte("x"), keyKey: []byte("y")},
	})
	s := c.replica()
	if err := s.Sync(t.Context()); err == nil || s.Ready() == nil {
		t.Errorf("sync %v, ready %v", err, s.Ready())
	}
}

// TestOutage: a replica that was in order keeps serving while the API server does not answer.
func TestOutage(t *testing.T) {
	c := newCluster(t, configuration())
	s := c.replica()
	c.sync(t, s)
	s.Client = interceptor.NewClient(c.client, interceptor.Funcs{
		Get: func(context.Context, client.WithWatch, client.ObjectKey, client.Object, ...client.GetOption) error {
			return errors.New("no answer")
		},
	})
	if err := s.Sync(t.Context()); err == nil {
		t.Error("no error")
	}
	if err := s.Ready(); err != nil {
		t.Error(err)
	}
}

// TestAPIService: the same for an aggregated API, and whoever watches learns of each certificate.
func TestAPIService(t *testing.T) {
	service := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
		"metadata": map[string]any{"name": "v1beta2.custom.metrics.k8s.io"},
		"spec":     map[string]any{"group": "custom.metrics.k8s.io"},
	}}
	c := newCluster(t, service)
	s := c.replica()
	s.Target = APIService("v1beta2.custom.metrics.k8s.io")
	issued := make(chan struct{}, 10)
	s.OnIssue(func() { issued <- struct{}{} })
	c.sync(t, s, s)
	<-issued
	if err := c.client.Get(t.Context(), types.NamespacedName{Name: service.GetName()}, service); err != nil {
		t.Fatal(err)
	}
	text, _, err := unstructured.NestedString(service.Object, "spec", "caBundle")
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.admit(t, s, bundle); err != nil {
		t.Error(err)
	}
	c.now = c.now.Add(20 * time.Hour)
	c.sync(t, s)
	<-issued
	if len(issued) > 0 {
		t.Error("more was reported than issued")
	}
}
