package workload

import (
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Headers that the built-in plugin oidc sets from a token's claims.
const (
	// HeaderSubject is the claim sub.
	HeaderSubject = HeaderPrefix + "sub"
	// HeaderIssuer is the claim iss.
	HeaderIssuer = HeaderPrefix + "iss"
	// HeaderScope is the claim scope: scopes with spaces between them (RFC 8693, section 4.2).
	HeaderScope = HeaderPrefix + "scope"
)

// OIDCAlgorithms are the signature algorithms that the plugin oidc can accept (RFC 7518, section 3.1,
// and RFC 8037): those with a public key.
var OIDCAlgorithms = []string{"ES256", "ES384", "ES512", "EdDSA", "PS256", "PS384", "PS512", "RS256", "RS384", "RS512"}

// OIDC is the config of the built-in authentication plugin oidc, which takes OAuth 2.0 bearer tokens
// that are JWTs of one issuer.
type OIDC struct {
	// Issuer is the issuer's https URL, exactly as in the claim iss. Its discovery document lies below it
	// at /.well-known/openid-configuration (OpenID Connect Discovery 1.0, section 4).
	Issuer string `json:"issuer"`
	// Audience must be among a token's aud.
	Audience string `json:"audience"`
	// Scopes must all be among a token's scope.
	Scopes []string `json:"scopes,omitempty"`
	// Algorithms are the accepted signature algorithms, of OIDCAlgorithms, in ascending order; none means
	// ES256 and RS256.
	Algorithms []string `json:"algorithms,omitempty"`
	// Claims hands further claims to the workload: the name of a claim to the name of a header.
	Claims map[string]string `json:"claims,omitempty"`
	// CA is one or more PEM certificates, the only roots that the issuer's own certificate may have: an
	// enclave has no others.
	CA string `json:"ca"`
}

var defaultAlgorithms = []string{"ES256", "RS256"}

// AcceptedAlgorithms are those of Algorithms, or the default.
func (c *OIDC) AcceptedAlgorithms() []string {
	if len(c.Algorithms) == 0 {
		return defaultAlgorithms
	}
	return c.Algorithms
}

// scopeRE is a scope-token (RFC 6749, section 3.3).
var scopeRE = regexp.MustCompile(`^[\x21\x23-\x5B\x5D-\x7E]+$`)

// Validate implements PluginConfig.
func (c *OIDC) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if u, err := url.Parse(c.Issuer); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil ||
		u.RawQuery != "" || u.Fragment != "" {
		bad("issuer %q must be an https URL without a user, a query or a fragment, as in the claim iss", c.Issuer)
	} else if _, _, err := ParseEndpoint(endpoint(u)); err != nil {
		bad("issuer %q: %v", c.Issuer, err)
	}
	if c.Audience == "" {
		bad("audience is missing: name what must be in a token's aud")
	}
	if !ascending(c.Scopes) {
		bad("scopes must be in ascending order without duplicates")
	}
	for _, s := range c.Scopes {
		if !scopeRE.MatchString(s) {
			bad("%q is not a scope", s)
		}
	}
	for _, a := range c.Algorithms {
		if !slices.Contains(OIDCAlgorithms, a) {
			bad("the algorithm %q is not one of %s", a, strings.Join(OIDCAlgorithms, ", "))
		}
	}
	if !ascending(c.Algorithms) || slices.Equal(c.Algorithms, defaultAlgorithms) {
		bad("algorithms must be in ascending order without duplicates, and left out for %s", strings.Join(defaultAlgorithms, " and "))
	}
	headers := map[string]bool{HeaderSubject: true, HeaderIssuer: true, HeaderScope: true}
	for _, claim := range slices.Sorted(maps.Keys(c.Claims)) {
		header := c.Claims[claim]
		if claim == "" {
			bad("claims: the name of a claim is empty")
		}
		if err := checkHeader(header); err != nil {
			bad("claims: %v", err)
		}
		if headers[header] {
			bad("claims: the header %q is set twice", header)
		}
		headers[header] = true
	}
	if _, err := c.Roots(); err != nil {
		bad("ca: %v", err)
	}
	return errors.Join(errs...)
}

// Roots are the certificates of CA.
func (c *OIDC) Roots() (*x509.CertPool, error) {
	pool, err := parsePool(c.CA)
	if err != nil {
		return nil, fmt.Errorf("the enclave has no root certificates of its own: %w", err)
	}
	return pool, nil
}

// Endpoints implements PluginConfig.
func (c *OIDC) Endpoints() []string {
	u, err := url.Parse(c.Issuer)
	if err != nil {
		return nil
	}
	return []string{endpoint(u)}
}

func endpoint(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// RequestHeaders are the headers that the plugin sets on a request.
func (c *OIDC) RequestHeaders() []string {
	out := []string{HeaderSubject, HeaderIssuer, HeaderScope}
	for _, h := range c.Claims {
		out = append(out, h)
	}
	slices.Sort(out)
	return out
}
