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
	// keyNextCert and keyNextKey are the CA that will sign next, if there is one.
	keyNextCert = "next.crt"
	keyNextKey  = "next.key"
)

const (
	caLifetime      = 365 * 24 * time.Hour
	servingLifetime = 24 * time.Hour
	// skew is how far the clocks of the machines may differ.
	skew = 10 * time.Minute
	// settle is how long a new CA must have been in the caBundle before its certificates are served: API
	// servers learn of a changed registration by watching it.
	settle = 30 * time.Second
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
	bundle  []*x509.Certificate
	ready   error // why the certificate must not be served; nil when it may
	// seen is when each certificate was first found in the caBundle, by its DER. It is measured here and not
	// written down: clocks of machines differ. Only Sync uses it.
	seen map[string]time.Time
}

// signer is a CA.
type signer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// authority is what the Secret holds.
type authority struct {
	signer
	next   *signer             // takes over once every API server knows it
	bundle []*x509.Certificate // all that are valid, the signing one first
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

// ServerName is the name that API servers call the server by.
func (s *Source) ServerName() string { return s.Service + "." + s.Namespace + ".svc" }

// Roots returns what the caBundle was when it was last read or written.
func (s *Source) Roots() *x509.CertPool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	pool := x509.NewCertPool()
	for _, c := range s.bundle {
		pool.AddCert(c)
	}
	return pool
}

// Sync does one step: it makes or rotates the CA, brings the caBundle in step, and renews the serving
// certificate. It is safe to run in several replicas at once: of two that write, one gets a conflict and
// reads what the other has written in its next step.
func (s *Source) Sync(ctx context.Context) error {
	ca, err := s.authority(ctx)
	if err != nil {
		s.setReady(err)
		return err
	}
	if err := s.serve(ca); err != nil {
		s.setReady(err)
		return err
	}
	return nil
}

// serve brings the serving certificate in step with the CA, which is in the caBundle.
func (s *Source) serve(ca *authority) error {
	now := s.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bundle, s.ready = ca.bundle, nil
	if s.serving != nil && (!contains(ca.bundle, s.issuer) || !now.Before(s.serving.Leaf.NotAfter)) {
		s.serving = nil // its CA was replaced by hand, or the clock jumped: it is of no use
	}
	if s.serving != nil && !s.issuer.Equal(ca.cert) && !s.settled(ca.cert) {
		return nil // API servers may not know the new CA yet
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

// published notes that the caBundle holds this bundle.
func (s *Source) published(bundle []*x509.Certificate) {
	seen := map[string]time.Time{}
	for _, c := range bundle {
		if at, ok := s.seen[string(c.Raw)]; ok {
			seen[string(c.Raw)] = at
		} else {
			seen[string(c.Raw)] = s.Now()
		}
	}
	s.seen = seen
}

// settled tells whether API servers know the CA, which is in the caBundle.
func (s *Source) settled(c *x509.Certificate) bool {
	return s.Now().Sub(s.seen[string(c.Raw)]) >= settle
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

// authority returns the CA with its bundle, which it has published. It does one step of a rotation where one
// is due.
func (s *Source) authority(ctx context.Context) (*authority, error) {
	secret, ca, err := s.read(ctx)
	if err != nil {
		return nil, err
	}
	if ca.next == nil && !s.Now().Before(renewAt(ca.cert)) {
		if ca.next, err = newSigner(s.Service, s.Now()); err != nil {
			return nil, err
		}
		ca.bundle = append(ca.bundle, ca.next.cert)
		if err := s.write(ctx, secret, ca); err != nil {
			return nil, err
		}
		s.Log.Info("next certificate authority made", "notAfter", ca.next.cert.NotAfter)
	}
	if err := s.publish(ctx, ca.bundle); err != nil {
		return nil, err
	}
	s.published(ca.bundle)
	// A CA that has expired meanwhile, because no replica ran, leaves nothing to wait for.
	if ca.next != nil && (s.settled(ca.next.cert) || !s.Now().Before(ca.cert.NotAfter)) {
		ca.signer, ca.next = *ca.next, nil
		ca.bundle = first(ca.bundle, ca.cert)
		if err := s.write(ctx, secret, ca); err != nil {
			return nil, err
		}
		s.Log.Info("certificate authority rotated", "notAfter", ca.cert.NotAfter)
	}
	return ca, nil
}

// first returns the list with c at its head.
func first(list []*x509.Certificate, c *x509.Certificate) []*x509.Certificate {
	return append([]*x509.Certificate{c}, slices.DeleteFunc(slices.Clone(list), c.Equal)...)
}

// read returns what the Secret holds. It makes the Secret if there is none; whoever comes second reads what
// the first has written. What the caBundle holds then stays in it, because replicas may still serve it.
func (s *Source) read(ctx context.Context) (*corev1.Secret, *authority, error) {
	key := types.NamespacedName{Namespace: s.Namespace, Name: s.Secret}
	var secret corev1.Secret
	err := s.Client.Get(ctx, key, &secret)
	if apierrors.IsNotFound(err) {
		_, fields, err := s.target(ctx)
		if err != nil {
			return nil, nil, err
		}
		made, err := newSigner(s.Service, s.Now())
		if err != nil {
			return nil, nil, err
		}
		ca := &authority{signer: *made, bundle: []*x509.Certificate{made.cert}}
		for _, f := range fields {
			ca.bundle = appendValid(ca.bundle, f.certificates(), s.Now())
		}
		secret = corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Secret},
			Type:       corev1.SecretTypeTLS,
		}
		if secret.Data, err = ca.data(); err != nil {
			return nil, nil, err
		}
		switch err := s.Client.Create(ctx, &secret); {
		case apierrors.IsAlreadyExists(err):
			if err := s.Client.Get(ctx, key, &secret); err != nil {
				return nil, nil, fmt.Errorf("read secret %s: %w", s.Secret, err)
			}
		case err != nil:
			return nil, nil, fmt.Errorf("create secret %s: %w", s.Secret, err)
		default:
			s.Log.Info("certificate authority made", "notAfter", ca.cert.NotAfter)
			return &secret, ca, nil
		}
	} else if err != nil {
		return nil, nil, fmt.Errorf("read secret %s: %w", s.Secret, err)
	}
	ca, err := parseAuthority(secret.Data, s.Now())
	if err != nil {
		return nil, nil, fmt.Errorf("read secret %s: %w; delete it, and a new one is made", s.Secret, err)
	}
	return &secret, ca, nil
}

// write puts ca into the Secret. The resource version in it makes a second replica's write a conflict.
func (s *Source) write(ctx context.Context, secret *corev1.Secret, ca *authority) error {
	data, err := ca.data()
	if err != nil {
		return err
	}
	secret.Data = data
	if err := s.Client.Update(ctx, secret); err != nil {
		return fmt.Errorf("write secret %s: %w", s.Secret, err)
	}
	return nil
}

// target reads the object that names the caBundle, and its places.
func (s *Source) target(ctx context.Context) (*unstructured.Unstructured, []bundleField, error) {
	var object unstructured.Unstructured
	object.SetGroupVersionKind(s.Target.kind)
	if err := s.Client.Get(ctx, types.NamespacedName{Name: s.Target.name}, &object); err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", s.Target, err)
	}
	fields, err := s.Target.fields(object.Object)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", s.Target, err)
	}
	if len(fields) == 0 {
		return nil, nil, fmt.Errorf("%s has no place for a caBundle: apply the manifests again", s.Target)
	}
	return &object, fields, nil
}

// publish writes the bundle into each place of the target where it differs.
func (s *Source) publish(ctx context.Context, bundle []*x509.Certificate) error {
	object, fields, err := s.target(ctx)
	if err != nil {
		return err
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
		return nil
	}
	ops = append(ops, ']')
	if err := s.Client.Patch(ctx, object, client.RawPatch(types.JSONPatchType, ops)); err != nil {
		return fmt.Errorf("write caBundle of %s: %w", s.Target, err)
	}
	s.Log.Info("caBundle written", "certificates", len(bundle))
	return nil
}

// issue makes a serving certificate.
func (s *Source) issue(ca *authority) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate serving key: %w", err)
	}
	name := s.ServerName()
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

// newSigner makes a CA for a Service.
func newSigner(service string, now time.Time) (*signer, error) {
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
	return &signer{cert, key}, nil
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
	data := map[string][]byte{keyBundle: encodeCerts(a.bundle)}
	put := func(s *signer, keyCert, keyKey string) error {
		der, err := x509.MarshalPKCS8PrivateKey(s.key)
		if err != nil {
			return fmt.Errorf("encode key of the certificate authority: %w", err)
		}
		data[keyCert] = encodeCerts([]*x509.Certificate{s.cert})
		data[keyKey] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
		return nil
	}
	if a.next != nil {
		if err := put(a.next, keyNextCert, keyNextKey); err != nil {
			return nil, err
		}
	}
	return data, put(&a.signer, keyCert, keyKey)
}

// parseAuthority reads the Secret's data. Certificates of the bundle that have expired are left out.
func parseAuthority(data map[string][]byte, now time.Time) (*authority, error) {
	current, err := parseSigner(data[keyCert], data[keyKey])
	if err != nil {
		return nil, err
	}
	a := &authority{signer: *current, bundle: []*x509.Certificate{current.cert}}
	if _, ok := data[keyNextCert]; ok {
		if a.next, err = parseSigner(data[keyNextCert], data[keyNextKey]); err != nil {
			return nil, fmt.Errorf("next: %w", err)
		}
	}
	list, err := decodeCerts(data[keyBundle])
	if err != nil {
		return nil, err
	}
	a.bundle = appendValid(a.bundle, list, now)
	if a.next != nil && !contains(a.bundle, a.next.cert) {
		return nil, errors.New("next: the bundle lacks it")
	}
	return a, nil
}

func parseSigner(cert, key []byte) (*signer, error) {
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	private, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !pair.Leaf.IsCA {
		return nil, errors.New("it is not a certificate authority")
	}
	return &signer{pair.Leaf, private}, nil
}

// appendValid appends what is valid of more and not there yet.
func appendValid(list, more []*x509.Certificate, now time.Time) []*x509.Certificate {
	for _, c := range more {
		if now.Before(c.NotAfter) && !contains(list, c) {
			list = append(list, c)
		}
	}
	return list
}

func decodeCerts(data []byte) ([]*x509.Certificate, error) {
	var list []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return list, nil
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
}

func encodeCerts(list []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range list {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes()
}
