package workload

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
)

// TLSKMS as Manifest.TLS serves the certificate of KMS.Certificate to clients that do not ask for the
// attested one. Those that do get that one in any case.
const TLSKMS = "kms"

const (
	// maxCiphertext is the largest ciphertext that KMS decrypts, in bytes (API reference, Decrypt).
	maxCiphertext = 6144
	maxSecrets    = 64
)

// KMS is the AWS Key Management Service that opens the ciphertexts of a manifest, for this workload in an
// enclave and nobody else: its key policy asks for PCR16 and for the registers of the EIF.
type KMS struct {
	// Region is the AWS region, which signatures name.
	Region string `json:"region"`
	// Endpoint is an https URL without a path: of a VPC endpoint, or a FIPS one. Empty means the region's
	// public one.
	Endpoint string `json:"endpoint,omitempty"`
	// CA is one or more PEM certificates, the only roots that the endpoint's certificate may have. Empty
	// means Amazon's.
	CA string `json:"ca,omitempty"`
	// Certificate is what TLSKMS serves.
	Certificate *Certificate `json:"certificate,omitempty"`
}

// Certificate is a chain of certificates with its encrypted key.
type Certificate struct {
	// Chain is PEM: the certificate of the key first, then those of the authorities below the root.
	Chain string `json:"chain"`
	// Key is base64 of a ciphertext of KMS, of the key in PEM (PKCS #8, PKCS #1 or SEC 1).
	Key string `json:"key"`
	// EncryptionContext is what the key was encrypted with.
	EncryptionContext map[string]string `json:"encryptionContext,omitempty"`
}

// Secret is a value that only the workload sees, in an environment variable or in a file.
type Secret struct {
	// Name is for people, and unique in the manifest.
	Name string `json:"name"`
	// Ciphertext is base64 of a ciphertext of KMS.
	Ciphertext string `json:"ciphertext"`
	// Env is the name of a variable, File the absolute path of a file in memory that the workload's user
	// alone can read. Exactly one is set.
	Env  string `json:"env,omitempty"`
	File string `json:"file,omitempty"`
	// EncryptionContext is what the secret was encrypted with.
	EncryptionContext map[string]string `json:"encryptionContext,omitempty"`
}

// regionRE is the name of an AWS region in any partition, such as eu-central-1 or us-gov-west-1.
var regionRE = regexp.MustCompile(`^[a-z]{2}(-[a-z]+){1,3}-[0-9]{1,2}$`)

// envNameRE is a variable's name that every shell can read (POSIX.1-2017, section 8.1).
var envNameRE = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// URL is where the service is asked: Endpoint or the region's public one.
func (k *KMS) URL() string {
	if k.Endpoint != "" {
		return k.Endpoint
	}
	domain := "amazonaws.com"
	if strings.HasPrefix(k.Region, "cn-") {
		domain = "amazonaws.com.cn"
	}
	return fmt.Sprintf("https://kms.%s.%s", k.Region, domain)
}

// Address is the host:port of URL.
func (k *KMS) Address() string {
	u, err := url.Parse(k.URL())
	if err != nil {
		return ""
	}
	return endpoint(u)
}

// Roots are the certificates of CA, nil when there is none.
func (k *KMS) Roots() (*x509.CertPool, error) {
	if k.CA == "" {
		return nil, nil
	}
	return parsePool(k.CA)
}

// checkCiphertext says what is wrong with the base64 of a ciphertext.
func checkCiphertext(text string) error {
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(b) == 0 || strings.ContainsAny(text, "\r\n") {
		return errors.New("it must be base64 of what KMS has encrypted, in one line")
	}
	if len(b) > maxCiphertext {
		return fmt.Errorf("it has %d bytes, and KMS decrypts at most %d", len(b), maxCiphertext)
	}
	return nil
}

// validateKMS checks kms, secrets and tls, which need each other.
func (m *Manifest) validateKMS(bad func(string, ...any), text func(string, ...string)) {
	context := func(of string, values map[string]string) {
		for k, v := range values {
			if k == "" {
				bad("%s: encryptionContext has an empty name", of)
			}
			text(of+": encryptionContext", k, v)
		}
	}
	if len(m.Secrets) > maxSecrets {
		bad("there are %d secrets, at most %d are accepted", len(m.Secrets), maxSecrets)
	}
	names, targets := map[string]bool{}, map[string]bool{}
	for _, s := range m.Secrets {
		of := fmt.Sprintf("secret %q", s.Name)
		if !pluginNameRE.MatchString(s.Name) {
			bad("secret name %q must be of at most 63 lower case letters, digits and dashes", s.Name)
		}
		if names[s.Name] {
			bad("secret name %q is listed twice", s.Name)
		}
		names[s.Name] = true
		if err := checkCiphertext(s.Ciphertext); err != nil {
			bad("%s: ciphertext: %v", of, err)
		}
		target := s.Env + s.File
		switch {
		case (s.Env == "") == (s.File == ""):
			bad("%s must have exactly one of env and file", of)
		case s.Env != "" && !envNameRE.MatchString(s.Env):
			bad("%s: env %q must be a name of letters, digits and underscores", of, s.Env)
		case s.Env != "" && slices.ContainsFunc(m.Env, func(e EnvVar) bool { return e.Name == s.Env }):
			bad("%s: env %s is in the pod too: remove one of them", of, s.Env)
		case s.File != "" && (!path.IsAbs(s.File) || path.Clean(s.File) != s.File || s.File == "/" || forKernel(s.File)):
			bad("%s: file %q must be absolute, clean and outside of /dev, /proc and /sys", of, s.File)
		case targets[target]:
			bad("%s: %s is used by another secret", of, target)
		case slices.ContainsFunc(m.Mounts, func(v Mount) bool { return v.Path == s.File }):
			bad("%s: file %s is the path of a mount", of, s.File)
		}
		targets[target] = true
		text(of, s.File)
		context(of, s.EncryptionContext)
	}
	if m.TLS != "" && m.TLS != TLSKMS {
		bad("tls %q must be %s, or left out for a certificate that is made in the enclave", m.TLS, TLSKMS)
	}
	k := m.KMS
	if k == nil {
		if len(m.Secrets) > 0 || m.TLS == TLSKMS {
			bad("secrets and tls: %s need kms, which says who decrypts them", TLSKMS)
		}
		return
	}
	if len(m.Secrets) == 0 && m.TLS != TLSKMS {
		bad("kms must be left out when neither secrets nor tls: %s use it", TLSKMS)
	}
	if !regionRE.MatchString(k.Region) {
		bad("kms.region %q must be the name of an AWS region, such as eu-central-1", k.Region)
	}
	if e := k.Endpoint; e != "" {
		if u, err := url.Parse(e); err != nil || u.Scheme != "https" || u.Host == "" || e != "https://"+u.Host {
			bad("kms.endpoint %q must be https:// and a host, with a port if it is not 443", e)
		} else if _, _, err := ParseEndpoint(k.Address()); err != nil {
			bad("kms.endpoint %q: %v", e, err)
		} else if e == (&KMS{Region: k.Region}).URL() || u.Port() == "443" {
			bad("kms.endpoint %q must be left out for the region's own, and its port for 443", e)
		}
	}
	if _, err := k.Roots(); err != nil {
		bad("kms.ca: %v", err)
	}
	if (k.Certificate == nil) != (m.TLS != TLSKMS) {
		bad("kms.certificate and tls: %s go together: give both or neither", TLSKMS)
	}
	if c := k.Certificate; c != nil {
		if _, err := parseCertificates(c.Chain); err != nil {
			bad("kms.certificate.chain: %v", err)
		}
		if err := checkCiphertext(c.Key); err != nil {
			bad("kms.certificate.key: %v", err)
		}
		context("kms.certificate", c.EncryptionContext)
	}
}

// forKernel tells whether a path lies in what the enclave's kernel gives.
func forKernel(p string) bool {
	for _, dir := range []string{"/dev", "/proc", "/sys"} {
		if p == dir || strings.HasPrefix(p, dir+"/") {
			return true
		}
	}
	return false
}
