package oidc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"cloister.dev/cloister/workload"
)

const (
	// maxToken bounds a token in bytes, before anything is decoded.
	maxToken = 16 << 10
	// skew is how far the issuer's clock may be from the enclave's.
	skew = 30 * time.Second
)

// refusal is why a request is refused, in the words of RFC 6750, section 3.1.
type refusal struct {
	status int
	// code is "invalid_request", "invalid_token", "insufficient_scope", or empty when the request has no
	// token at all.
	code string
	// description is a sentence for the client without anything of the token.
	description string
}

func (r *refusal) Error() string { return r.description }

func invalid(description string) error { return &refusal{401, "invalid_token", description} }

// bearer returns the token of an Authorization header (RFC 6750, section 2.1), whose several values have
// been joined with commas.
func bearer(authorization string) (string, error) {
	scheme, token, _ := strings.Cut(strings.TrimSpace(authorization), " ")
	if !strings.EqualFold(scheme, "bearer") {
		return "", &refusal{401, "", "a bearer token is required"}
	}
	token = strings.TrimSpace(token)
	if len(token) > maxToken {
		return "", invalid(fmt.Sprintf("the token is longer than %d bytes", maxToken))
	}
	// b64token, where "=" stands at the end only.
	plain := strings.TrimRight(token, "=")
	if plain == "" || strings.ContainsFunc(plain, func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-._~+/", r))
	}) {
		return "", &refusal{400, "invalid_request", "there must be one Authorization header with one bearer token"}
	}
	return token, nil
}

// types are the accepted values of the header typ, which is optional: those of access tokens (RFC 9068,
// section 2.1). A logout token or a DPoP proof of the same issuer is none.
var types = []string{"", "jwt", "at+jwt", "application/at+jwt", "application/jwt"}

// verify returns the claims of a token that the issuer has signed and that is meant for here and now. Every
// error is a *refusal, but for keys that are not known.
func (p *Plugin) verify(ctx context.Context, token string) (map[string]json.RawMessage, error) {
	t, err := jwt.ParseSigned(token, p.algorithms)
	if err != nil || len(t.Headers) != 1 {
		return nil, invalid("the token is not a JWT with an accepted signature algorithm")
	}
	h := t.Headers[0]
	kind, _ := h.ExtraHeaders[jose.HeaderType].(string)
	if h.ExtraHeaders[jose.HeaderType] != nil && kind == "" || !slices.Contains(types, strings.ToLower(kind)) {
		return nil, invalid("the token is of a type that is no access token")
	}
	keys, err := p.keys.find(ctx, h.KeyID, h.Algorithm)
	if err != nil {
		return nil, err
	}
	var registered jwt.Claims
	var all map[string]json.RawMessage
	signed := false
	for _, k := range keys {
		if signed = t.Claims(k.public, &registered, &all) == nil; signed {
			break
		}
	}
	if !signed {
		return nil, invalid("the token has not been signed by a key of the issuer")
	}
	if err := p.validate(registered); err != nil {
		return nil, err
	}
	// Whoever has only the token is not who it was issued to (RFC 7800; RFC 8705, section 3; RFC 9449), and
	// the proof of the key is not looked at.
	if bound := all["cnf"]; bound != nil && string(bound) != "null" {
		return nil, invalid("the token is bound to a key of its owner, which is not supported")
	}
	var scope string
	if json.Unmarshal(all["scope"], &scope) != nil {
		scope = "" // what is no text is no scope
	}
	have := strings.Fields(scope)
	for _, s := range p.config.Scopes {
		if !slices.Contains(have, s) {
			return nil, &refusal{403, "insufficient_scope", "the token lacks a scope"}
		}
	}
	return all, nil
}

// validate checks the registered claims (RFC 7519, section 4.1; RFC 9068, section 4).
func (p *Plugin) validate(c jwt.Claims) error {
	if c.Expiry == nil {
		return invalid("the token never expires")
	}
	err := c.ValidateWithLeeway(jwt.Expected{Issuer: p.config.Issuer, Time: p.now()}, skew)
	switch {
	case err == nil && c.Audience.Contains(p.config.Audience):
		return nil
	case err == nil: // last: the others mean that this is no token to be authorized by at all
		return &refusal{403, "insufficient_scope", "the token is for another audience"}
	case errors.Is(err, jwt.ErrInvalidIssuer):
		return invalid("the token is of another issuer")
	case errors.Is(err, jwt.ErrExpired):
		return invalid("the token has expired")
	case errors.Is(err, jwt.ErrNotValidYet), errors.Is(err, jwt.ErrIssuedInTheFuture):
		return invalid("the token is not valid yet")
	}
	return invalid("the token's claims are not valid")
}

// headerOf writes a claim as the value of a header: text as it is, everything else as the token's own JSON,
// without its spaces: a number read as a float could become that of somebody else. Text with control
// characters cannot be written.
func headerOf(claim json.RawMessage) (string, bool) {
	var text string
	if json.Unmarshal(claim, &text) != nil {
		var b bytes.Buffer
		if json.Compact(&b, claim) != nil {
			return "", false
		}
		text = b.String()
	}
	if !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) || strings.TrimSpace(text) != text {
		return "", false
	}
	return text, true
}

// claims returns which claim goes into which header.
func claims(c *workload.OIDC) map[string]string {
	out := map[string]string{workload.HeaderSubject: "sub", workload.HeaderIssuer: "iss", workload.HeaderScope: "scope"}
	for claim, header := range c.Claims {
		out[header] = claim
	}
	return out
}
