// Package certs gives a server that API servers call its serving certificate. The certificate and its key
// live in memory only. They are issued by a CA of our own, which lies in a Secret that all replicas share,
// and which the object that registers the server (Target) names as caBundle. During a rotation of the CA
// the bundle holds the old and the new one, so that no call is refused.
package certs

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Keys of the Secret.
const (
	// keyBundle holds the certificates that clients may trust, the signing one first.
	keyBundle = "ca.crt"
	// keyCert and keyKey are the signing CA.
	keyCert = corev1.TLSCertKey
	keyKey  = corev1.TLSPrivateKeyKey
)

const (
	caLifetime      = 365 * 24 * time.Hour
	servingLifetime = 24 * time.Hour
	// skew is how far the clocks of the machines may differ.
	skew = 10 * time.Minute
	// settle is how long a new CA must have been in the caBundle before its certificates are served: API
	// servers learn of a changed registration by watching it.
	settle = time.Minute
)

// Source issues the serving certificate and keeps the caBundle in step.
type Source struct {
	// Client reads and writes without a cache: the Secret and the target only.
	Client client.Client
	// Namespace of the Secret and of the Service.
	Namespace string
	// Secret is the name of the Secret that holds the CA.
	Secret string
	// Service is the name of the Service in front of the server.
	Service string
	// Target is where API servers read which CA to believe.
	Target Target
	Log    *slog.Logger
	// Now is time.Now, but in tests.
	Now func() time.Time

	mu      sync.RWMutex
	issued  []func()
	serving *tls.Certificate // issued by issuer
	issuer  *x509.Certificate
	ready   error // why the certificate must not be served; nil when it may
	// seen is when the newest CA was first found in the caBundle, and which one that was.
	seen   time.Time
	seenCA *x509.Certificate
}

// authority is what the Secret holds.
type authority struct {
	cert   *x509.Certificate
	key    crypto.Signer
	bundle []*x509.Certificate // cert first
}

// errNotSynced is the state before the first Sync.
var errNotSynced = errors.New("the serving certificate has not been issued yet")

// GetCertificate serves a tls.Config.
func (s *Source) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.serving == nil {
		return nil, errNotSynced
	}
	return s.serving, nil
}

// OnIssue calls f after every new serving certificate.
func (s *Source) OnIssue(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.issued = append(s.issued, f)
}

// Ready returns nil when API servers can verify the certificate that is served: it is valid and the
// caBundle holds its CA.
func (s *Source) Ready() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch {
	case s.serving == nil:
		return errors.Join(errNotSynced, s.ready)
	case s.ready != nil:
		return s.ready
	case !s.Now().Before(s.serving.Leaf.NotAfter):
		return errors.New("the serving certificate has expired")
	}
	return nil
}

// NotAfter returns when the serving certificate expires, zero when there is none.
func (s *Source) NotAfter() time.Time {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.serving == nil {
		return time.Time{}
	}
	return s.serving.Leaf.NotAfter
}

// Run syncs until ctx ends: every second until it is ready, then every ten seconds.
func (s *Source) Run(ctx context.Context) {
	for {
		err := s.Sync(ctx)
		wait := 10 * time.Second
		if s.Ready() != nil {
			wait = time.Second
		}
		if err != nil && ctx.Err() == nil {
			s.Log.Error("certificates are not in step", "error", err.Error())
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// Sync does one step: it makes or rotates the CA, brings the caBundle in step, and renews the serving
// certificate. It is safe to run in several replicas at once.
func (s *Source) Sync(ctx context.Context) error {
	ca, err := s.authority(ctx)
	if err != nil {
		s.setReady(err)
		return err
	}
	published, err := s.publish(ctx, ca.bundle)
	if err != nil {
		s.setReady(err)
		return err
	}
	if !contains(published, ca.cert) {
		err := fmt.Errorf("the caBundle of %s lacks the certificate authority", s.Target)
		s.setReady(err)
		return err
	}
	now := s.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seenCA == nil || !s.seenCA.Equal(ca.cert) {
		s.seenCA, s.seen = ca.cert, now
	}
	s.ready = nil
	if s.serving != nil && (!contains(published, s.issuer) || !now.Before(s.serving.Leaf.NotAfter)) {
		s.serving = nil // its CA was replaced by hand, or the clock jumped: it is of no use
	}
	if s.serving != nil && !s.issuer.Equal(ca.cert) && now.Sub(s.seen) < settle {
		return nil // the API servers may not know the new CA yet
	}
	if s.serving != nil && s.issuer.Equal(ca.cert) && now.Before(renewAt(s.serving.Leaf)) {
		return nil
	}
	serving, err := s.issue(ca)
	if err != nil {
		return err
	}
	s.serving, s.issuer = serving, ca.cert
	s.Log.Info("serving certificate issued", "notAfter", serving.Leaf.NotAfter)
	for _, f := range s.issued {
		go f() // it may ask for the certificate
	}
	return nil
}

func (s *Source) setReady(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// A replica whose certificate was in order stays so when the API server cannot be asked for a while.
	if s.serving == nil || s.ready != nil {
		s.ready = err
	}
}

// renewAt is when two thirds of a certificate's life are over.
func renewAt(c *x509.Certificate) time.Time {
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) * 2 / 3)
}

func contains(list []*x509.Certificate, c *x509.Certificate) bool {
	return slices.ContainsFunc(list, c.Equal)
}

// authority reads the CA from the Secret. It makes the Secret if there is none, and replaces a CA that is
// in the last third of its life; whoever comes second reads what the first has written.
func (s *Source) authority(ctx context.Context) (*authority, error) {
	key := types.NamespacedName{Namespace: s.Namespace, Name: s.Secret}
	var secret corev1.Secret
	err := s.Client.Get(ctx, key, &secret)
	if apierrors.IsNotFound(err) {
		ca, err := newAuthority(s.Service, s.Now(), nil)
		if err != nil {
			return nil, err
		}
		secret = corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Secret},
			Type:       corev1.SecretTypeTLS,
		}
		if secret.Data, err = ca.data(); err != nil {
			return nil, err
		}
		switch err := s.Client.Create(ctx, &secret); {
		case apierrors.IsAlreadyExists(err):
			if err := s.Client.Get(ctx, key, &secret); err != nil {
				return nil, fmt.Errorf("read secret %s: %w", s.Secret, err)
			}
		case err != nil:
			return nil, fmt.Errorf("create secret %s: %w", s.Secret, err)
		default:
			s.Log.Info("certificate authority made", "notAfter", ca.cert.NotAfter)
			return ca, nil
		}
	} else if err != nil {
		return nil, fmt.Errorf("read secret %s: %w", s.Secret, err)
	}

	ca, err := parseAuthority(secret.Data, s.Now())
	if err != nil {
		return nil, fmt.Errorf("read secret %s: %w; delete it, and a new one is made", s.Secret, err)
	}
	if s.Now().Before(renewAt(ca.cert)) {
		return ca, nil
	}
	next, err := newAuthority(s.Service, s.Now(), ca.bundle)
	if err != nil {
		return nil, err
	}
	if secret.Data, err = next.data(); err != nil {
		return nil, err
	}
	// The resource version in it makes a second replica's update a conflict.
	if err := s.Client.Update(ctx, &secret); err != nil {
		// After a conflict the old bundle must not be published: the next step reads the new one.
		return nil, fmt.Errorf("rotate secret %s: %w", s.Secret, err)
	}
	s.Log.Info("certificate authority rotated", "notAfter", next.cert.NotAfter)
	return next, nil
}

// publish writes the bundle into the target where it differs, and returns what all of its places hold
// now.
func (s *Source) publish(ctx context.Context, bundle []*x509.Certificate) ([]*x509.Certificate, error) {
	var object unstructured.Unstructured
	object.SetGroupVersionKind(s.Target.kind)
	if err := s.Client.Get(ctx, types.NamespacedName{Name: s.Target.name}, &object); err != nil {
		return nil, fmt.Errorf("read %s: %w", s.Target, err)
	}
	fields, err := s.Target.fields(object.Object)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.Target, err)
	}
	if len(fields) == 0 {
		return nil, fmt.Errorf("%s has no place for a caBundle: apply the manifests again", s.Target)
	}
	want := base64.StdEncoding.EncodeToString(encodeCerts(bundle))
	// The test of the version makes a concurrent change an error, and the next step tries again.
	ops := fmt.Appendf(nil, `[{"op":"test","path":"/metadata/resourceVersion","value":%q}`, object.GetResourceVersion())
	changed := false
	for _, f := range fields {
		if f.value != want {
			changed = true
			ops = fmt.Appendf(ops, `,{"op":"add","path":%q,"value":%q}`, f.pointer, want)
		}
	}
	if !changed {
		return bundle, nil
	}
	ops = append(ops, ']')
	if err := s.Client.Patch(ctx, &object, client.RawPatch(types.JSONPatchType, ops)); err != nil {
		return nil, fmt.Errorf("write caBundle of %s: %w", s.Target, err)
	}
	s.Log.Info("caBundle written", "certificates", len(bundle))
	return bundle, nil
}

// issue makes a serving certificate.
func (s *Source) issue(ca *authority) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate serving key: %w", err)
	}
	name := s.Service + "." + s.Namespace + ".svc"
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		DNSNames:    []string{name, name + ".cluster.local"},
		NotBefore:   s.Now().Add(-skew),
		NotAfter:    s.Now().Add(servingLifetime),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	leaf, err := sign(template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

// newAuthority makes the CA of a Service. The bundle keeps the older ones.
func newAuthority(service string, now time.Time, older []*x509.Certificate) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate key of the certificate authority: %w", err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: service},
		NotBefore:             now.Add(-skew),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	cert, err := sign(template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, bundle: append([]*x509.Certificate{cert}, older...)}, nil
}

// sign gives the template a serial number of 127 random bits and signs it.
func sign(template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("generate serial number: %w", err)
	}
	template.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return x509.ParseCertificate(der)
}

func (a *authority) data() (map[string][]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(a.key)
	if err != nil {
		return nil, fmt.Errorf("encode key of the certificate authority: %w", err)
	}
	return map[string][]byte{
		keyBundle: encodeCerts(a.bundle),
		keyCert:   encodeCerts([]*x509.Certificate{a.cert}),
		keyKey:    pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
	}, nil
}

// parseAuthority reads the Secret's data. Certificates of the bundle that have expired are left out.
func parseAuthority(data map[string][]byte, now time.Time) (*authority, error) {
	pair, err := tls.X509KeyPair(data[keyCert], data[keyKey])
	if err != nil {
		return nil, err
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !pair.Leaf.IsCA {
		return nil, errors.New("it is not a certificate authority")
	}
	a := &authority{cert: pair.Leaf, key: key, bundle: []*x509.Certificate{pair.Leaf}}
	for rest := data[keyBundle]; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return a, nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		if now.Before(c.NotAfter) && !contains(a.bundle, c) {
			a.bundle = append(a.bundle, c)
		}
	}
}

func encodeCerts(list []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range list {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes()
}
