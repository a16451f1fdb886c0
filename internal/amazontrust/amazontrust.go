// Package amazontrust holds the root certificates of Amazon Trust Services, below which all public
// endpoints of AWS have theirs (https://www.amazontrust.com/repository/). Neither an enclave nor our
// images have other roots.
package amazontrust

import (
	"crypto/x509"
	_ "embed"
)

//go:embed roots.pem
var roots []byte

// Roots returns the certificates: Amazon Root CA 1 to 4 and Starfield Services Root CA G2.
func Roots() *x509.CertPool {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		panic("amazontrust: roots.pem holds no certificate")
	}
	return pool
}
