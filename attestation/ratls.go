package attestation

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"cloister.dev/cloister/internal/cbor"
)

const (
	// ALPN is the protocol name that a client lists to be shown the attested certificate. It is a
	// request, not a protocol: a server never selects it.
	ALPN = "cloister/1"

	// UserDataServer and UserDataClient are the exact user_data of a document in the certificate of
	// a TLS server or client, so that neither stands in for the other or for a document of another use.
	UserDataServer = "cloister/1 tls-server"
	UserDataClient = "cloister/1 tls-client"

	// MediaType names a Nitro attestation document inside the wrapper. None is registered; this is
	// the one that the Veraison verifier uses.
	MediaType = "application/aws-nitro-document"

	cmwEvidence = 1 << 2 // RFC 9999: bit 2 of the indicator is "evidence"
)

// oidCMW is id-pe-cmw, the X.509 extension for a conceptual message wrapper (RFC 9999).
var oidCMW = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 1, 35}

// NewCertificate returns the DER of a self-signed certificate for key, which must be on P-256, that
// carries document in its id-pe-cmw extension: the CBOR choice of RFC 9999, a record
//
//	["application/aws-nitro-document", document, 4]
//
// where 4 marks evidence. The extension is not critical, since ordinary clients must ignore it. The
// document must attest the key's SubjectPublicKeyInfo as public_key.
func NewCertificate(key *ecdsa.PrivateKey, document []byte, notBefore, notAfter time.Time) ([]byte, error) {
	if key.Curve != elliptic.P256() {
		return nil, errors.New("create attested certificate: the key is not on P-256")
	}
	record := cbor.AppendArray(nil, 3)
	record = cbor.AppendText(record, MediaType)
	record = cbor.AppendBytes(record, document)
	record = cbor.AppendUint(record, cmwEvidence)
	value, err := asn1.Marshal(record) // CHOICE { json UTF8String, cbor OCTET STRING }
	if err != nil {
		return nil, fmt.Errorf("create attested certificate: %w", err)
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "cloister"},
		NotBefore:             notBefore,
		NotAfter:              notAfter,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		ExtraExtensions:       []pkix.Extension{{Id: oidCMW, Value: value}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("create attested certificate: %w", err)
	}
	return der, nil
}

// DocumentFromCertificate returns the attestation document that cert carries, unverified.
func DocumentFromCertificate(cert *x509.Certificate) ([]byte, error) {
	for _, ext := range cert.Extensions {
		if ext.Id.Equal(oidCMW) {
			doc, err := unwrap(ext.Value)
			if err != nil {
				return nil, refuse(RuleCertificate, "the certificate's extension %s is not a wrapped Nitro document: %w", oidCMW, err)
			}
			return doc, nil
		}
	}
	return nil, refuse(RuleCertificate, "the other end showed a certificate without an attestation document (extension %s): it is no attested enclave, or a server that does not know the protocol name %q", oidCMW, ALPN)
}

// unwrap reads the value of an id-pe-cmw extension.
func unwrap(value []byte) ([]byte, error) {
	var record []byte
	if rest, err := asn1.Unmarshal(value, &record); err != nil {
		return nil, err
	} else if len(rest) > 0 {
		return nil, fmt.Errorf("%d bytes follow the OCTET STRING", len(rest))
	}
	var doc []byte
	dec := cbor.NewDecoder(record)
	elements := 0
	err := dec.Array(func(i int) error {
		elements++
		switch i {
		case 0:
			mediaType, err := dec.Text()
			if err == nil && mediaType != MediaType {
				err = fmt.Errorf("the media type is %q, not %q", mediaType, MediaType)
			}
			return err
		case 1:
			var err error
			doc, err = dec.Bytes()
			return err
		case 2:
			indicator, err := dec.Uint()
			if err == nil && indicator != cmwEvidence {
				err = fmt.Errorf("the indicator is %d, not %d (evidence)", indicator, cmwEvidence)
			}
			return err
		}
		return errors.New("more than 3 elements")
	})
	if err == nil && elements != 3 {
		err = fmt.Errorf("%d elements, not 3", elements)
	}
	if err == nil {
		err = dec.End()
	}
	return doc, err
}

// IsAttestedHello reports whether a TLS client asks for the attested certificate by listing ALPN.
func IsAttestedHello(hello *tls.ClientHelloInfo) bool {
	return slices.Contains(hello.SupportedProtos, ALPN)
}

// Verifier verifies the attested certificates of TLS connections. It remembers what it verified by
// the certificate's digest until the document is too old or a certificate of its chain expires, and
// chains as Chains does. It is safe for concurrent use.
type Verifier struct {
	opts         Options
	certificates cache[*Document]
}

// NewVerifier returns a verifier for opts, which must have Measurements. UserData, if nil, is
// UserDataServer; PublicKey and Now must be unset, since the connection supplies them.
func NewVerifier(opts Options) (*Verifier, error) {
	if err := opts.Measurements.Validate(); err != nil {
		return nil, fmt.Errorf("create verifier: %w", err)
	}
	if opts.PublicKey != nil || !opts.Now.IsZero() {
		return nil, errors.New("create verifier: public key and time come from the connection and must not be set")
	}
	if opts.UserData == nil {
		opts.UserData = []byte(UserDataServer)
	}
	if opts.MaxAge == 0 {
		opts.MaxAge = DefaultMaxAge
	}
	if opts.Chains == nil {
		opts.Chains = new(Chains)
	}
	return &Verifier{opts: opts}, nil
}

// ClientConfig returns a copy of base (or of an empty configuration, if nil) that connects only to
// an attested enclave: TLS 1.3 only, ALPN added to the offer, full handshakes only, and the document
// verified before the client sends its first byte of data. Names and certificate authorities are not
// checked: the measurement set decides. A VerifyConnection of base runs afterwards; base.Time, if
// set, is the clock.
//
// crypto/tls also returns io.EOF when the connection below it ends between two records, which anybody on
// the way can cause. Where the end of the connection is the end of the data, the connection below must
// turn its io.EOF into another error.
//
// With http.Transport set ForceAttemptHTTP2 for HTTP/2; with gRPC use credentials.NewTLS.
func (v *Verifier) ClientConfig(base *tls.Config) *tls.Config {
	config := &tls.Config{}
	if base != nil {
		config = base.Clone()
	}
	config.MinVersion, config.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
	config.SessionTicketsDisabled, config.ClientSessionCache = true, nil
	config.NextProtos = slices.Concat(config.NextProtos, []string{ALPN})
	config.InsecureSkipVerify = true // replaced by VerifyConnection, which sees every handshake
	v.demand(config)
	return config
}

// demand makes every handshake of config fail whose other end is not verified. What config already does
// with a connection comes afterwards.
func (v *Verifier) demand(config *tls.Config) {
	after := config.VerifyConnection
	now := config.Time
	if now == nil {
		now = time.Now
	}
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if _, err := v.verifyConnection(state, now()); err != nil {
			return err
		}
		if after != nil {
			return after(state)
		}
		return nil
	}
}

// Document verifies an established connection and returns its document, which must not be changed;
// after a handshake with ClientConfig it answers from the cache.
func (v *Verifier) Document(state tls.ConnectionState) (*Document, error) {
	return v.verifyConnection(state, time.Now())
}

func (v *Verifier) verifyConnection(state tls.ConnectionState, now time.Time) (*Document, error) {
	switch {
	case state.Version != tls.VersionTLS13:
		return nil, refuse(RuleCertificate, "the connection does not use TLS 1.3")
	case state.DidResume:
		return nil, refuse(RuleCertificate, "the connection resumes an older one, so the key was not proved on it")
	case state.NegotiatedProtocol == ALPN:
		return nil, refuse(RuleCertificate, "the server selected %q, which no enclave does", ALPN)
	case len(state.PeerCertificates) != 1:
		return nil, refuse(RuleCertificate, "the other end showed %d certificates, but an attested one stands alone", len(state.PeerCertificates))
	}
	cert := state.PeerCertificates[0]
	digest := sha256.Sum256(cert.Raw)
	if document, ok := v.certificates.get(digest, now); ok {
		return document, nil
	}
	document, valid, err := v.verifyCertificate(cert, now)
	if err != nil {
		return nil, err
	}
	v.certificates.put(digest, document, valid, now)
	return document, nil
}

// verifyCertificate checks a certificate and its document, and returns the period in which both are
// accepted. That its key made the handshake is crypto/tls's part (CertificateVerify, RFC 8446, section
// 4.4.3).
func (v *Verifier) verifyCertificate(cert *x509.Certificate, now time.Time) (*Document, period, error) {
	doc, err := DocumentFromCertificate(cert)
	if err != nil {
		return nil, period{}, err
	}
	if !validity(cert).contains(now) {
		return nil, period{}, refuse(RuleCertificate, "the certificate is valid from %s to %s, but now is %s",
			stamp(cert.NotBefore), stamp(cert.NotAfter), stamp(now))
	}
	opts := v.opts
	opts.Now = now
	opts.PublicKey = cert.RawSubjectPublicKeyInfo
	document, valid, err := verify(bytes.Clone(doc), opts)
	return document, valid.and(validity(cert)), err
}

// ClientVerifier verifies the attested certificates of TLS clients: of enclaves that connect to a
// server. It remembers what it verified as a Verifier does and is safe for concurrent use.
type ClientVerifier struct {
	v *Verifier
}

// NewClientVerifier returns a verifier for opts, which must have Measurements. UserData must be unset,
// since it is UserDataClient: the certificate with which an enclave serves is none with which it may
// connect. PublicKey and Now must be unset too, since the connection supplies them.
func NewClientVerifier(opts Options) (*ClientVerifier, error) {
	if opts.UserData != nil {
		return nil, fmt.Errorf("create client verifier: the user data of a client is %q and must not be set", UserDataClient)
	}
	opts.UserData = []byte(UserDataClient)
	v, err := NewVerifier(opts)
	if err != nil {
		return nil, err
	}
	return &ClientVerifier{v}, nil
}

// ServerConfig returns a copy of base, which must have a certificate, that serves only attested
// enclaves: TLS 1.3 only, a client certificate demanded, full handshakes only, and the document
// verified before the server reads a byte of data. Certificate authorities for clients are not used:
// root and measurement set decide. A VerifyConnection of base runs afterwards; base.Time, if set, is
// the clock.
//
// A client learns of a refusal when it first reads (RFC 8446, section 4.4.2). With gRPC use
// credentials.NewTLS. A connection may outlive its document: a server that serves long ones asks
// Document again, or limits their life.
func (c *ClientVerifier) ServerConfig(base *tls.Config) *tls.Config {
	config := base.Clone()
	config.MinVersion, config.MaxVersion = tls.VersionTLS13, tls.VersionTLS13
	config.SessionTicketsDisabled = true
	config.ClientAuth, config.ClientCAs = tls.RequireAnyClientCert, nil
	config.GetConfigForClient = nil // could lead around all of this
	c.v.demand(config)
	return config
}

// Document verifies an established connection and returns the client's document, which must not be
// changed. It answers from the cache while the document is young enough, and refuses it afterwards.
func (c *ClientVerifier) Document(state tls.ConnectionState) (*Document, error) {
	return c.v.verifyConnection(state, time.Now())
}
