package main

import (
	"crypto/x509"
	"encoding/pem"

	"k8s.io/apiserver/pkg/server/dynamiccertificates"

	"cloister.dev/cloister/internal/certs"
)

// certificate hands the serving certificate to the API server library, as
// dynamiccertificates.CertKeyContentProvider.
type certificate struct{ *certs.Source }

var _ dynamiccertificates.CertKeyContentProvider = certificate{}

// Name implements dynamiccertificates.CertKeyContentProvider.
func (certificate) Name() string { return "serving certificate of the controller" }

// CurrentCertKeyContent returns certificate and key as PEM; nothing before there is a certificate.
func (c certificate) CurrentCertKeyContent() (cert, key []byte) {
	pair, err := c.GetCertificate(nil)
	if err != nil {
		return nil, nil
	}
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		return nil, nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// AddListener implements dynamiccertificates.Notifier.
func (c certificate) AddListener(l dynamiccertificates.Listener) { c.OnIssue(l.Enqueue) }
