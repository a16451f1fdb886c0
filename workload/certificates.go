package workload

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
)

// parseCertificates reads PEM certificates and nothing else; there is at least one.
func parseCertificates(text string) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for rest := []byte(text); ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			if len(certs) == 0 || strings.TrimSpace(string(rest)) != "" {
				return nil, errors.New("give PEM certificates and nothing else")
			}
			return certs, nil
		}
		cert, err := x509.ParseCertificate(b.Bytes)
		if b.Type != "CERTIFICATE" || err != nil {
			return nil, fmt.Errorf("PEM block %d, a %q, is not a certificate", len(certs)+1, b.Type)
		}
		certs = append(certs, cert)
	}
}

// parsePool reads what parseCertificates does, as roots.
func parsePool(text string) (*x509.CertPool, error) {
	certs, err := parseCertificates(text)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool, nil
}
