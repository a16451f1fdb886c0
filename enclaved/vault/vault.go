// Package vault is the part of an enclave that keeps its secrets, and the only one that talks to the
// security module: it measures the workload into PCR16, makes the attested key and its certificate,
// and keeps the certificate's attestation document young.
package vault

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/workload"
)

const (
	// workloadPCR is the register of the workload manifest.
	workloadPCR = 16

	// renewEvery is the age at which the certificate's document is replaced; clients accept 15 minutes
	// by default.
	renewEvery = 5 * time.Minute
	// A failed renewal is tried again after firstRetry, doubled each time up to lastRetry.
	firstRetry = time.Second
	lastRetry  = time.Minute
	// renewTimeout bounds one renewal: the module answers within milliseconds.
	renewTimeout = 30 * time.Second

	// A certificate is valid from clockSkew ago, for clients whose clock is late, and as long as the
	// module's own certificate lives. The document's age limits its use before that.
	clockSkew       = 5 * time.Minute
	certificateLife = 3 * time.Hour

	// maxWaiting is how many callers may wait for a fresh document.
	maxWaiting = 16
)

var (
	// ErrBusy is returned when too many callers wait for a fresh document already.
	ErrBusy = errors.New("too many requests for a fresh attestation document are waiting, try again later")
	// ErrNotMeasured is returned before Measure has succeeded.
	ErrNotMeasured = errors.New("the workload has not been measured yet")
)

// Vault holds the attested key. There is one in the life of an enclave.
type Vault struct {
	module *nsm.Module

	begun       atomic.Bool
	key         *ecdsa.PrivateKey // set by Measure, never handed out but inside a tls.Certificate
	publicKey   []byte            // SubjectPublicKeyInfo, DER
	certificate atomic.Pointer[tls.Certificate]
	imported    atomic.Pointer[tls.Certificate] // set by UseCertificate
	waiting     chan struct{}

	clientMu sync.Mutex // one ClientCertificate at a time
	client   *tls.Certificate
	clientAt time.Time // when client was made

	stop    context.CancelFunc
	stopped context.Context
	renewal sync.WaitGroup
}

// New returns a vault that uses module and leaves closing it to the caller.
func New(module *nsm.Module) *Vault {
	v := &Vault{module: module, waiting: make(chan struct{}, maxWaiting)}
	v.stopped, v.stop = context.WithCancel(context.Background())
	return v
}

// Format prints no secret whatever the verb.
func (v *Vault) Format(f fmt.State, _ rune) { io.WriteString(f, "vault") }

// Calls returns how many requests the security module got.
func (v *Vault) Calls() uint64 { return v.module.Calls() }

// Close ends the renewal of the certificate.
func (v *Vault) Close() {
	v.stop()
	v.renewal.Wait()
}

// Measure extends PCR16 with the digest of the canonical manifest, locks it, makes the attested key and
// its first certificate, and returns an attestation document that shows the register (no user data, no
// nonce, no public key). It can be called once: PCR16 must be zero before, and an enclave in which any
// step failed must be replaced.
func (v *Vault) Measure(ctx context.Context, canonicalManifest []byte) (document []byte, err error) {
	if !v.begun.CompareAndSwap(false, true) {
		return nil, errors.New("the workload of this enclave has been measured already")
	}
	v.seed(ctx)
	if err := v.extend(ctx, canonicalManifest); err != nil {
		return nil, err
	}
	if document, err = v.module.Attest(ctx, nil, nil, nil); err != nil {
		return nil, fmt.Errorf("attest workload: %w", err)
	}
	if v.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, fmt.Errorf("create attested key: %w", err)
	}
	if v.publicKey, err = x509.MarshalPKIXPublicKey(v.key.Public()); err != nil {
		return nil, fmt.Errorf("create attested key: %w", err)
	}
	if err := v.renew(ctx); err != nil {
		return nil, err
	}
	v.renewal.Go(v.keepYoung)
	return document, nil
}

// extend brings PCR16 from zero to the manifest's value, for good.
func (v *Vault) extend(ctx context.Context, canonicalManifest []byte) error {
	before, locked, err := v.module.DescribePCR(ctx, workloadPCR)
	if err != nil {
		return fmt.Errorf("measure workload: %w", err)
	}
	if locked || !bytes.Equal(before, make([]byte, workload.PCRSize)) {
		return errors.New("measure workload: PCR16 has been used before, so this enclave cannot prove what it runs: replace it")
	}
	if _, err := v.module.ExtendPCR(ctx, workloadPCR, workload.Digest(canonicalManifest)); err != nil {
		return fmt.Errorf("measure workload: %w", err)
	}
	if err := v.module.LockPCR(ctx, workloadPCR); err != nil {
		return fmt.Errorf("measure workload: %w", err)
	}
	after, locked, err := v.module.DescribePCR(ctx, workloadPCR)
	if err != nil {
		return fmt.Errorf("measure workload: %w", err)
	}
	if !locked || !bytes.Equal(after, workload.PCR16(canonicalManifest)) {
		return errors.New("measure workload: PCR16 does not hold the workload's measurement after it was extended and locked")
	}
	return nil
}

// seed mixes the module's random bytes into the kernel's pool. The pool has other sources, so a failure
// is no reason to stop.
func (v *Vault) seed(ctx context.Context) {
	random, err := v.module.Random(ctx)
	if err == nil {
		err = os.WriteFile("/dev/urandom", random, 0)
	}
	if err != nil {
		slog.Warn("mix random bytes of the security module into the kernel's", "error", err)
	}
}

// renew replaces the certificate by one with a new document, for the same key.
func (v *Vault) renew(ctx context.Context) error {
	c, err := v.attest(ctx, attestation.UserDataServer)
	if err == nil {
		v.certificate.Store(c)
	}
	return err
}

// attest returns a certificate for the attested key with a new document for one use.
func (v *Vault) attest(ctx context.Context, userData string) (*tls.Certificate, error) {
	document, err := v.module.Attest(ctx, []byte(userData), nil, v.publicKey)
	if err != nil {
		return nil, fmt.Errorf("attest key: %w", err)
	}
	now := time.Now()
	der, err := attestation.NewCertificate(v.key, document, now.Add(-clockSkew), now.Add(certificateLife))
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: v.key}, nil
}

// keepYoung renews the certificate until Close. A certificate that cannot be renewed stays in use: its
// clients see the document's age themselves.
func (v *Vault) keepYoung() {
	wait, retry := renewEvery, firstRetry
	for {
		timer := time.NewTimer(wait)
		select {
		case <-v.stopped.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		ctx, cancel := context.WithTimeout(v.stopped, renewTimeout)
		err := v.renew(ctx)
		cancel()
		switch {
		case err == nil:
			wait, retry = renewEvery, firstRetry
		case v.stopped.Err() == nil:
			slog.Warn("renew attested certificate", "error", err, "retry_in", retry.String())
			wait, retry = retry, min(2*retry, lastRetry)
		}
	}
}

// Certificate returns the attested certificate, or to a client that does not ask for it the one of
// UseCertificate, if there is one. It is for tls.Config.GetCertificate, and never waits.
func (v *Vault) Certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c := v.imported.Load(); c != nil && !attestation.IsAttestedHello(hello) {
		return c, nil
	}
	if c := v.certificate.Load(); c != nil {
		return c, nil
	}
	return nil, ErrNotMeasured
}

// ClientCertificate returns the certificate with which the enclave connects to others, for
// tls.Config.GetClientCertificate. It is made when it is asked for and kept for 5 minutes; one that
// cannot be replaced stays in use, since the server sees the document's age itself.
func (v *Vault) ClientCertificate(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	if v.certificate.Load() == nil {
		return nil, ErrNotMeasured
	}
	v.clientMu.Lock()
	defer v.clientMu.Unlock()
	if v.client != nil && time.Since(v.clientAt) < renewEvery {
		return v.client, nil
	}
	ctx, cancel := context.WithTimeout(v.stopped, renewTimeout)
	defer cancel()
	c, err := v.attest(ctx, attestation.UserDataClient)
	switch {
	case err == nil:
		v.client, v.clientAt = c, time.Now()
	case v.client == nil:
		return nil, err
	default:
		slog.Warn("renew attested client certificate", "error", err)
	}
	return v.client, nil
}

// FreshDocument returns a new attestation document with nonce (at most nsm.MaxData bytes), without user
// data or public key: it shows the registers and says nothing about a connection. At most 16 callers
// wait; the next one gets ErrBusy.
func (v *Vault) FreshDocument(ctx context.Context, nonce []byte) ([]byte, error) {
	if v.certificate.Load() == nil {
		return nil, ErrNotMeasured
	}
	select {
	case v.waiting <- struct{}{}:
		defer func() { <-v.waiting }()
	default:
		return nil, ErrBusy
	}
	document, err := v.module.Attest(ctx, nil, nonce, nil)
	if err != nil {
		return nil, fmt.Errorf("make fresh attestation document: %w", err)
	}
	return document, nil
}
